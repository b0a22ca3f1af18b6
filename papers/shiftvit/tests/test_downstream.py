"""ShiftViT under mmdetection and mmsegmentation. Skipped where they are not installed (tools/mm.sh)."""

import pytest
import timm
import torch

from common import run
from common.run import mm

pytest.importorskip("mmengine", reason="detection and segmentation are not installed: tools/mm.sh")

from mmengine.registry import MODELS, init_default_scope

from papers.shiftvit.downstream import backbone, train


def load(home, *args, **kwargs):
    return mm.load(mm.Arguments(*args, **kwargs), home / "run", train.CONFIGS, train.CHECKPOINT)


def test_maps_are_the_networks(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("shiftvit_micro")
    run.save_weights(tmp_path / "w.safetensors", network.state_dict())
    ours = MODELS.build(dict(type="ShiftViT", variant="shiftvit_micro", checkpoint=str(tmp_path / "w.safetensors")))
    assert isinstance(ours, backbone.Backbone)
    features = timm.create_model("shiftvit_micro", features_only=True)
    plain = {k.replace("stages.", "stages_"): v for k, v in network.state_dict().items()}
    features.load_state_dict({k: plain[k] for k in features.state_dict()})
    x = torch.randn(2, 3, 64, 96)
    maps = ours.eval()(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 24), (2, 64, 8, 12), (2, 128, 4, 6), (2, 256, 2, 3)]
    for ours_, theirs, norm in zip(maps, features.eval()(x), ours.norms):
        torch.testing.assert_close(ours_, norm(theirs))


@pytest.mark.parametrize("name", sorted(path.stem for path in train.CONFIGS.glob("*.py")))
def test_a_configuration_builds_its_model(name, tmp_path):
    (tmp_path / "data").mkdir()
    config = load(tmp_path, name, tmp_path / "data", change=["pictures=0"])
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert isinstance(model.backbone, backbone.Backbone)
    widths = [norm.num_channels for norm in model.backbone.norms]
    taken = config.model.neck if "neck" in config.model else config.model.decode_head
    assert widths == list(taken.in_channels), "whoever takes the maps expects their widths"
    assert "auxiliary_head" not in config.model or config.model.auxiliary_head.in_channels == widths[2]
    assert str(tmp_path / "data") in str(config.train_dataloader) and "'data/" not in str(config.train_dataloader)
    assert all(p.requires_grad for p in model.parameters())
