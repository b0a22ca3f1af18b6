"""What the kernels have to compute, over shapes that reach every instantiation and every path through it."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from common.kernels.shift import op as shift_op
from common.kernels.sparse_mlp import op as sparse_mlp_op

from .device import ORDERS, Device

LAYOUTS = (torch.contiguous_format, torch.channels_last)

# (B, C, H, W), n_div: odd sides, sides of 1, groups that do not divide, fewer than four groups, vectors that end in
# another row, plane, group or image, whole vectors of channels, planes of several chunks
SHIFT_SHAPES = [
    ((2, 13, 5, 7), 5), ((1, 12, 1, 33), 12), ((3, 10, 7, 1), 12), ((1, 12, 4, 6), 3), ((1, 5, 4, 4), 1),
    ((2, 96, 6, 8), 12), ((2, 32, 7, 7), 4), ((2, 16, 14, 14), 4), ((1, 128, 3, 4), 16), ((1, 24, 1, 1), 3),
    ((1, 8, 64, 80), 4),
]
STEPS = (1, -1, 3, -7, 40)

# (B, C, H, W): every padded side, sides of 1, the largest, channels that fill vectors and tiles or do not, items of
# several blocks
SPARSE_MLP_SHAPES = [
    (1, 16, 7, 7), (2, 40, 14, 13), (1, 72, 17, 28), (1, 8, 33, 64), (1, 8, 1, 5), (1, 8, 64, 1), (3, 8, 16, 16),
]


def shift_oracle(x: Tensor, n_div: int, step: int) -> Tensor:
    """The formula of shift.cu by index: out[n, c, i, j] = x[n, c, i + di(c), j + dj(c)], or 0 outside the image."""
    _, C, H, W = x.shape
    group = C // n_div
    out = x.clone()
    for k, (di, dj) in enumerate([(0, step), (0, -step), (step, 0), (-step, 0)] if group else []):
        part = slice(k * group, (k + 1) * group)
        i, j = torch.arange(H)[:, None] + di, torch.arange(W)[None] + dj
        inside = (i >= 0) & (i < H) & (j >= 0) & (j < W)
        out[:, part] = torch.where(inside, x[:, part, i.clamp(0, H - 1), j.clamp(0, W - 1)], 0)
    return out


def _normal(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=layout)


def shift(device: Device, shapes=SHIFT_SHAPES, steps=STEPS, pairs=tuple(shift_op.ADDS), orders=ORDERS) -> list[str]:
    """Runs shift, shift_add and shift_; the cases that did not give the oracle's bits."""
    wrong = []
    for (shape, n_div), layout, step, (dtype, other) in itertools.product(shapes, LAYOUTS, steps, pairs):
        x, r = _normal(shape, dtype, layout, 0), _normal(shape, other, layout, 1)
        views = [(x, r), (x[..., 1:], r[..., 1:])]  # dense, and of any strides
        if layout is torch.contiguous_format and shape[0] > 1:
            views.append((x[1:], r[1:]))  # not on a 16-byte boundary, when an image is not whole vectors
        for x, r in views:
            moved, sums = shift_oracle(x, n_div, step), shift_oracle(x + r, n_div, step)
            for device.order in orders:
                results = {
                    "shift": (shift_op.shift(x, n_div, step), moved),
                    "shift_add": (shift_op.shift_add(x, r, n_div, step), sums),
                    "shift_": (shift_op.shift_(x.clone(memory_format=torch.preserve_format), n_div, step), moved),
                }
                case = f"{tuple(x.shape)} n_div {n_div} step {step} {dtype} {other} {layout} order {device.order}"
                wrong += [f"{name} {case}" for name, (got, want) in results.items() if not torch.equal(got, want)]
    return wrong


def sparse_mlp(
    device: Device, shapes=SPARSE_MLP_SHAPES, dtypes=tuple(sparse_mlp_op.C_TYPES), orders=ORDERS
) -> list[str]:
    """Runs the axial kernels; the cases farther from float64 einsums than the roundings that README.md counts."""
    wrong = []
    for shape, dtype in itertools.product(shapes, dtypes):
        B, C, H, W = shape
        z = _normal(shape, dtype, torch.channels_last, 0)
        sizes = enumerate([(W, W), (W,), (H, H), (H,)], 1)
        A, a, D, d = (_normal(size, dtype, torch.contiguous_format, k) / size[-1] ** 0.5 for k, size in sizes)
        g = _normal((B, 3 * C, H, W), dtype, torch.channels_last, 5)
        Z, wide_A, wide_a, wide_D, wide_d, G = (t.double() for t in (z, A, a, D, d, g))
        g_z, g_row, g_col = G.chunk(3, 1)
        row = torch.einsum("jk,bcik->bcij", wide_A, Z) + wide_a
        col = torch.einsum("ik,bckj->bcij", wide_D, Z) + wide_d[:, None]
        first = g_z + torch.einsum("jk,bcij->bcik", wide_A, g_row)  # rounded once before the height is added
        dz = first + torch.einsum("ik,bcij->bckj", wide_D, g_col)
        dA, dD = torch.einsum("bcij,bcik->jk", g_row, Z), torch.einsum("bcij,bckj->ik", g_col, Z)
        parameters = torch.cat([dA.flatten(), g_row.sum((0, 1, 2)), dD.flatten(), g_col.sum((0, 1, 3))])
        for device.order in orders:
            u = sparse_mlp_op._mix(z, A, a, D, d)
            results = {"mix": _close(u, torch.cat([Z, row, col], 1), dtype)}
            for name, x in (("", z), (" from mix's output", u[:, :C])):
                got, packed = sparse_mlp_op._backward(g, x, A, D)
                results[f"dz{name}"] = _close(got, dz, dtype, also=first)
                results[f"dA, da, dD, dd{name}"] = _close(packed, parameters, dtype)
            wrong += [f"{name} {shape} {dtype} order {device.order}" for name, right in results.items() if not right]
    return wrong


def _close(got: Tensor, want: Tensor, dtype: torch.dtype, also: Tensor | None = None) -> bool:
    """One rounding of the result, and of `also` if there is that, beside float32 sums of up to a few thousand terms."""
    size = want.abs() if also is None else want.abs() + also.abs()
    return bool(((got.double() - want).abs() <= 1.001 * torch.finfo(dtype).eps / 2 * size + 1e-4).all())
