"""ShiftViT, sMLPNet and SPACH as a timm user meets them: sizes, devices, exporters, tags, weights that travel along."""

import copy
import importlib
import warnings

import numpy as np
import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from timm.utils.onnx import onnx_export
from torch import nn

from ci.timm_suite import PAPERS, is_ours
from common.run import UserError, shipped
from common.run.resize import fitted, resize, resized
from common.run.timm import tagged
from papers.shiftvit import VARIANTS as SHIFTVIT
from papers.smlpnet import VARIANTS as SMLPNET
from papers.smlpnet import load_official, to_official
from papers.smlpnet.model import MIXINGS
from papers.spach import VARIANTS as SPACH

MICRO = ("shiftvit_micro", "smlpnet_micro", "spach_ms_micro_patch4_conv", "spach_ms_micro_patch4_attn",
         "spach_ms_micro_patch4_mlp")
ANY_SIZE = [name for name in MICRO if "mlp" not in name]
FIXED = [name for name in MICRO if "mlp" in name]
MINI = {"shiftvit": "shiftvit_mini", "smlpnet": "smlpnet_mini", "spach": "spach_ms_mini_patch4_64_hybrid"}


def micro(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    if isinstance(model.get_classifier(), nn.Linear):
        nn.init.normal_(model.head.fc.weight, std=0.1)  # SPACH's starts at zero
    return model


# Features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MICRO, "spach_xxs_patch16_224_conv"])
def test_intermediates_are_the_maps_that_the_network_computes(name):
    model, x = micro(name, num_classes=7), torch.randn(2, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    x = x[..., :64, :64] if model.default_cfg.get("fixed_input_size") is None else x
    count = len(model.feature_info)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert len(maps) == count and torch.equal(last, model.forward_features(x))
        assert torch.equal(model.norm(maps[-1]), last)
        assert [m.shape[1] for m in maps] == FeatureInfo(model.feature_info, count).channels()
        assert torch.equal(model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0], last)
        early, (second,) = model.forward_intermediates(x, [1], stop_early=True)
        assert torch.equal(early, maps[1]) and torch.equal(second, maps[1])
        getter = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(0, 1)).eval()
        getter.model.load_state_dict(model.state_dict(), strict=False)
        assert all(torch.equal(ours, m) for ours, m in zip(getter(x), maps[:2], strict=True))
        for level in (0, 1):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([level]) == [level]
            (only,) = pruned.forward_intermediates(x, [level], intermediates_only=True)
            assert torch.equal(only, maps[level]) and torch.equal(pruned.forward_features(x), maps[level])
            assert pruned.num_features == maps[level].shape[1]
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", ANY_SIZE)
def test_backbones_of_detectors_take_any_size(name):
    model = timm.create_model(name, features_only=True).eval()
    maps = model(torch.randn(1, 3, 97, 130))
    assert [tuple(m.shape[2:]) for m in maps] == [(97 // s, 130 // s) for s in model.feature_info.reduction()]


def test_of_spach_conv_and_attention_have_no_size_and_an_mlp_has_one():
    for name, (*_, stages, _, _) in SPACH.items():
        fixed = any(mixer == "mlp" for stage in stages for mixer, _ in stage)
        assert timm.get_pretrained_cfg(name).fixed_input_size == fixed
        with torch.device("meta"):
            assert bool(timm.create_model(name).stem.img_size) == fixed


# Sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MICRO)
def test_set_input_size(name):
    model = micro(name).requires_grad_(False)
    model.set_input_size((64, 96))
    assert model(torch.randn(1, 3, 64, 96)).isfinite().all()
    assert not any(p.requires_grad for p in model.parameters()), "what was frozen stays frozen"
    if name in FIXED:
        with pytest.raises(ValueError, match="built for 64x96"):
            model(torch.randn(1, 3, 32, 32))
        fresh = timm.create_model(name, img_size=(64, 96))
        assert [v.shape for v in model.state_dict().values()] == [v.shape for v in fresh.state_dict().values()]
        with pytest.raises(ValueError, match="32 or more"):
            model.set_input_size(16)


@pytest.mark.parametrize("name", FIXED)
def test_an_overlays_input_size_is_the_models(name):
    model = timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, 64, 96)}).eval()
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 64, 96)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1000)


def test_a_matrix_is_interpolated_along_both_axes():
    ramp = torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)
    twice = resized(ramp, "HH", (4, 4), (8, 8))
    torch.testing.assert_close(twice, nn.functional.interpolate(ramp[None, None], size=(8, 8), mode="bilinear")[0, 0])
    assert resized(ramp, "HH", (4, 4), (4, 9)) is ramp
    # positions of a map, in rows: those of a plane stay those of a plane
    plane = (torch.arange(4.0)[:, None] * 10 + torch.arange(6.0)).flatten()
    wide = resized(plane, ["HW"], (4, 6), (8, 12)).view(8, 12)
    torch.testing.assert_close(wide[2:-2, 2:-2].diff(dim=1), torch.full((4, 7), 0.5))
    torch.testing.assert_close(wide[2:-2, 2:-2].diff(dim=0), torch.full((3, 8), 5.0))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_resized_mixing_of_a_constant_map_is_as_it_was(mixing):
    """Rows of a matrix keep their sums: a map without detail is mixed as before, whatever its size."""
    torch.manual_seed(0)
    mixer = MIXINGS[mixing](3, 4, 6).eval()
    for name, p in mixer.named_parameters():
        if name in mixer.AXES:  # smooth in the output's position, or interpolation would move its values
            nn.init.constant_(p, 0.3) if name.endswith("bias") else p.data.copy_(p.mean((-2, -1), keepdim=True))
    before = mixer(torch.full((1, 3, 4, 6), 0.7))
    resize(mixer, (8, 12))
    after = mixer(torch.full((1, 3, 8, 12), 0.7))
    torch.testing.assert_close(after[0, :, 2:-2, 2:-2].mean((1, 2)), before[0].mean((1, 2)), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", FIXED)
def test_weights_of_another_size_are_resized_on_request_or_refused_in_one_line(name, tmp_path):
    whole = micro(name)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}, "pretrained": True}
    assert torch.equal(timm.create_model(name, **overlay).head.fc.weight, whole.head.fc.weight)
    with pytest.raises(UserError, match=r"^[^\n]*maps of (4x4|8x8)[^\n]*(8x8|16x16)[^\n]*resize_mixers=True[^\n]*$"):
        timm.create_model(name, img_size=64, **overlay)
    larger = timm.create_model(name, img_size=64, resize_mixers=True, **overlay).eval()
    whole.set_input_size(64)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(larger(x), whole(x))


def test_the_authors_weights_too(tmp_path):
    theirs = to_official(micro("smlpnet_micro"))
    with pytest.raises(UserError, match="resize_mixers=True"):
        load_official("smlpnet_micro", theirs, image_size=64)
    assert load_official("smlpnet_micro", theirs, image_size=64, resize_mixers=True)(torch.randn(1, 3, 64, 64)).shape
    unsquare = timm.create_model("spach_ms_micro_patch4_mlp", img_size=(32, 64)).state_dict()
    with pytest.raises(UserError, match="not those of a square map"):
        fitted(unsquare, timm.create_model("spach_ms_micro_patch4_mlp", img_size=64), interpolate=True)


# Devices, exporters, tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MICRO)
def test_device_and_dtype(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert next(timm.create_model(name).parameters()).dtype == torch.float32, "what comes after is as it was"
    with pytest.raises(TypeError):
        timm.create_model(name, nonsense=1)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_a_trace_is_right_at_other_sizes(name):
    model, larger = micro(name, num_classes=7), torch.randn(2, 3, 64, 96)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls tracing deprecated
        traced = torch.jit.trace(model, torch.randn(1, 3, 32, 32))
        torch.testing.assert_close(traced(larger), model(larger), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MICRO)
def test_reparameterize_finds_nothing_to_fuse(name):
    model, x = micro(name), torch.randn(1, 3, 32, 32)
    assert torch.equal(reparameterize_model(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("dynamo", [False, True])
def test_timms_onnx_export(name, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, file = micro(name, num_classes=7), torch.randn(2, 3, 32, 32), str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export(model, file, example_input=x, use_dynamo=dynamo)
    session = onnxruntime.InferenceSession(file)
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(ours, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, kwargs", [
    ("shiftvit_micro", {}), ("smlpnet_micro", {}), ("spach_ms_micro_patch4_mlp", {"share_mixers": True}),
])
def test_the_hub_takes_both_forms_of_weights(name, kwargs, tmp_path):
    model, x = micro(name, **kwargs), torch.randn(1, 3, 32, 32)
    timm.models.save_for_hf(model, tmp_path, model_args=kwargs, safe_serialization="both")  # push_to_hf_hub's default
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    again = micro(name, **kwargs)
    again.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    assert torch.equal(again(x), model(x))


def test_unshared_biases_decay_as_little_as_the_papers():
    for mixing in MIXINGS:
        model = timm.create_model("smlpnet_micro", mixing=mixing)
        groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        names = {name for name, p in model.named_parameters() if id(p) in decayed}
        assert names and not any("bias" in name or ".norm." in name for name in names), mixing


# Names, tags, weights --------------------------------------------------------------------------------------


def test_tags_say_which_names_have_weights():
    names = [*SHIFTVIT, *SMLPNET, *SPACH]
    assert len(names) == 42 and all(is_ours(name) for name in names)
    published = {name for name in names if timm.get_pretrained_cfg(name).tag == "in1k"}
    assert len(published) == 4 + 2 + 8
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        assert bool(cfg.url) == (name in published) and cfg.tag in ("in1k", "tin100", "untrained")
        assert bool(cfg.has_weights) == (cfg.tag != "untrained")
        assert cfg.paper_ids.startswith("arXiv:2") and cfg.paper_name and (cfg.origin_url or cfg.tag == "tin100")


@pytest.mark.parametrize("paper", PAPERS)
def test_weights_that_travel_along(paper, tmp_path, monkeypatch):
    """A recipe's weights are those of a name: where the file is, ``pretrained=True`` finds it."""
    recipes, evaluate = (importlib.import_module(f"papers.{paper}.{part}") for part in ("recipes", "evaluate"))
    recipe, name = recipes.RECIPES["tiny_imagenet"], MINI[paper]
    torch.manual_seed(0)
    trained = evaluate.build(recipe, 100).eval()
    monkeypatch.setattr(shipped, "folder", lambda _: tmp_path)
    assert list(tagged(paper, name, {"url": ""})) == [f"{name}.untrained"]
    file = tmp_path / f"{name}.safetensors"
    shipped.write(
        file, trained.state_dict(), paper=paper, recipe_name="tiny_imagenet", recipe=recipe,
        classes=[f"n{i:08d}" for i in range(100)], revision="0" * 40,
    )
    (tag, cfg), = tagged(paper, name, {"url": "", "license": "mit"}).items()
    assert tag == f"{name}.tin100" and cfg["num_classes"] == 100 and cfg["license"] == "other"
    overlay = {"file": str(file), "num_classes": 100}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), trained(x), rtol=0.02, atol=0.02)  # the file holds halves


@pytest.mark.parametrize("paper", PAPERS)
def test_shipped_weights_are_timms(paper):
    if MINI[paper] not in shipped.names(paper):
        pytest.skip(f"{paper} ships no weights yet")
    model = timm.create_model(MINI[paper], pretrained=True).eval()
    run_model, recipe, classes = importlib.import_module(f"papers.{paper}.evaluate").PAPER.load_run(
        shipped.path_of(paper, shipped.folder(paper) / f"{MINI[paper]}.safetensors")
    )
    x = torch.randn(2, 3, recipe.input_size_px, recipe.input_size_px)
    assert len(classes) == model.num_classes == 100 and torch.equal(model(x), run_model(x))
    assert timm.data.resolve_data_config(model=model)["crop_pct"] == recipe.eval_crop
