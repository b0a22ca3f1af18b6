"""Detectors that know nothing of tracking: torchvision's, given as a module and a loss."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.ssd import SSD

from papers.maml_tracker import any_detector
from papers.maml_tracker.maml import MAML, multi_step_weights


def a_set(seed):
    torch.manual_seed(seed)
    return torch.rand(1, 3, 96, 96), torch.tensor([[30.0, 20.0, 70.0, 64.0]])


def outer_gradients(maml, k=1):
    losses = maml(a_set(0), a_set(1), multi_step_weights("last", k))
    losses[-1].backward()
    return losses, {name: p.grad for name, p in maml.named_parameters() if p.grad is not None}


def test_the_example_is_short():
    assert len(Path(any_detector.__file__).read_text().splitlines()) < 60


def test_torchvisions_ssdlite_adapts_and_is_meta_trained():
    torch.manual_seed(0)
    maml = any_detector.meta_detector()
    before = {name: tensor.clone() for name, tensor in maml.state_dict().items()}
    support = a_set(0)
    theta = maml.adapt(support, 3)
    with torch.no_grad():
        assert maml.objective(theta, support) < 0.8 * maml.objective(maml.theta_0(), support)
    losses, grads = outer_gradients(maml)
    assert losses.isfinite().all() and losses[1] != losses[0]
    reached = {name.split(".")[1] for name, grad in grads.items() if grad.abs().max() > 0}
    assert {"backbone", "head"} <= reached and any(name.startswith("rates.head/") for name in grads)
    after = maml.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    image, _ = support
    assert maml.call(theta, any_detector.best_box, image[0]).shape == (1, 4)
    assert type(maml.detector) is SSD


@pytest.mark.parametrize("second_order", [False, True])
def test_torchvisions_faster_rcnn_too(second_order):
    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=96, max_size=96
    )
    heads = [name for name, _ in detector.named_parameters() if name.startswith(("rpn.", "roi_heads."))]

    def loss(model, data):
        model.train().backbone.eval()  # its batch normalisation has nothing to learn from one image
        targets = [{"boxes": data[1], "labels": torch.ones(1, dtype=torch.int64)}]
        return sum(model(list(data[0]), targets).values())

    losses, grads = outer_gradients(MAML(detector, loss, heads, rate=0.01, second_order=second_order))
    assert losses.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())
    assert {f"detector.{name}" for name in heads} < grads.keys() and f"rates.{heads[0].replace('.', '/')}" in grads
