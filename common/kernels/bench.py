"""Times operators, blocks and networks beside their baselines: the authors' formulation, the best eager form of plain
PyTorch, torch.compile of that, ours.

    python -m common.kernels.bench                          the operators, on the GPU if there is one, else on the CPU
    python -m common.kernels.bench --only "in place"        cases whose name has these words
    python -m papers.shiftvit.bench                         blocks and whole networks

How it is timed: common/run/bench.py. Records lie in <operator>/records/.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import run
from common.kernels.shift import op as shift_op
from common.kernels.shift import reference as shift_reference
from common.kernels.sparse_mlp import op as sparse_mlp_op
from common.kernels.sparse_mlp import reference as sparse_mlp_reference
from common.run import bench
from common.run.bench import Case

AUTHORS, EAGER, COMPILED, OURS = "authors", "best eager", "torch.compile", "ours"
# What --compile gives: the sparse MLP's kernels where there are some, the shift decomposed.
OURS_COMPILED = "ours, torch.compile"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


# Operators --------------------------------------------------------------------------------------------------


def shift_by_slices(x: Tensor, n_div: int) -> Tensor:
    """The authors' formulation: zeros, then five slice copies."""
    g = x.size(1) // n_div
    out = torch.zeros_like(x)
    out[:, : 1 * g, :, :-1] = x[:, : 1 * g, :, 1:]
    out[:, 1 * g : 2 * g, :, 1:] = x[:, 1 * g : 2 * g, :, :-1]
    out[:, 2 * g : 3 * g, :-1] = x[:, 2 * g : 3 * g, 1:]
    out[:, 3 * g : 4 * g, 1:] = x[:, 3 * g : 4 * g, :-1]
    out[:, 4 * g :] = x[:, 4 * g :]
    return out


def shift_cases(device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """The four stages of ShiftViT-T at 224 pixels, n_div 12; in place also a map of one pixel, all of it overhead."""
    n_div = 12
    compiled = torch.compile(shift_reference.shift_by_padding, dynamic=False)
    compiled_add = torch.compile(lambda x, r: shift_reference.shift_by_padding(x + r, n_div), dynamic=False)
    ways = {
        AUTHORS: lambda x: shift_by_slices(x, n_div),
        EAGER: lambda x: shift_reference.shift_by_padding(x, n_div),
        COMPILED: lambda x: compiled(x, n_div),
        OURS: lambda x: shift_op.shift(x, n_div),
    }
    add_ways = {
        AUTHORS: lambda x, r: shift_by_slices(x + r, n_div),
        EAGER: lambda x, r: shift_reference.shift_by_padding(x + r, n_div),
        COMPILED: compiled_add,
        OURS: lambda x, r: shift_op.shift_add(x, r, n_div),
    }
    inference_ways = ways | {EAGER: lambda x: shift_reference.shift(x, n_div)}
    in_place_ways = ways | {
        EAGER: lambda x: shift_reference.shift_(x, n_div), OURS: lambda x: shift_op.shift_(x, n_div)
    }
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7), (12, 1)):
        for layout, memory_format in LAYOUTS.items() if side > 1 else [("NCHW", torch.contiguous_format)]:
            shape = (batch if side > 1 else 1, channels, side, side)
            x, r, gy = (_normal(shape, device, dtype, memory_format) for _ in range(3))
            label = f"{'x'.join(map(str, shape))} {layout}"
            size = x.numel() * x.element_size()

            if side > 1:
                trained = {name: partial(_train, way, gy) for name, way in ways.items()}
                yield Case(f"shift, training, {label}", trained, (x,), copied=x, bytes=4 * size)
                trained = {name: partial(_train, way, gy) for name, way in add_ways.items()}
                yield Case(f"shift_add, training, {label}", trained, (x, r), copied=x, bytes=5 * size)
                yield Case(f"shift, inference, {label}", inference_ways, (x,), copied=x, bytes=2 * size)
            # each has a copy of its own, shifted again and again while being timed
            in_place = {name: partial(way, x.clone()) for name, way in in_place_ways.items()}
            yield Case(f"shift in place, inference, {label}", in_place, copied=x, bytes=2 * size * 4 // n_div)


def _train(way: Callable[..., Tensor], gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = way(*leaves)
    return y, *torch.autograd.grad(y, leaves, gradient)


def mixing_by_permutation(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor, F_: Tensor) -> Tensor:
    """The authors' formulation: permute, 1x1 convolution, permute back; concatenate; 1x1 convolution."""
    row = F.conv2d(z.permute(0, 3, 1, 2), A[:, :, None, None], a).permute(0, 2, 3, 1)
    col = F.conv2d(z.permute(0, 2, 1, 3), D[:, :, None, None], d).permute(0, 2, 1, 3)
    return F.conv2d(torch.cat([z, row, col], dim=1), F_[:, :, None, None])


def sparse_mlp_cases(device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """The four stages of sMLPNet-T at 224 pixels."""
    ways = {
        AUTHORS: mixing_by_permutation,
        EAGER: sparse_mlp_reference.sparse_mlp,
        COMPILED: torch.compile(sparse_mlp_reference.sparse_mlp, dynamic=False),
        OURS: sparse_mlp_op.sparse_mlp,
    }
    if device == "cuda":  # without kernels it is COMPILED
        ways[OURS_COMPILED] = torch.compile(sparse_mlp_op.sparse_mlp, dynamic=False)
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    for channels, side in ((80, 56), (160, 28), (320, 14), (640, 7)):
        for layout, memory_format in LAYOUTS.items():
            z, gy = (_normal((batch, channels, side, side), device, dtype, memory_format) for _ in range(2))
            shapes = ((side, side), (side,), (side, side), (side,), (channels, 3 * channels))
            inputs = [z, *(torch.randn(s, device=device, dtype=dtype) / s[-1] ** 0.5 for s in shapes)]
            size = z.numel() * z.element_size()

            label = f"{batch}x{channels}x{side}x{side} {layout}"
            exact = partial(_widely, mixing_by_permutation, wide)
            trained = {name: partial(_train, way, gy) for name, way in ways.items()}
            # forward z and out, backward the gradient of out, z, the gradient of z
            yield Case(
                f"sparse_mlp, training, {label}", trained, tuple(inputs), copied=z, bytes=5 * size,
                exact=partial(_train, exact, gy.to(wide)),
            )
            yield Case(f"sparse_mlp, inference, {label}", ways, tuple(inputs), exact=exact, copied=z, bytes=2 * size)


def _widely(way: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    return way(*(t.to(dtype) for t in inputs))


def _normal(shape: tuple[int, ...], device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)


# Blocks and networks, for a paper's own benchmark -----------------------------------------------------------


def module_cases(
    name: str, forms: Mapping[str, nn.Module], shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Training step and inference of one module in several forms, both layouts.

    forms: AUTHORS, EAGER, OURS and any others, with the same weights; two rows more are torch.compile of EAGER and of
    OURS. Of ShiftViT the second is what compiled code sees of the operator too, pad, slice and cat.
    shape: of the input; with three channels it is an image, takes no gradient, and AdamW belongs to the training step
    (with a learning rate of 0, so that the rows stay comparable).
    dtype: of the computation, by autocast; weights are float32.
    """
    network = shape[1] == 3
    for layout, memory_format in LAYOUTS.items():
        x = _normal(shape, device, torch.float32, memory_format)
        for mode in ("training", "inference"):
            modules = {
                row: copy.deepcopy(form).to(device, memory_format=memory_format).train(mode == "training")
                for row, form in forms.items()
            }
            for row, form in ((COMPILED, EAGER), (OURS_COMPILED, OURS)):
                modules[row] = copy.deepcopy(modules[form])
                modules[row].compile(dynamic=False)
            wide = copy.deepcopy(modules[AUTHORS])
            ways = {row: _execution(m, x, dtype, mode, optimize=network) for row, m in modules.items()}
            exact = torch.float64 if dtype is torch.float32 else torch.float32
            exactly = _execution(wide.to(exact), x.to(exact), exact, mode, optimize=network)
            yield Case(f"{name}, {mode}, {'x'.join(map(str, shape))} {layout}", ways, exact=exactly)


def _execution(module: nn.Module, x: Tensor, dtype: torch.dtype, mode: str, optimize: bool) -> Callable[[], object]:
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2)
    if mode == "inference":

        def infer():
            with torch.inference_mode(), autocast:
                return module(x)

        return infer

    weights = list(module.parameters())
    gradient = None
    optimizer = (
        torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True, capturable=x.is_cuda) if optimize else None
    )
    x = x.detach().requires_grad_(not optimize)

    def train():
        nonlocal gradient
        module.zero_grad(set_to_none=True)
        x.grad = None
        with autocast:
            y = module(x)
        if gradient is None:
            gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y) / len(y)
        y.backward(gradient)
        if optimizer:
            optimizer.step()
        return y, *(t.grad for t in [x, *weights] if t.grad is not None)

    return train


RECORDS = {name: Path(__file__).parent / name / "records" for name in ("shift", "sparse_mlp")}

if __name__ == "__main__":
    subjects = {"shift": shift_cases, "sparse_mlp": sparse_mlp_cases}
    run.main(lambda: bench.main("common.kernels.bench", subjects, RECORDS, {"shift": 32, "sparse_mlp": 8}))
