"""The shift against a one-hot depthwise convolution, the authors' numbers, and PyTorch's own checks of an operator.

A test with a `device` runs on the reference, on the kernels' PTX executed on the CPU, and on a GPU if there is one.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from common.kernels.check.device import ORDERS
from common.kernels.shift import op as OP
from common.kernels.shift import reference, shift, shift_, shift_add
from common.tests import parity

FIXTURES = Path(__file__).parent / "fixtures"
PARITY = [op for op in parity.ops(FIXTURES).values() if op["op"] == "shift"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# (B, C, H, W), n_div: odd sides, sides of 1, groups that do not divide, fewer channels than groups, fewer than
# four groups, whole 16-byte vectors of channels, an empty batch, an empty side
SHAPES = [
    ((2, 13, 5, 7), 5),
    ((1, 12, 1, 33), 12),
    ((3, 10, 7, 1), 12),
    ((1, 11, 3, 3), 2),
    ((1, 12, 4, 6), 3),
    ((1, 5, 4, 4), 1),
    ((2, 96, 6, 8), 12),
    ((1, 128, 3, 4), 16),
    ((0, 24, 5, 5), 12),
    ((2, 24, 0, 5), 12),
]
STEPS = [1, 0, -1, 2, -2, 7, -40]  # 40 is larger than any side above


def oracle(x, n_div, step):
    """A depthwise convolution whose kernel has a single 1 per channel; exact, nothing is rounded."""
    if x.numel() == 0:
        return x
    channels, g = x.size(1), x.size(1) // n_div
    step = max(-max(x.shape[2:]), min(step, max(x.shape[2:])))
    r = abs(step)
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = torch.zeros(channels, 1, 2 * r + 1, 2 * r + 1, dtype=exact)
    for c in range(channels):
        moves = [(0, step), (0, -step), (step, 0), (-step, 0)]
        di, dj = moves[c // g] if g and c // g < 4 else (0, 0)
        weight[c, 0, r + di, r + dj] = 1
    return F.conv2d(x.to("cpu", exact), weight, padding=r, groups=channels).to(x)


def make(shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).contiguous(memory_format=layout)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,n_div", SHAPES)
def test_equals_one_hot_convolution(shape, n_div, dtype, layout, device, poisoned):
    x, residual = (make(shape, dtype, layout, device, seed) for seed in (0, 1))
    for step in STEPS:
        want = oracle(x, n_div, step)
        got = shift(x, n_div, step)
        same(got, want)
        assert got.stride() == x.stride()
        same(reference.shift_by_padding(x, n_div, step), want)
        same(shift_add(x, residual, n_div, step), oracle(x + residual, n_div, step))
        y = x.clone()
        assert shift_(y, n_div, step) is y
        same(y, want)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)),
    n_div=st.integers(1, 24),
    step=st.integers(-8, 8),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(shape, n_div, step, dtype, layout, device):
    x = make(shape, dtype, layout, device)
    want = oracle(x, n_div, step)
    same(shift(x, n_div, step), want)
    same(shift_(x, n_div, step), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, device):
    base = make((4, 26, 9, 14), dtype, device=device)
    views = [
        base.transpose(2, 3),
        base[::2, 1::2, 1:, ::3],
        base[:, :1].expand(4, 26, 9, 14),
        base.permute(0, 3, 2, 1),
        base[:, 1:],  # not on a 16-byte boundary
        base.contiguous(memory_format=torch.channels_last)[:, :24],
    ]
    for x in views:
        want = oracle(x, 6, 1)
        same(shift(x, 6), want)
        same(shift_add(x, x.contiguous(), 6), oracle(x + x, 6, 1))
        same(shift_add(x.contiguous(), x, 6), oracle(x + x, 6, 1))
    for x in (views[0], views[1], views[4], views[5]):
        want = oracle(x, 6, 1)
        before = base.clone()
        same(shift_(x, 6), want)
        x.copy_(torch.zeros_like(x))
        outside = base != 0
        same(base[outside], before[outside])  # nothing but the view was written
        base.copy_(before)


@pytest.mark.parametrize("meta", PARITY, ids=lambda meta: meta["name"])
def test_authors_numbers(meta, device):
    parity.check_stream()
    x = parity.op_input(meta).to(device).requires_grad_()
    y = shift(x, **meta["args"])
    y.backward(parity.op_input(meta, "gy").to(device))
    want = parity.op_arrays(FIXTURES, meta["name"])
    same(y.detach().cpu(), torch.from_numpy(want["y"]))
    same(x.grad.cpu(), torch.from_numpy(want["gx"]))


@pytest.mark.parametrize("step", [1, -2, 0, 5])
def test_gradients(step, device):
    x, residual = (make((2, 11, 3, 2), torch.float64, device=device, seed=s).requires_grad_() for s in (0, 1))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a: shift(a, 5, step), x)
        assert check(lambda a, b: shift_add(a, b, 5, step), (x, residual))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,n_div", [((2, 48, 40, 24), 6), ((1, 20, 61, 47), 4), ((1, 8, 1, 4500), 2)])
def test_in_place_over_several_chunks(shape, n_div, layout, ptx):
    for dtype in (torch.float32, torch.bfloat16):
        x = make(shape, dtype, layout)
        for step in (1, -30):
            want = reference.shift(x, n_div, step)
            for ptx.order in ORDERS:
                same(shift_(x.clone(), n_div, step), want)


@pytest.mark.parametrize(
    "group, word", [(1, "unsigned short"), (2, "unsigned int"), (4, "unsigned long long"), (8, "uint4")]
)
def test_in_place_moves_the_widest_words_that_fit(group, word, ptx):
    x = make((2, 6 * group, 5, 3), torch.bfloat16, torch.channels_last)
    before = ptx.launched.get(f"in_place<{word}>", 0)
    same(shift_(x.clone(), 6), oracle(x, 6, 1))
    assert ptx.launched[f"in_place<{word}>"] == before + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_tensor_takes_several_launches(layout, ptx, monkeypatch):
    x, residual = (make((20, 16, 4, 4), torch.bfloat16, layout, seed=s) for s in (0, 1))
    monkeypatch.setattr(OP, "LARGEST_LAUNCH", 9 * 16 * 4 * 4)
    before = sum(ptx.launched.values())
    same(shift(x, 4), oracle(x, 4, 1))
    same(shift_add(x, residual, 4), oracle(x + residual, 4, 1))
    assert sum(ptx.launched.values()) == before + 2 * 3  # eight images each, so that they begin on 16-byte addresses


def test_gradients_are_separate_tensors():
    x, residual = make((1, 8, 3, 3)).requires_grad_(), make((1, 8, 3, 3), seed=1).requires_grad_()
    shift_add(x, residual, 4).sum().backward()  # sum sends an expanded gradient
    same(x.grad, oracle(torch.ones(1, 8, 3, 3), 4, -1))
    x.grad.zero_()
    assert residual.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("a,b", itertools.permutations(DTYPES, 2))
def test_shift_add_promotes_as_addition_does(a, b, layout, device):
    x, residual = make((2, 16, 5, 5), a, layout, device), make((2, 16, 5, 5), b, layout, device, seed=1)
    x.requires_grad_(), residual.requires_grad_()
    got = shift_add(x, residual, 4)
    same(got, oracle(x + residual, 4, 1))
    same(shift_add(x[..., :3], residual[..., :3], 4), oracle((x + residual)[..., :3], 4, 1))
    got.sum().backward()
    assert (x.grad.dtype, residual.grad.dtype) == (a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, device):
    x, residual = (make((2, 12, 5, 4), layout=layout, device=device, seed=s).requires_grad_() for s in (0, 1))
    torch.library.opcheck(torch.ops.kernels.shift.default, (x, 12, 1))
    torch.library.opcheck(torch.ops.kernels.shift_add.default, (x, residual, 12, 1))
    torch.library.opcheck(torch.ops.kernels.shift_inplace.default, (x.detach(), 12, 1))


class Net(torch.nn.Module):
    """A convolution between two shifts, as in the network."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(12, 12, 1)

    def forward(self, x):
        x = shift(x, 5)
        return shift_add(x, self.conv(x), 5, step=2)


def test_compiles_into_one_graph(device):
    torch.manual_seed(0)
    net, x = Net().to(device), make((2, 12, 6, 5), device=device).requires_grad_()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    want, got = net(x), compiled(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))

    in_place = torch.compile(lambda a: shift_(a * 2, 5), fullgraph=True, backend="aot_eager")
    same(in_place(x.detach()), oracle(x.detach() * 2, 5, 1))


def test_autocast(device):
    net, x = Net().to(device), make((2, 12, 6, 5), device=device)
    with torch.autocast(device, torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.float32  # float32 stream plus bfloat16 branch
    torch.testing.assert_close(y, net(x), rtol=0.02, atol=0.02)


def test_export_is_plain_aten():
    net, x = Net(), make((2, 12, 6, 5))
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
    assert not [n for n in program.graph.nodes if "kernels" in str(n.target)]
    other = make((3, 12, 1, 9), seed=2)
    torch.testing.assert_close(program.module()(other), net(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("n_div", [5, 20])
def test_onnx(tmp_path, n_div):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")

    class Twice(torch.nn.Module):
        def forward(self, x):
            return shift_add(shift(x, n_div), x, n_div, step=2)

    net, x = Twice().eval(), make((2, 12, 6, 5))
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    program.save(tmp_path / "shift.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "shift.onnx", providers=["CPUExecutionProvider"])
    for example in (x, make((1, 12, 1, 9), seed=2)):
        (got,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
        same(torch.from_numpy(got), net(example))


def test_flop_counter_sees_the_convolutions_only():
    net, x = Net(), make((2, 12, 6, 5))
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() == 2 * 12 * 12 * 2 * 6 * 5


def test_bad_inputs():
    x = make((2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\).*3 axes"):
        shift(x[0], 4)
    with pytest.raises(ValueError, match="n_div=0"):
        shift(x, 0)
    with pytest.raises(ValueError, match="one shape"):
        shift_add(x, x[:1], 4)
    with pytest.raises(RuntimeError, match="requires grad"):
        shift_(x.requires_grad_(), 4)
    with torch.no_grad():
        shift_(x, 4)


def test_every_kernel_was_executed(checker):
    """Last: the tests above have sent every instantiation through the launch code."""
    assert set(checker.launched) == set(OP.KERNELS)
