"""What timm, exporters and the paper's table ask of ShiftViT."""

import argparse

import numpy as np
import pytest
import timm
import torch

from common import run
from papers.shiftvit.evaluate import PAPER
from papers.shiftvit.model import VARIANTS
from papers.shiftvit.recipes import RECIPES

# Multiply-adds at 224 in convolutions and linears, counted on the authors' code, in billions.
GMACS = {
    "shiftvit_light_tiny": 2.963, "shiftvit_r2_tiny": 4.582, "shiftvit_r4_tiny": 4.582, "shiftvit_light_small": 5.738,
    "shiftvit_r2_small": 8.743, "shiftvit_r4_small": 8.512, "shiftvit_light_base": 10.194, "shiftvit_r2_base": 15.537,
    "shiftvit_r4_base": 15.126,
}
DROP_PATH = {"tiny": 0.2, "small": 0.4, "base": 0.5, "r2_base": 0.6}


@pytest.fixture
def micro():
    torch.manual_seed(0)
    return timm.create_model("shiftvit_micro", num_classes=10).eval()


@pytest.mark.parametrize("name", GMACS)
def test_cost(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        assert run.multiply_adds(model, torch.empty(1, 3, 224, 224)) / 1e9 == pytest.approx(GMACS[name], rel=1e-3)


@pytest.mark.parametrize("name", GMACS)
def test_drop_path_rises_to_the_variants_rate(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    kind = name.removeprefix("shiftvit_")
    assert rates[0] == 0 and rates[-1] == pytest.approx(DROP_PATH.get(kind) or DROP_PATH[kind.split("_")[1]])
    np.testing.assert_allclose(np.diff(rates), rates[-1] / (len(rates) - 1), atol=1e-6)


def test_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    logits = timm.create_model("shiftvit_light_tiny")(torch.randn(4, 3, 64, 64))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert loss.item() == pytest.approx(np.log(1000), abs=0.3)


@pytest.mark.parametrize("height, width", [(32, 32), (33, 67), (96, 32)])
def test_features_only(height, width):
    model = timm.create_model("shiftvit_micro", features_only=True)
    x = torch.randn(1, 3, height, width)
    assert [f.shape[1] for f in model(x)] == model.feature_info.channels() == [32, 64, 128, 256]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(f.shape[2:]) for f in model(x)] == [(height // s, width // s) for s in (4, 8, 16, 32)]
    assert len(timm.create_model("shiftvit_micro", features_only=True, out_indices=(1, 3))(x)) == 2


def test_features_are_taken_before_the_next_downsampling(micro):
    features = timm.create_model("shiftvit_micro", features_only=True, num_classes=10).eval()
    weights = {name.replace("stages.", "stages_", 1): tensor for name, tensor in micro.state_dict().items()}
    assert not features.load_state_dict(weights, strict=False).missing_keys
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(features(x)[-1], micro.stages(micro.patch_embed(x)))


def test_heads(micro):
    x = torch.randn(2, 3, 64, 64)
    features = micro.forward_features(x)
    assert features.shape == (2, 256, 2, 2)
    torch.testing.assert_close(micro.forward_head(features), micro(x))
    assert micro.forward_head(features, pre_logits=True).shape == (2, 256)
    assert timm.create_model("shiftvit_micro", num_classes=0)(x).shape == (2, 256)
    micro.reset_classifier(7)
    assert micro(x).shape == (2, 7) and micro.get_classifier().out_features == 7
    assert timm.create_model("shiftvit_micro", in_chans=1)(x[:, :1]).shape == (2, 1000)


def test_registered_with_what_data_pipelines_need():
    assert set(VARIANTS) <= set(timm.list_models("shiftvit*"))
    config = timm.create_model("shiftvit_micro").pretrained_cfg
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    assert data["input_size"] == (3, 224, 224) and data["crop_pct"] == 0.875 and data["interpolation"] == "bicubic"


def test_layer_groups_cover_every_parameter_once_and_in_order(micro):
    groups = timm.models.group_parameters(micro, micro.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in micro.named_parameters())
    order = [min(k for k, names in groups.items() if f"stages.{s}.blocks.0.mlp.fc1.weight" in names) for s in range(4)]
    assert order == sorted(order) and min(groups) < order[0]


def test_local_dir_round_trip(micro, tmp_path):
    timm.models.save_for_hf(micro, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), micro(x))


def test_the_authors_file_loads_through_timm(micro, tmp_path):
    theirs = {}
    for name, tensor in micro.state_dict().items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"stages.{stage}.", f"layers.{stage - 1}.")
        name = name.replace("stages.", "layers.").replace("head.fc.", "head.")
        theirs[name.replace(".norm.", ".norm2.") if ".blocks." in name else name] = tensor
    torch.save({"model": theirs, "epoch": 299, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "theirs.pth")
    overlay = dict(file=str(tmp_path / "theirs.pth"), num_classes=10)
    again = timm.create_model("shiftvit_micro", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), micro(x))
    assert torch.equal(PAPER.load_file(tmp_path / "theirs.pth", RECIPES["tiny"], classes=10)(x), micro(x))
    with pytest.raises(run.UserError, match=r"does not fit shiftvit_micro with 9 classes.*head"):
        PAPER.load_file(tmp_path / "theirs.pth", RECIPES["tiny"], classes=9)


def test_channels_last_changes_nothing(micro):
    x = torch.randn(2, 3, 64, 64)
    expected = micro(x)
    micro.to(memory_format=torch.channels_last)
    torch.testing.assert_close(micro(x.to(memory_format=torch.channels_last)), expected)


def test_export(micro):
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(micro, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    y = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(exported.module()(y), micro(y))


def test_onnx(micro, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 64, 64)
    torch.onnx.export(micro, (x,), tmp_path / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(ours, micro(x).detach().numpy(), rtol=1e-4, atol=1e-5)
