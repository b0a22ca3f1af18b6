"""The sparse MLP against dense einsums in float64, the authors' numbers, and PyTorch's own checks of an operator.

A test with a `device` runs on the reference, on the kernels' PTX executed on the CPU, and on a GPU if there is one.
What no kernel takes is refused there, because nothing may fall back.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.kernels import cuda
from common.kernels.check.device import ORDERS
from common.kernels.sparse_mlp import op as OP
from common.kernels.sparse_mlp import sparse_mlp
from common.tests import parity

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# (B, C, H, W), C_out: square and not, odd, sides of 1, each padded size, channels that fill vectors and tiles or do
# not, more than one tile of channels, the largest side, one that is too large, an empty batch
SHAPES = [
    ((2, 10, 7, 5), 10),
    ((1, 16, 7, 7), 24),
    ((2, 40, 14, 13), 8),
    ((1, 72, 17, 28), 8),
    ((1, 8, 33, 64), 8),
    ((1, 8, 1, 5), 8),
    ((1, 8, 3, 65), 8),
    ((0, 8, 7, 7), 8),
]


def make(shape, C_out, dtype=torch.float64, layout=torch.contiguous_format, device="cpu"):
    """z and the five parameters, scaled so that every output is of order 1."""
    _, C, H, W = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    z = normal(*shape).contiguous(memory_format=layout)
    axes = [normal(W, W, scale=W**-0.5), normal(W), normal(H, H, scale=H**-0.5), normal(H)]
    return [z, *axes, normal(C_out, 3 * C, scale=(3 * C) ** -0.5)]


def oracle(z, A, a, D, d, F_):
    """One dense contraction per branch: A, D and F as matrices over whole images, no reshaping."""
    _, C, H, W = z.shape
    F_z, F_row, F_col = F_.split(C, dim=1)
    row = torch.einsum("jk,bcik->bcij", A, z) + a.view(1, 1, 1, W)
    col = torch.einsum("ik,bckj->bcij", D, z) + d.view(1, 1, H, 1)
    return sum(torch.einsum("oc,bcij->boij", f, t) for f, t in ((F_z, z), (F_row, row), (F_col, col)))


def close(got, want, dtype):
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=ROUNDING[dtype], atol=2 * ROUNDING[dtype])


def refused(z):
    """Whether there is no kernel for z where there has to be one; then the operator must say so."""
    kernel = z.dtype in OP.C_TYPES and z.size(1) % 8 == 0 and max(z.shape[2:]) <= 64
    if kernel or not cuda.required() or not z.numel():
        return False
    with pytest.raises(RuntimeError, match="KERNEL_BACKEND=cuda, but sparse_mlp has no kernel"):
        sparse_mlp(*make(z.shape, 8, z.dtype, device=z.device))
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape,C_out", SHAPES)
def test_values_and_gradients(shape, C_out, dtype, layout, device, poisoned):
    tensors = make(shape, C_out, dtype, layout, device)
    if refused(tensors[0]):
        return
    exact = [t.double().requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    got, want = sparse_mlp(*tensors), oracle(*exact)
    close(got, want, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=layout) or not got.numel()  # an empty tensor has no layout

    gy = torch.randn_like(got) / max(got.numel(), 1) ** 0.5  # gradients of the parameters are sums over all pixels
    for ours, theirs in zip(torch.autograd.grad(got, tensors, gy), torch.autograd.grad(want, exact, gy.double())):
        assert ours.dtype == dtype
        close(ours, theirs, dtype)


def authors(name, dtype=torch.float32, device="cpu"):
    """Their module is BatchNorm and GELU in front of the operator, which here computes in dtype: ours and theirs."""
    parity.check_stream()
    meta, want = parity.ops(FIXTURES)[name], parity.op_arrays(FIXTURES, name)
    x = parity.op_input(meta).requires_grad_()
    p = {k: v.requires_grad_(v.is_floating_point()) for k, v in parity.state_dict(meta).items()}
    mean, var = (p[f"BN.running_{k}"].detach() for k in ("mean", "var"))
    z = F.gelu(F.batch_norm(x, mean, var, p["BN.weight"], p["BN.bias"], training=meta["mode"] == "train"))
    matrices = {k: p[f"{k}.weight"].flatten(1) for k in ("proj_h", "proh_w", "fuse")}
    inputs = z, matrices["proj_h"], p["proj_h.bias"], matrices["proh_w"], p["proh_w.bias"], matrices["fuse"]
    y = sparse_mlp(*(t.to(device, dtype) for t in inputs))
    y.backward(parity.op_input(meta, "gy").to(y))
    ours = {"y": y.detach().float().cpu(), "gx": x.grad} | {f"grad/{k}": t.grad for k, t in p.items()}
    return {k: (ours[k], torch.from_numpy(want[k])) for k in want if k in ours}


@pytest.mark.parametrize("name", ["smlp_eval", "smlp_train", "eps_smlp_train"])
def test_authors_numbers(name):
    for key, (ours, theirs) in authors(name).items():
        parity.assert_close(ours, theirs.numpy(), f"{name} {key}")


@pytest.mark.parametrize("dtype", OP.C_TYPES)
def test_authors_numbers_by_the_kernels(dtype, device):
    """Eight channels is what a kernel takes; everything is rounded to 16 bits."""
    for key, (ours, theirs) in authors("eps_smlp_train", dtype, device).items():
        assert (ours - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm(), key


def test_first_and_second_derivatives():
    """Of the two registered operators, in both layouts."""
    for layout in LAYOUTS:
        z, A, a, D, d, _ = (t.requires_grad_() for t in make((2, 2, 2, 3), 2, layout=layout))
        g = torch.randn(2, 6, 2, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        for operator, inputs in ((OP._mix, (z, A, a, D, d)), (OP._backward, (g, z, A, D))):
            assert torch.autograd.gradcheck(operator, inputs)
            assert torch.autograd.gradgradcheck(operator, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, device):
    dtype = torch.bfloat16 if cuda.required() else torch.float32
    z, A, a, D, d, _ = make((2, 8, 3, 5), 8, dtype, layout, device)
    g = z.repeat(1, 3, 1, 1).contiguous(memory_format=layout)
    for op, args in (("axial_mix", (z, A, a, D, d)), ("axial_backward", (g, z, A, D))):
        torch.library.opcheck(getattr(torch.ops.kernels, op).default, tuple(t.clone().requires_grad_() for t in args))


@pytest.mark.parametrize("dtype", OP.C_TYPES)
@pytest.mark.parametrize("shape", [(2, 40, 12, 14), (1, 8, 40, 50)])
def test_the_order_of_threads_does_not_matter(shape, dtype, ptx):
    z, A, a, D, d, _ = make(shape, 8, dtype, torch.channels_last)
    results = []
    for ptx.order in ORDERS:
        u = OP._mix(z, A, a, D, d)
        results.append((u, *OP._backward(u, u[:, : z.size(1)], A, D)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


class Net(torch.nn.Module):
    def __init__(self, device="cpu", dtype=torch.float32):
        super().__init__()
        _, *parameters = map(torch.nn.Parameter, make((1, 8, 6, 5), 8, dtype, device=device))
        self.A, self.a, self.D, self.d, self.F = parameters

    def forward(self, x):
        return sparse_mlp(F.gelu(x), self.A, self.a, self.D, self.d, self.F)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_into_one_graph(layout, dtype, device):
    net = Net(device, dtype)
    x = make((2, 8, 6, 5), 8, dtype, layout, device)[0].requires_grad_()
    if refused(x):
        return
    want, got = net(x), torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    close(got, want, dtype)
    inputs = [x, *net.parameters()]
    gy = torch.randn_like(want) / want.numel() ** 0.5
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, gy) for y in (got, want))):
        close(ours, theirs, dtype)


def test_autocast(device):
    net, x = Net(device), make((2, 8, 6, 5), 8, torch.float32, device=device)[0]
    with torch.autocast(device, torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    close(y, OP.reference.sparse_mlp(F.gelu(x), *net.parameters()), torch.bfloat16)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_plain_aten(layout):
    net, x = Net(), make((2, 8, 6, 5), 8, torch.float32, layout)[0]
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not [n for n in program.graph.nodes if "kernels" in str(n.target)]
    more = x.repeat(2, 1, 1, 1).contiguous(memory_format=layout)
    torch.testing.assert_close(program.module()(more), net(more))


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    net, x = Net().eval(), make((2, 8, 6, 5), 8, torch.float32)[0]
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=(batch,), verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for example in (x, x[:1]):
        (got,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), net(example))


@pytest.mark.parametrize(
    "index,name", enumerate(["row_weight", "row_bias", "col_weight", "col_bias", "fuse_weight"], 1)
)
def test_bad_inputs(index, name):
    tensors = make((2, 8, 6, 5), 8)
    tensors[index] = tensors[index][..., :-1]
    with pytest.raises(ValueError, match=f"{name} must be"):
        sparse_mlp(*tensors)
    with pytest.raises(ValueError, match="3 axes"):
        sparse_mlp(tensors[0][0], *tensors[1:])


def test_every_kernel_was_executed(checker):
    """The tests above have sent every instantiation through the launch code."""
    assert set(checker.launched) == set(OP.KERNELS)


@pytest.mark.parametrize("form", [sparse_mlp, lambda z, A, a, D, d, F_: OP.reference.fuse(OP._mix(z, A, a, D, d), F_)])
def test_the_flop_counter_sees_every_product(form):
    B, C, H, W = 2, 8, 6, 5
    z, A, D = torch.randn(B, C, H, W, requires_grad=True), torch.randn(W, W), torch.randn(H, H)
    with FlopCounterMode(display=False) as counter:
        out = form(z, A.requires_grad_(), A[0], D.requires_grad_(), D[0], torch.randn(C, 3 * C))
    forward = 2 * B * C * H * W * (H + W + 3 * C)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()  # the fusion's weight needs no gradient
    assert counter.get_total_flops() == 2 * forward - 2 * B * C * H * W * 3 * C
