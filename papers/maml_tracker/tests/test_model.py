"""Detectors: geometry, targets and losses against torchvision's parts and against loops."""

import hashlib
import math
import os
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from common import run
from common.run import UserError
from papers.maml_tracker.evaluate import build
from papers.maml_tracker.model import (
    HEADS,
    Crops,
    Detector,
    efficientnet_lite0,
    grid_boxes,
    iou_of_distances,
    lite0_levels,
    load_torchvision,
    narrow,
    resnet18,
    torchvision_weights,
)
from papers.maml_tracker.recipes import RECIPES


def some_crops(side, boxes, present=None):
    boxes = torch.tensor(boxes).float()
    present = torch.ones(len(boxes), dtype=torch.bool) if present is None else torch.tensor(present)
    images = torch.randint(256, (len(boxes), 3, side, side), dtype=torch.uint8)
    return Crops(images, boxes, present, torch.ones(len(boxes)))


def head(kind, side=263, anchor=64, channels=8):
    torch.manual_seed(0)
    return HEADS[kind](channels, math.ceil(side / 8), side, anchor, width=8, depth=1)


# Boxes well inside, off the grid, long, small, and larger than all anchors.
BOXES = [
    [100.0, 100, 164, 164], [61.3, 80.1, 140.2, 131.7], [20, 120, 240, 150], [130, 131, 138, 140], [5, 8, 250, 255],
]


# Geometry ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, grid", [(263, 33), (127, 16), (128, 16), (65, 9)])
def test_cells_are_where_the_specification_says(side, grid):
    boxes = grid_boxes(grid, side, 64)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).view(grid, grid, 2)
    expected = torch.tensor([8 * c + 4 - 0.5 * (grid * 8 - side) for c in range(grid)])
    torch.testing.assert_close(centres[2, :, 0], expected)
    torch.testing.assert_close(centres[:, 3, 1], expected)
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], torch.full((grid * grid, 2), 64.0))
    assert centres[0, 0, 0] + centres[-1, -1, 0] == side  # the grid lies in the middle


@pytest.mark.parametrize("backbone, grid", [(narrow, 16), (resnet18, 16), (efficientnet_lite0, 16), (lite0_levels, 16)])
def test_backbones_end_at_stride_8(backbone, grid):
    layers, channels, *_ = backbone(False)
    assert layers.eval()(torch.zeros(1, 3, 127, 127)).shape == (1, channels, grid, grid)


def test_the_paper_sized_grid():
    maml = build(RECIPES["retina"])
    features = maml.detector.features(torch.zeros(1, 3, 263, 263))
    assert maml.detector.grid == 33 and features.shape == (1, 2 * 256, 33, 33)


def test_what_is_adapted_on_frozen_features_is_a_tenth_of_a_million():
    assert sum(p.numel() for p in build(RECIPES["real_lite0"]).theta_0().values()) == 150_597


# Backbones ------------------------------------------------------------------------------------------------


def test_resnet18_is_torchvisions_with_another_stride():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    ours = resnet18(False)
    load_torchvision(ours, theirs.state_dict())
    x = torch.randn(2, 3, 63, 63)
    with torch.no_grad():
        expected = theirs.layer2(theirs.layer1(theirs.maxpool(theirs.bn1(theirs.conv1(x)).relu())))
        torch.testing.assert_close(ours.layers.eval()[:-1](x), expected)
        theirs.layer3[0].conv1.stride = theirs.layer3[0].downsample[0].stride = (1, 1)
        torch.testing.assert_close(ours.layers(x), theirs.layer3(expected))


def test_lite0_has_the_packages_weights_and_its_early_features():
    pytest.importorskip("transformers")
    try:
        ours = efficientnet_lite0(True)
    except UserError as error:
        pytest.skip(str(error))
    from common.data import pretrained

    theirs = __import__("transformers").AutoModel.from_pretrained(pretrained.efficientnet_lite0()).timm_model.eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = theirs.blocks[:3](theirs.bn1(theirs.conv_stem(x)))
        stem, norm, blocks = ours.layers.eval()
        torch.testing.assert_close(blocks[:3](norm(stem(x))), expected)
    for a, b in zip(blocks[3].parameters(), theirs.blocks[3].parameters()):
        assert torch.equal(a, b)
    with torch.no_grad():
        fine, coarse = lite0_levels(True).layers.eval()(x).split([40, 112], 1)
        torch.testing.assert_close(7 * fine, expected, rtol=1e-4, atol=1e-3)
        enlarged = F.interpolate(theirs.blocks[3:5](expected), scale_factor=2, mode="bilinear")
        torch.testing.assert_close(5 * coarse, enlarged, rtol=1e-4, atol=1e-3)


def test_batch_normalisation_is_frozen():
    recipe = RECIPES["retina"]
    torch.manual_seed(0)
    detector = build(recipe).detector.train()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 15 and not any(m.training or m.weight.requires_grad for m in norms)
    detector(torch.randint(256, (2, 3, 63, 63), dtype=torch.uint8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    assert not any("bn" in name or "downsample.1" in name for name in detector.online())


def test_what_is_adapted_is_what_the_papers_figure_paints_green():
    """Of each branch, all but its first convolution; the shared layers are frozen, in meta-training as in tracking."""
    for head, count in (("retina", 2_371_845), ("fcos", 2_374_151)):  # the paper's 256 channels
        detector = build(RECIPES[head]).detector
        adapted = {name: p for name, p in detector.named_parameters() if name in detector.online()}
        assert sum(p.numel() for p in adapted.values()) == count
        others = {".".join(name.split(".")[:2]) for name, _ in detector.named_parameters() if name not in adapted}
        assert {name for name in others if name.startswith("head")} == {"head.cls_first", "head.box_first"}
        assert not any(name.startswith("backbone") for name in adapted)


def test_offline_and_online_layers_together_are_the_three_convolutions_and_the_output_of_each_branch():
    torch.manual_seed(0)
    detector = build(replace(RECIPES["retina"], crop_px=63)).detector.eval()
    head, images = detector.head, torch.randint(256, (2, 3, 63, 63), dtype=torch.uint8)
    with torch.no_grad():
        shared = detector.backbone((images / 255 - detector.mean) / detector.std)
        maps = []
        branches = (head.cls_first, head.cls_tower, head.cls), (head.box_first, head.box_tower, head.box)
        for first, tower, output in branches:
            x = shared
            for convolution in (first[0], *(layer[0] for layer in tower)):
                x = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=1).relu()
            maps.append(output(x))
            assert len(tower) == 2
        torch.testing.assert_close(detector(images), torch.cat(maps, 1).flatten(2).transpose(1, 2))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_in_torchs_cache_are_looked_through_and_never_run(tmp_path, monkeypatch):
    """torch.hub checks the hash of what it downloads, not of what lies there; and it unpickles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    path = tmp_path / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"is not torchvision's: its SHA-256 is .*, expected f37072fd"):
        resnet18(True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path.rename(path.with_name(f"resnet18-{digest}.pth"))
    found = torchvision_weights(f"https://host/resnet18-{digest}.pth")
    with pytest.raises(UserError, match="is refused: "):
        run.load_weights(found)
    assert not (tmp_path / "executed").exists()


def test_imagenet_weights_that_do_not_exist():
    with pytest.raises(UserError, match="no ImageNet weights"):
        narrow(True)


# Heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_a_new_head_scores_one_percent_everywhere(kind):
    ours = head(kind)
    boxes, scores = ours.predict(ours(ours.prepare(torch.randn(2, 8, 33, 33))))
    assert boxes.shape == (2, 1089, 4)
    if kind == "fcos":
        scores = scores.square() * 2  # its centre-ness is a half
    torch.testing.assert_close(scores, torch.full((2, 1089), 0.01), rtol=0.5, atol=0)


def test_retina_assigns_as_torchvisions_matcher():
    crops = some_crops(263, BOXES)
    ours = head("retina")
    positive, ignored = ours.assign(crops)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    for i, box in enumerate(crops.box_xyxy):
        matched = matcher(box_iou(box[None], ours.anchors))
        assert torch.equal(positive[i], matched >= 0)
        assert torch.equal(ignored[i], matched == Matcher.BETWEEN_THRESHOLDS)
    assert positive.sum(1).min() >= 1 and ignored.sum() > 0


def test_fcos_assigns_the_middle_half():
    crops = some_crops(263, BOXES)
    ours = head("fcos")
    positive, wanted = ours.assign(crops)
    for i, (x1, y1, x2, y2) in enumerate(BOXES):
        centre, away, middle = ((x1 + x2) / 2, (y1 + y2) / 2), [], set()
        for row in range(33):
            for column in range(33):
                cell, x, y = row * 33 + column, 8 * column + 3.5, 8 * row + 3.5
                away.append(((x - centre[0]) ** 2 + (y - centre[1]) ** 2, cell))
                inside = abs(x - centre[0]) <= (x2 - x1) / 4 and abs(y - centre[1]) <= (y2 - y1) / 4
                if inside:
                    middle.add(cell)
                expected = [(x - x1) / 8, (y - y1) / 8, (x2 - x) / 8, (y2 - y) / 8]
                assert wanted[i, cell].tolist() == pytest.approx(expected, abs=1e-4)
        assert set(positive[i].nonzero()[:, 0].tolist()) == middle | {min(away)[1]}


@pytest.mark.parametrize("kind", HEADS)
def test_a_right_answer_costs_nothing_and_is_read_back(kind):
    crops, ours = some_crops(263, BOXES), head(kind)
    raw = torch.zeros(len(BOXES), 1089, 6 if kind == "fcos" else 5)
    if kind == "retina":
        positive, _ = ours.assign(crops)
        for i, box in enumerate(crops.box_xyxy):
            raw[i, :, 1:] = ours.coder.encode_single(box.expand(1089, 4), ours.anchors)
    else:
        positive, wanted = ours.assign(crops)
        raw[..., 1:5] = wanted.clamp(min=1e-3).log()
        raw[..., 5] = 50.0
    raw[..., 0] = torch.where(positive, 50.0, -50.0)
    boxes, scores = ours.predict(raw)
    for i, box in enumerate(crops.box_xyxy):
        if i != 3 or kind == "retina":  # FCOS has no cell inside the small box
            torch.testing.assert_close(boxes[i, scores[i].argmax()], box, rtol=0, atol=2e-2)
    loss = ours.loss(raw, crops)
    assert kind == "fcos" or loss.max() < 1e-6
    wrong = raw.clone()
    wrong[..., 0] *= -1
    assert (ours.loss(wrong, crops) > loss + 10).all()


def test_retina_loss_by_hand():
    crops, ours = some_crops(127, [[50.0, 44, 90, 80], [10, 20, 40, 60]]), head("retina", side=127, anchor=32)
    raw = torch.randn(2, 256, 5)
    for i, box in enumerate(crops.box_xyxy):
        iou = box_iou(ours.anchors, box[None])[:, 0]
        positive = (iou >= 0.5) | (iou == iou.max())
        total = 0.0
        for cell in range(256):
            if positive[cell] or iou[cell] < 0.4:
                p = raw[i, cell, 0].sigmoid().item()
                total += -0.25 * (1 - p) ** 2 * math.log(p) if positive[cell] else -0.75 * p**2 * math.log(1 - p)
            if positive[cell]:
                a = ours.anchors[cell]
                middle, size = (box[:2] + box[2:] - a[:2] - a[2:]) / 2 / 32, ((box[2:] - box[:2]) / 32).log()
                for off in (raw[i, cell, 1:] - torch.cat([middle, size])).abs().tolist():
                    total += off - 1 / 18 if off >= 1 / 9 else off**2 * 4.5
        assert ours.loss(raw, crops)[i].item() == pytest.approx(total / positive.sum().item(), rel=1e-5)


def test_fcos_loss_by_hand():
    crops, ours = some_crops(127, [[50.0, 44, 90, 80]]), head("fcos", side=127, anchor=32)
    raw = torch.randn(1, 256, 6)
    positive, wanted = (x[0] for x in ours.assign(crops))
    boxes, _ = ours.predict(raw)
    overlap, regression, centreness = box_iou(boxes[0], crops.box_xyxy)[:, 0], 0.0, 0.0
    for cell in positive.nonzero()[:, 0].tolist():
        left, top, right, bottom = wanted[cell].tolist()
        regression -= math.log(overlap[cell])
        goal = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        c = raw[0, cell, 5].sigmoid().item()
        centreness -= goal * math.log(c) + (1 - goal) * math.log(1 - c)
    focal = sigmoid_focal_loss(raw[0, :, 0], positive.float(), alpha=0.25, gamma=2.0, reduction="sum").item()
    expected = (focal + regression + centreness) / positive.sum().item()
    assert ours.loss(raw, crops).item() == pytest.approx(expected, rel=1e-4)


def test_overlap_of_distances_is_overlap_of_boxes():
    torch.manual_seed(0)
    a, b = torch.rand(50, 4), torch.rand(50, 4)
    boxes = [torch.cat([-x[:, :2], x[:, 2:]], 1) for x in (a, b)]
    torch.testing.assert_close(iou_of_distances(a, b), box_iou(*boxes).diagonal())


@pytest.mark.parametrize("kind", HEADS)
def test_where_no_target_is_the_box_does_not_matter(kind):
    crops, ours = some_crops(263, BOXES[:2], [True, False]), head(kind)
    raw = torch.randn(2, 1089, 6 if kind == "fcos" else 5)
    moved = crops._replace(box_xyxy=torch.tensor([BOXES[0], BOXES[4]]))
    assert torch.equal(ours.loss(raw, crops)[1], ours.loss(raw, moved)[1])
    logits = raw[1, :, 0]
    expected = sigmoid_focal_loss(logits, torch.zeros(1089), alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(ours.loss(raw, crops)[1], expected)


def test_weights_of_crops():
    torch.manual_seed(0)
    detector = Detector(narrow(False), HEADS["retina"], 127, 32, width=8, depth=1)
    crops = some_crops(127, [[50.0, 44, 90, 80], [10, 20, 40, 60], [60, 60, 100, 90]])
    one = [Detector.loss(detector, detector.prepare(Crops(*(x[i : i + 1] for x in crops)))) for i in range(3)]
    weighted = crops._replace(weight=torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(detector.loss(detector.prepare(weighted)), (one[0] + 3 * one[2]) / 4)
    torch.testing.assert_close(detector.loss(detector.prepare(crops)), sum(one) / 3)


@pytest.mark.parametrize("kind", HEADS)
def test_one_image_is_learned_by_heart(kind):
    torch.manual_seed(0)
    detector = Detector(narrow(False), HEADS[kind], 127, 32, width=16, depth=1)
    crops = some_crops(127, [[50.0, 44, 90, 80], [10, 20, 40, 60]])
    optimizer = torch.optim.Adam(detector.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        detector.loss(detector.prepare(crops)).backward()
        optimizer.step()
    with torch.no_grad():
        boxes, scores = detector.predict(detector.features(crops.x))
    for i in range(2):
        assert box_iou(boxes[i, scores[i].argmax()][None], crops.box_xyxy[i : i + 1]).item() > 0.7


def test_unknown_parts_are_named():
    backbones = "resnet18, narrow, efficientnet_lite0, lite0_levels"
    for field, message in (("backbone", backbones), ("head", "retina, fcos")):
        with pytest.raises(UserError, match=f"no 'vgg'; there are {message}"):
            build(replace(RECIPES["tiny"], **{field: "vgg"}))
