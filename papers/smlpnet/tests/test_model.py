"""sMLPNet's figures from the paper, its mathematics, and what timm, torch.compile and ONNX expect of it."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

from papers.smlpnet.model import MIXINGS, VARIANTS, SparseMLP, UnsharedSparseMLP, sparse_mlp

# Parameters and multiply-adds at 224 with 1000 classes, counted on the authors' code.
COUNTS = {
    "smlpnet_tiny": (24_123_584, 4.989e9),
    "smlpnet_small": (48_558_136, 10.312e9),
    "smlpnet_base": (65_880_408, 13.987e9),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    params, multiply_adds = COUNTS[name]
    with torch.device("meta"):
        model, image = timm.create_model(name).eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert sum(p.numel() for p in model.parameters()) == params
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=1e-3)


def micro(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("smlpnet_micro", num_classes=5, **kwargs)


def test_sparse_mlp_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    B, C, H, W, C_out = 2, 3, 5, 7, 4
    shapes = (B, C, H, W), (W, W), (W,), (H, H), (H,), (C_out, 3 * C)
    z, A, a, D, d, fuse = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    expected = torch.zeros(B, C_out, H, W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            row = sum(A[j, k] * z[:, :, i, k] for k in range(W)) + a[j]
            col = sum(D[i, k] * z[:, :, k, j] for k in range(H)) + d[i]
            expected[:, :, i, j] = torch.cat([z[:, :, i, j], row, col], 1) @ fuse.T
    torch.testing.assert_close(sparse_mlp(z, A, a, D, d, fuse), expected)


def test_unshared_mixing_with_equal_matrices_is_the_shared_one():
    shared, unshared = SparseMLP(4, 5, 7).eval(), UnsharedSparseMLP(4, 5, 7).eval()
    row, col = shared.mix_row, shared.mix_col
    unshared.load_state_dict({
        **{name: tensor for name, tensor in shared.state_dict().items() if not name.startswith("mix")},
        "row_weight": row.weight.expand(5, 7, 7), "row_bias": row.bias.expand(5, 7),
        "col_weight": col.weight.expand(7, 5, 5), "col_bias": col.bias.expand(7, 5),
    })
    x = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(unshared(x), shared(x))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_parameter_gets_a_gradient(mixing):
    model = micro(mixing=mixing, img_size=(64, 32))
    loss = torch.nn.functional.cross_entropy(model(torch.randn(3, 3, 64, 32)), torch.tensor([0, 1, 2]))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_another_image_size_is_one_clear_error():
    for model in (micro(), micro(features_only=True)):
        with pytest.raises(ValueError, match=r"48x32 .* built for 32x32.*img_size=\(48, 32\)"):
            model(torch.randn(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"img_size=\(30, 30\).*multiples of 4"):
        micro(img_size=30)
    model = micro(img_size=36)  # sides 9, 4, 2, 1: rounded down
    assert [stage.blocks[0].smlp.mix_row.weight.shape[0] for stage in model.stages] == [9, 4, 2, 1]
    assert model.eval()(torch.randn(1, 3, 36, 36)).shape == (1, 5)


def test_drop_path_grows_over_all_blocks():
    model = timm.create_model("smlpnet_small")
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * j / 37 for j in range(38)])


def test_timm():
    x = torch.randn(2, 3, 32, 32)
    model = micro().eval()
    features = model.forward_features(x)
    assert features.shape == (2, 256, 1, 1) and model.forward_head(features, pre_logits=True).shape == (2, 256)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    assert micro(in_chans=1).eval()(x[:, :1]).shape == (2, 5)
    assert timm.create_model("smlpnet_micro", num_classes=0).eval()(x).shape == (2, 256)

    pyramid = micro(features_only=True).eval()
    assert [tuple(m.shape) for m in pyramid(x)] == [(2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2), (2, 256, 1, 1)]
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    torch.testing.assert_close(model.norm(pyramid(x)[3]), features)

    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in groups}) == 1 + sum(VARIANTS["smlpnet_micro"][2]) + 1
    assert timm.get_pretrained_cfg("smlpnet_base").url.endswith("/v1.0/smlp_b.pth")


def test_gradient_checkpointing_changes_nothing():
    x, grads = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model = micro().eval()
        model.set_grad_checkpointing(enable)
        model(x).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_compile_export_and_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = micro().eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x), expected)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=1e-4, atol=1e-4)
