"""What the kernels have to compute, over shapes that reach every instantiation and every path through it."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.kernels.shift import op as shift_op
from common.kernels.sparse_mlp import op as sparse_mlp_op

from .device import ORDERS, Device

LAYOUTS = (torch.contiguous_format, torch.channels_last)

# (B, C, H, W), n_div: odd sides, sides of 1, groups that do not divide, fewer than four groups, vectors that end in
# another row, plane, group or image, whole vectors of channels, planes of several chunks, an empty batch
SHIFT_SHAPES = [
    ((2, 13, 5, 7), 5), ((1, 12, 1, 33), 12), ((3, 10, 7, 1), 12), ((1, 12, 4, 6), 3), ((1, 5, 4, 4), 1),
    ((2, 96, 6, 8), 12), ((2, 32, 7, 7), 4), ((2, 16, 14, 14), 4), ((1, 128, 3, 4), 16), ((1, 24, 1, 1), 3),
    ((1, 8, 64, 80), 4), ((0, 24, 5, 5), 12),
]
STEPS = (1, 0, -1, 2, -7, 40)

# (B, C, H, W): every padded side, sides of 1, the largest, channels that fill vectors and tiles or do not, items of
# several blocks
SPARSE_MLP_SHAPES = [
    (1, 16, 7, 7), (2, 40, 14, 13), (1, 72, 17, 28), (1, 8, 33, 64), (1, 8, 1, 5), (1, 8, 64, 1), (3, 8, 16, 16),
]


def shift_oracle(x: Tensor, n_div: int, step: int) -> Tensor:
    """The formula of shift.cu, element by element: out[n, c, i, j] = x[n, c, i + di(c), j + dj(c)] or 0."""
    B, C, H, W = x.shape
    group = C // n_div
    out = torch.zeros_like(x)
    for c in range(C):
        k = c // group if group else 4
        di, dj = [(0, step), (0, -step), (step, 0), (-step, 0)][k] if k < 4 else (0, 0)
        i, j = torch.arange(H)[:, None] + di, torch.arange(W)[None] + dj
        inside = (0 <= i) & (i < H) & (0 <= j) & (j < W)
        moved = x[:, c][:, i.clamp(0, max(H - 1, 0)), j.clamp(0, max(W - 1, 0))]
        out[:, c] = torch.where(inside, moved, 0)
    return out


def _normal(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=layout)


def shift(shapes=SHIFT_SHAPES, steps=STEPS, dtypes=tuple(shift_op.C_TYPES)) -> Iterator[tuple[str, bool]]:
    """Runs shift, shift_add and shift_; yields a case and whether it gave the oracle's bits."""
    pairs = [(x, r) for x, r in shift_op.ADDS if x in dtypes and r in dtypes]
    for (shape, n_div), layout, step in itertools.product(shapes, LAYOUTS, steps):
        for dtype, other in pairs:
            name = f"{shape} n_div {n_div} step {step} {dtype} {other} {layout}"
            x, r = _normal(shape, dtype, layout, 0), _normal(shape, other, layout, 1)
            views = [(x, r), (x[..., 1:], r[..., 1:])]  # any strides
            if layout is torch.contiguous_format and shape[0] > 1:
                views.append((x[1:], r[1:]))  # not on a 16-byte boundary, when an image is not whole vectors
            for x, r in views:
                want = shift_oracle(x, n_div, step)
                yield f"shift {name}", torch.equal(shift_op.shift(x, n_div, step), want)
                sums = shift_oracle(x + r, n_div, step)
                yield f"shift_add {name}", torch.equal(shift_op.shift_add(x, r, n_div, step), sums)
                base = x.new_zeros(x.shape).contiguous(memory_format=layout).copy_(x)
                yield f"shift_ {name}", torch.equal(shift_op.shift_(base, n_div, step), want)


def sparse_mlp(shapes=SPARSE_MLP_SHAPES, dtypes=tuple(sparse_mlp_op.C_TYPES)) -> Iterator[tuple[str, bool]]:
    """Runs the axial kernels against float64 einsums: within the roundings that README.md counts."""
    for shape, dtype in itertools.product(shapes, dtypes):
        B, C, H, W = shape
        scales = [(W, W), (W,), (H, H), (H,)]
        z = _normal(shape, dtype, torch.channels_last, 0)
        A, a, D, d = (_normal(s, dtype, torch.contiguous_format, k) / s[-1] ** 0.5 for k, s in enumerate(scales, 1))
        g = _normal((B, 3 * C, H, W), dtype, torch.channels_last, 5)
        exact_z, exact_A, exact_a, exact_D, exact_d, exact_g = (t.double() for t in (z, A, a, D, d, g))
        row = torch.einsum("jk,bcik->bcij", exact_A, exact_z) + exact_a
        col = torch.einsum("ik,bckj->bcij", exact_D, exact_z) + exact_d[:, None]
        u = sparse_mlp_op._mix(z, A, a, D, d)
        yield f"mix {shape} {dtype}", _close(u, torch.cat([exact_z, row, col], 1), dtype, 1)

        g_z, g_row, g_col = exact_g.chunk(3, 1)
        along_width = torch.einsum("jk,bcij->bcik", exact_A, g_row)
        dz = g_z + along_width + torch.einsum("ik,bcij->bckj", exact_D, g_col)
        parts = [torch.einsum("bcij,bcik->jk", g_row, exact_z), g_row.sum((0, 1, 2)),
                 torch.einsum("bcij,bckj->ik", g_col, exact_z), g_col.sum((0, 1, 3))]
        for x in (z, u[:, :C]):  # by itself, and as it lies in mix's output
            got, packed = sparse_mlp_op._backward(g, x, A, D)
            yield f"dz {shape} {dtype}", _close(got, dz, dtype, 2, largest=(g_z + along_width).abs())
            want = torch.cat([p.flatten() for p in parts])
            yield f"dA, da, dD, dd {shape} {dtype}", _close(packed, want, dtype, 1)


def _close(got: Tensor, want: Tensor, dtype: torch.dtype, roundings: int, largest: Tensor | None = None) -> bool:
    """roundings to dtype, of values up to `largest`, and float32 sums of up to a few thousand terms"""
    rounding = torch.finfo(dtype).eps / 2
    size = want.abs() if largest is None else torch.maximum(want.abs(), largest)
    return bool(((got.double() - want).abs() <= roundings * 1.001 * rounding * size + 1e-4).all())


def run(device: Device, cases: Iterator[tuple[str, bool]]) -> list[str]:
    """The cases with a wrong result, in every order of threads. KernelError where a kernel must not do what it does."""
    with device.plugged_in():
        return [name for name, right in cases if not right]


def run_orders(device: Device, op: str) -> list[str]:
    wrong = []
    for device.order in ORDERS:
        wrong += run(device, {"shift": shift, "sparse_mlp": sparse_mlp}[op]())
    return wrong
