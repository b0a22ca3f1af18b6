"""What compiled, exported, traced and transformed code sees of the operators, and that it computes the same.

shift: pad, slice and cat, which Inductor makes part of the passes before and after. sparse_mlp: the kernels, where
there are some, because they need fewer passes than what Inductor makes of matrix products. Nothing that is recorded to
run elsewhere holds an operator of this project.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

from common.kernels.check.device import Device
from common.kernels.shift import op as shift_op
from common.kernels.shift import shift, shift_, shift_add
from common.kernels.sparse_mlp import op as OP
from common.kernels.sparse_mlp import sparse_mlp

from .conftest import GXX

SHIFTS = {
    "shift": lambda x: shift(x, 4),
    "shift_add": lambda x: shift_add(x, 2 * x, 4),
    "shift_": lambda x: shift_(x * 2, 4),
}


def image(dtype=torch.float32, **options):
    return torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(**options)


def mixing(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 8, 6, 5), (5, 5), (5,), (6, 6), (6,), (8, 24)
    return [torch.randn(s, generator=generator).div(s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]


def operators(function, *inputs):
    """Of this project, in the graphs of the forward and the backward pass; and that both compute what eager does."""
    graphs = []

    def compiler(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes if "kernels" in str(node.target)])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    want, got = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    if want.requires_grad:
        leaves = [t for t in inputs if t.requires_grad]
        gradients = (torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (got, want))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    return graphs


@pytest.mark.parametrize("kernels", [False, True], ids=["cpu", "kernels"])
@pytest.mark.parametrize("name", SHIFTS)
def test_compiled_code_sees_the_shift_decomposed(name, kernels, monkeypatch):
    monkeypatch.setattr(shift_op.cuda, "wanted", lambda device: kernels)
    monkeypatch.setattr(shift_op.cuda, "load", lambda *args: None)
    x = image(requires_grad=name != "shift_")
    assert operators(SHIFTS[name], x) == ([[], []] if x.requires_grad else [[]])


@pytest.mark.parametrize("name", ["shift", "shift_add"])
def test_who_names_the_backend_gets_the_operator_compiled_too(name, monkeypatch):
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    monkeypatch.setattr(shift_op.cuda, "wanted", lambda device: True)
    monkeypatch.setattr(shift_op.cuda, "load", lambda *args: None)
    forward = {"shift": "kernels.shift.default", "shift_add": "kernels.shift_add.default"}[name]
    assert operators(SHIFTS[name], image()) == [[forward], ["kernels.shift.default"]]


@GXX
def test_compiled_code_sees_the_axial_kernels(monkeypatch):
    pytest.importorskip("cuda.bindings", reason="needs cuda-core")
    monkeypatch.setenv("KERNEL_BACKEND", "cuda")
    names = {"axial_mix<__nv_bfloat16, 16>", "axial_backward<__nv_bfloat16, 16>"}
    with Device(sorted(names)).plugged_in() as ptx:
        see_the_axial_kernels()
        assert set(ptx.launched) == names


def see_the_axial_kernels():
    assert operators(sparse_mlp, *mixing()) == [["kernels.axial_mix.default"], ["kernels.axial_backward.default"]]

    def autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return sparse_mlp(*inputs)

    forward, backward = operators(autocast, *mixing(torch.float32))
    assert forward == ["kernels.axial_mix.default"] and backward == ["kernels.axial_backward.default"]


def test_compiled_code_on_a_cpu_sees_matrix_products():
    assert operators(sparse_mlp, *mixing()) == [[], []]


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [*SHIFTS, "sparse_mlp"])
def test_exported_programs_are_plain(name, strict, monkeypatch):
    """On a device with kernels as well."""
    monkeypatch.setattr(shift_op.cuda, "wanted", lambda device: True)
    monkeypatch.setattr(shift_op.cuda, "load", lambda *args: None)
    function, inputs = (sparse_mlp, mixing()) if name == "sparse_mlp" else (SHIFTS[name], [image(requires_grad=False)])
    program = torch.export.export(Module(function), tuple(t.detach() for t in inputs), strict=strict)
    assert not [n for n in program.graph.nodes if "kernels" in str(n.target)]
    traced = torch.jit.trace(function, tuple(t.detach() for t in inputs), check_trace=False)
    assert "kernels::" not in str(traced.graph)
    want = function(*(t.detach() for t in inputs)) if name != "sparse_mlp" else OP.reference.sparse_mlp(*inputs)
    for got in (program.module()(*(t.detach() for t in inputs)), traced(*(t.detach() for t in inputs))):
        torch.testing.assert_close(got, want)


def test_function_transforms():
    """torch.func has no way through a registered operator's gradient; it gets plain operators."""
    x = image(requires_grad=False)
    for function in (SHIFTS["shift"], SHIFTS["shift_add"]):
        want = make_gradient(function, x)
        assert torch.equal(torch.func.grad(lambda t, f=function: f(t).square().sum())(x), want)
        per_image = torch.func.vmap(torch.func.grad(lambda t, f=function: f(t[None]).square().sum()))(x)
        assert torch.equal(per_image, want)
        assert torch.equal(torch.func.jvp(function, (x,), (x,))[1], function(x))
    graph = make_fx(torch.func.grad(lambda t: shift(t, 4).sum()))(x)
    assert "kernels" not in str(graph.graph)
    inputs = [t.detach().float() for t in mixing()]
    gradient = torch.func.grad(lambda z: sparse_mlp(z, *inputs[1:]).square().sum())(inputs[0])
    torch.testing.assert_close(gradient, make_gradient(lambda z: sparse_mlp(z, *inputs[1:]), inputs[0]))


def make_gradient(function, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x)
    return gradient
