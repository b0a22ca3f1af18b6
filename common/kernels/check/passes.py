"""Passes over memory of a block's training step in eager mode, counted operator by operator without running anything.

A pass is the bytes of one bf16 map of the block, read or written: a convolution of bf16 maps reads one and writes one,
an addition of float32 maps reads four and writes two. Views and allocations are free; caches are not thought of. Fake
tensors go through the module, channels last, under autocast with the two rules of CUDA's that matter here: matrix
products in bf16, norms over channels in float32. What it leaves out: on CUDA group_norm copies a map with channels last
into the other layout first, which adds four passes forward and as many backward.
"""

import collections
import contextlib
import importlib
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.kernels import cuda


class Passes(TorchDispatchMode):
    def __init__(self, unit: int):
        super().__init__()
        self.unit = unit
        self.by_operator = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name()
        if not function.is_view and not name.startswith(("aten::empty", "aten::detach", "aten::new_empty", "prim::")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.by_operator[name] += sum(t.numel() * t.element_size() for t in tensors) / self.unit
        return out

    @property
    def total(self) -> float:
        return sum(self.by_operator.values())


@contextlib.contextmanager
def autocast_as_on_a_gpu():
    def wide(norm):
        def in_float(x, *args, **kwargs):
            with torch.autocast("cpu", enabled=False):
                return norm(x.float(), *args, **kwargs)

        return in_float

    norms = {name: wide(getattr(F, name)) for name in ("layer_norm", "group_norm")}
    with mock.patch.multiple(F, **norms), torch.autocast("cpu", torch.bfloat16):
        yield


def count(block: nn.Module, shape: tuple[int, ...], kernels: bool) -> tuple[Passes, Passes]:
    """Of the forward and the backward pass. kernels: as on a device with kernels, or all by the reference."""
    unit = 2 * torch.Size(shape).numel()
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(cuda, "wanted", lambda device: kernels):
        tensors = dict(block.named_parameters()) | dict(block.named_buffers())
        state = {k: torch.empty_like(t).requires_grad_(t.requires_grad) for k, t in tensors.items()}
        x = torch.empty(shape).to(memory_format=torch.channels_last).requires_grad_()
        with autocast_as_on_a_gpu(), Passes(unit) as forward:
            y = torch.func.functional_call(block, state, (x,))
        gy = torch.empty_like(y)
        with Passes(unit) as backward:
            torch.autograd.grad(y, [x, *(t for t in state.values() if t.requires_grad)], gy)
    return forward, backward


def report(name: str, batch: int = 128) -> None:
    """name: module and model, "papers.smlpnet:smlpnet_tiny". Its stages' first blocks, at 224 pixels."""
    package, model = name.split(":")
    importlib.import_module(package)
    net = timm.create_model(model, drop_path_rate=0.0)
    for s, stage in enumerate(net.stages):
        channels, side = net.feature_info[s]["num_chs"], 224 // net.feature_info[s]["reduction"]
        for kernels in (True, False):
            forward, backward = count(stage.blocks[0], (batch, channels, side, side), kernels)
            print(
                f"stage {s + 1}, {'kernels' if kernels else 'reference'}: "
                f"forward {forward.total:.1f}, backward {backward.total:.1f} passes"
            )
            if s == 0:
                for part, label in ((forward, "forward"), (backward, "backward")):
                    listed = ", ".join(f"{name} {passes:.1f}" for name, passes in part.by_operator.most_common(9))
                    print(f"    {label}: {listed}")
