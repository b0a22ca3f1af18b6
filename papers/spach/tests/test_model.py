"""SPACH's figures from the paper, its mathematics, and what timm, torch.compile and ONNX expect of it."""

import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

from papers.spach import VARIANTS
from papers.spach.model import MixingBlock

MICRO = [f"spach_ms_micro_patch4_{mixer}" for mixer in ("conv", "attn", "mlp")]

# Parameters and multiply-adds at 224 with 1000 classes, counted on the authors' code.
COUNTS = {
    "spach_xxs_patch16_224_conv": (7_828_840, 1.454e9),
    "spach_xxs_patch16_224_attn": (3_931_048, 0.904e9),
    "spach_xxs_patch16_224_mlp": (8_307_184, 1.631e9),
    "spach_xs_patch16_224_conv": (14_975_848, 2.849e9),
    "spach_xs_patch16_224_attn": (14_938_984, 3.195e9),
    "spach_xs_patch16_224_mlp": (15_932_536, 3.203e9),
    "spach_s_patch16_224_conv": (38_854_120, 7.498e9),
    "spach_s_patch16_224_attn": (32_507_368, 6.726e9),
    "spach_s_patch16_224_mlp": (39_820_024, 7.970e9),
    "spach_ms_xxs_patch4_224_conv": (5_085_224, 0.712e9),
    "spach_ms_xxs_patch4_224_attn": (2_372_744, 0.530e9),
    "spach_ms_xxs_patch4_224_mlp": (6_562_446, 0.931e9),
    "spach_ms_xs_patch4_224_conv": (17_302_120, 2.755e9),
    "spach_ms_xs_patch4_224_attn": (14_479_080, 3.082e9),
    "spach_ms_xs_patch4_224_mlp": (20_260_283, 3.409e9),
    "spach_ms_s_patch4_224_conv": (43_576_168, 7.141e9),
    "spach_ms_s_patch4_224_attn": (39_537_544, 7.532e9),
    "spach_ms_s_patch4_224_mlp": (46_542_011, 8.014e9),
    "spach_ms_xs_patch4_224_hybrid": (27_956_584, 4.444e9),
    "spach_ms_s_patch4_224_hybrid": (63_028_584, 11.051e9),
    "spach_ms_xs_patch4_224_hybrid_plus": (28_060_072, 5.550e9),
    "spach_ms_s_patch4_224_hybrid_plus": (63_138_728, 12.177e9),
}
# The same with one spatial mixer per stage, at unchanged compute, and without the bypass.
SHARED = {
    "spach_xxs_patch16_224_mlp": 7_881_374,
    "spach_xs_patch16_224_mlp": 15_042_206,
    "spach_s_patch16_224_mlp": 38_929_694,
    "spach_s_patch16_224_attn": 20_950_504,
    "spach_ms_xs_patch4_224_mlp": 17_982_127,
    "spach_ms_s_patch4_224_mlp": 44_263_855,
}
NO_BYPASS = {
    "spach_ms_s_patch4_224_mlp": (46_435_771, 7.983e9),
    "spach_ms_s_patch4_224_attn": (39_457_864, 7.509e9),
}


def _counts(name, **kwargs):
    with torch.device("meta"):
        model, image = timm.create_model(name, **kwargs).eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    params, multiply_adds = COUNTS[name]
    assert _counts(name) == (params, pytest.approx(multiply_adds, rel=1e-3))


@pytest.mark.parametrize("name", SHARED)
def test_counts_with_shared_mixers(name):
    assert _counts(name, share_mixers=True) == (SHARED[name], pytest.approx(COUNTS[name][1], rel=1e-3))


@pytest.mark.parametrize("name", NO_BYPASS)
def test_counts_without_bypass(name):
    params, multiply_adds = NO_BYPASS[name]
    assert _counts(name, bypass=False) == (params, pytest.approx(multiply_adds, rel=1e-3))


def micro(name=MICRO[1], **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


def block(mixer):
    torch.manual_seed(0)
    return MixingBlock(
        12, (3, 5), mixer, num_heads=3, qkv_bias=True, token_ratio=0.5, mlp_ratio=2, bypass=True, drop_path=0.0
    ).double()


@pytest.mark.parametrize("mixer", ["conv", "attn", "mlp"])
def test_block_equals_its_formula(mixer):
    ours, x_BHWC = block(mixer), torch.randn(2, 3, 5, 12, dtype=torch.float64)
    x = x_BHWC.flatten(1, 2)
    if mixer != "conv":
        torch.nn.init.normal_(ours.gamma)

    def norm(x, layer):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * layer.weight + layer.bias

    def mlp(x, layers):
        hidden = x @ layers.fc1.weight.T + layers.fc1.bias
        return hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) @ layers.fc2.weight.T + layers.fc2.bias

    def attention(x, layers):
        q, k, v = (x @ layers.qkv.weight.T + layers.qkv.bias).split(12, dim=-1)
        heads = []
        for h in range(3):
            q_h, k_h, v_h = (t[..., 4 * h : 4 * h + 4] for t in (q, k, v))
            heads.append((q_h @ k_h.mT / 4**0.5).softmax(-1) @ v_h)
        return torch.cat(heads, -1) @ layers.proj.weight.T + layers.proj.bias

    def depthwise(x, layer):
        image = torch.zeros(2, 5, 7, 12, dtype=torch.float64)  # one pixel of zeros around
        image[:, 1:4, 1:6] = x.view(2, 3, 5, 12)
        moved = [image[:, i : i + 3, j : j + 5] * layer.weight[:, 0, i, j] for i in range(3) for j in range(3)]
        return sum(moved).reshape(2, 15, 12) + layer.bias

    u = x + depthwise(x, ours.bypass)
    if mixer == "attn":
        u = u + ours.gamma * attention(norm(x, ours.norm1), ours.mixer)
    if mixer == "mlp":
        u = u + ours.gamma * mlp(norm(x, ours.norm1).mT, ours.mixer).mT
    torch.testing.assert_close(ours(x_BHWC).flatten(1, 2), u + mlp(norm(u, ours.norm2), ours.mlp))


@pytest.mark.parametrize("name", MICRO)
def test_first_loss_and_gradients(name):
    model = micro(name, img_size=(64, 32), stem="conv4")
    target = torch.tensor([0, 1, 2])
    loss = torch.nn.functional.cross_entropy(model(torch.randn(3, 3, 64, 32)), target)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)  # the head starts at zero
    torch.nn.init.normal_(model.head.fc.weight)
    torch.nn.functional.cross_entropy(model(torch.randn(3, 3, 64, 32)), target).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, parameter_name


def test_initialisation():
    model = timm.create_model("spach_ms_xxs_patch4_224_attn")
    last = model.stages[3].blocks[-1]
    assert last.bypass.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.1)
    assert last.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (256 + 512)), rel=0.01)
    assert last.mlp.fc1.bias.abs().max() == 0 and (last.gamma == 1e-4).all() and last.gamma.shape == (1, 1, 256)


def test_shared_mixers_are_one_module():
    model = micro(share_mixers=True, stages=((("conv", 1),), (("attn", 2),), (("mlp", 3),)))
    for stage in list(model.stages)[1:]:
        assert len({id(block.mixer) for block in stage.blocks}) == 1
        assert len({id(block.gamma) for block in stage.blocks}) == len(stage.blocks)
    with pytest.raises(ValueError, match="can share a mixer"):
        micro(share_mixers=True, stages=((("conv", 1),), (("attn", 1), ("mlp", 1))))
    with pytest.raises(ValueError, match="can share a mixer"):
        micro(MICRO[0], share_mixers=True)


def test_drop_path():
    def rates(name):
        model = timm.create_model(name, drop_path_rate=0.1)
        return [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]

    assert rates("spach_xxs_patch16_224_attn") == [0.1] * 12
    assert rates("spach_ms_xxs_patch4_224_attn") == pytest.approx([0.1 * j / 11 for j in range(12)])


def test_another_image_size_is_one_clear_error():
    name = MICRO[2]
    for model in (micro(name), micro(name, features_only=True)):
        with pytest.raises(ValueError, match=r"48x32 .* built for 32x32.*img_size=\(48, 32\)"):
            model(torch.randn(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"img_size=\(24, 24\).* 32 or more"):
        micro(name, img_size=24)
    assert micro(name, img_size=44).eval()(torch.randn(1, 3, 44, 44)).shape == (1, 5)  # sides 11, 5, 2, 1


@pytest.mark.parametrize("name", MICRO)
def test_timm(name):
    x = torch.randn(2, 3, 32, 32)
    model = micro(name).eval()
    features = model.forward_features(x)
    assert features.shape == (2, 256, 1, 1) and model.forward_head(features, pre_logits=True).shape == (2, 256)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    assert micro(name, in_chans=1).eval()(x[:, :1]).shape == (2, 5)
    assert timm.create_model(name, num_classes=0).eval()(x).shape == (2, 256)

    pyramid = micro(name, features_only=True).eval()
    assert [tuple(m.shape) for m in pyramid(x)] == [(2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2), (2, 256, 1, 1)]
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    torch.testing.assert_close(model.norm(pyramid(x)[3]), features)

    groups = param_groups_layer_decay(micro(name, share_mixers=name != MICRO[0]), layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 1 + 5 + 1


def test_single_stage_has_the_maps_of_its_blocks():
    torch.manual_seed(0)
    whole, x = timm.create_model("spach_xxs_patch16_224_attn").eval(), torch.randn(1, 3, 48, 64)
    for wanted, count in ((None, 3), ((-1,), 1), ((0, 5, 11), 3)):
        kwargs = {"out_indices": wanted} if wanted else {}
        model = timm.create_model("spach_xxs_patch16_224_attn", features_only=True, **kwargs).eval()
        assert model.feature_info.channels() == [192] * count and model.feature_info.reduction() == [16] * count
        model.model.load_state_dict(whole.state_dict(), strict=False)
        maps = model(x)
        assert [tuple(m.shape) for m in maps] == [(1, 192, 3, 4)] * count
        torch.testing.assert_close(whole.norm(maps[-1]), whole.forward_features(x))


def test_released_files():
    files = {name: timm.get_pretrained_cfg(name).url.rsplit("/", 1)[-1] for name in VARIANTS}
    assert {file for file in files.values() if file} == {
        "spach_ms_conv_xxs.pth", "spach_ms_trans_xxs.pth", "spach_ms_mlp_xxs.pth", "spach_ms_conv_s.pth",
        "spach_ms_trans_s.pth", "spach_ms_mlp_s.pth", "spach_ms_hybrid_s.pth", "spach_ms_hybrid_s+.pth",
    }


@pytest.mark.parametrize("share", [False, True])
def test_gradient_checkpointing_changes_nothing(share):
    x, grads = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model = micro(share_mixers=share)
        model.set_grad_checkpointing(enable)
        model.forward_features(x).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", MICRO)
def test_compile_export_and_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = micro(name).eval(), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(model.head.fc.weight)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x), expected)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=1e-4, atol=1e-4)
