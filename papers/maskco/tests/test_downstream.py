"""A backbone trained here under mmdetection and mmsegmentation. Skipped where they are not installed (tools/mm.sh)."""

import pytest
import torch

from common import downstream, run

pytest.importorskip("mmengine", reason="detection and segmentation are not installed: tools/mm.sh")

from mmengine.registry import MODELS, init_default_scope

from papers.maskco.downstream import pretrained, train  # noqa: F401 (the first registers)
from papers.maskco.export import export
from papers.maskco.model import build_backbone


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_an_export_is_a_stock_resnet(tmp_path, scope):
    init_default_scope(scope)
    torch.manual_seed(0)
    ours = build_backbone("resnet18_narrow").eval()
    export(ours, "resnet18_narrow", tmp_path / "model", 64, 1.0)
    start = dict(type="MaskCo", checkpoint=str(tmp_path / "model"))
    stock = MODELS.build(dict(
        type=f"{scope}.ResNet", depth=18, base_channels=32, stem_channels=64, norm_eval=False, init_cfg=start,
    ))
    stock.init_weights()
    x = torch.randn(1, 3, 64, 64)
    stock.eval()
    torch.testing.assert_close(stock(x)[-1], ours(x), rtol=1e-4, atol=1e-4)
    wider = MODELS.build(dict(type=f"{scope}.ResNet", depth=18, init_cfg=start))
    with pytest.raises(run.UserError, match="does not fit this backbone"):
        wider.init_weights()


@pytest.mark.parametrize("name", sorted(path.stem for path in train.CONFIGS.glob("*.py")))
def test_a_configuration_builds_its_model(name, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = downstream.Arguments(name, tmp_path / "data", checkpoint="here", change=["pictures=0"])
    config = downstream.load(arguments, tmp_path / "run", train.CONFIGS, train.CHECKPOINT)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert model.backbone.init_cfg["type"] == "MaskCo" and model.backbone.init_cfg["checkpoint"] == "here"
    assert all(p.requires_grad for p in model.parameters())
    assert str(tmp_path / "data") in str(config.train_dataloader)
