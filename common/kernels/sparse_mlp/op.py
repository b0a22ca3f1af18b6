"""`sparse_mlp`: shape checks, registration with PyTorch, choice of backend.

`reference.py` holds the formula, `README.md` the plans, layouts and measurements. The environment variable
KERNEL_BACKEND picks auto (default), reference or cuda; see `common.kernels.cuda.wanted`. The kernels take 16-bit
floats with channels last; a GPU tensor of another layout is copied into it. Other dtypes and sizes run the reference.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import cuda
from . import reference

SOURCE = Path(__file__).with_name("sparse_mlp.cu")
C_TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
KERNELS = [
    f"{name}<{dtype}, {side}>"
    for name in ("axial_mix", "axial_unmix", "axial_gram")
    for dtype in C_TYPES.values()
    for side in (16, 32, 64)
]
THREADS, TILE, LARGEST_SIDE = 128, 32, 64  # as in the .cu file: threads of a block, channels of a tile, side


def sparse_mlp(
    z: Tensor, row_weight: Tensor, row_bias: Tensor, col_weight: Tensor, col_bias: Tensor, fuse_weight: Tensor
) -> Tensor:
    """Mix every pixel with its row and its column, then fuse [z; row; col] by a 1x1 convolution.

    z: (B, C, H, W); row_weight (W, W) and row_bias (W,) act along the width, col_weight (H, H) and col_bias (H,)
    along the height, fuse_weight (C_out, 3C) on the channels. Returns (B, C_out, H, W) in the memory format of z.
    Under autocast everything is computed in its dtype. ValueError names a tensor that does not fit.
    """
    _check(z, row_weight, row_bias, col_weight, col_bias, fuse_weight)
    device = z.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta tensors count; they never run
        dtype = torch.get_autocast_dtype(device)
        z, row_weight, row_bias, col_weight, col_bias, fuse_weight = (
            t.to(dtype) for t in (z, row_weight, row_bias, col_weight, col_bias, fuse_weight)
        )
    if cuda.plain() or not cuda.wanted(z.device) or not _fits(z):
        # On a CPU autograd of plain PyTorch is faster than the operators below: it keeps what it has anyway.
        return reference.sparse_mlp(z, row_weight, row_bias, col_weight, col_bias, fuse_weight)
    layout = _layout(z)
    u = _mix(z.contiguous(memory_format=torch.channels_last), row_weight, row_bias, col_weight, col_bias)
    return reference.fuse(u, fuse_weight).contiguous(memory_format=layout)


def _check(z, row_weight, row_bias, col_weight, col_bias, fuse_weight):
    if z.ndim != 4:
        raise ValueError(f"sparse_mlp needs z as (B, C, H, W), got {z.ndim} axes: {tuple(z.shape)}")
    _, C, H, W = z.shape
    for name, tensor, shape in (
        ("row_weight", row_weight, (W, W)),
        ("row_bias", row_bias, (W,)),
        ("col_weight", col_weight, (H, H)),
        ("col_bias", col_bias, (H,)),
        ("fuse_weight", fuse_weight, (fuse_weight.shape[0], 3 * C)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for z of {tuple(z.shape)}, got {tuple(tensor.shape)}")


def _layout(x: Tensor) -> torch.memory_format:
    """Of what is computed from x."""
    return torch.channels_last if reference.channels_last(x) else torch.contiguous_format


def _like(x: Tensor, channels: int) -> Tensor:
    """An empty tensor with x's shape but `channels`."""
    shape = (x.size(0), channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _tiles(channels: int) -> int:
    return -(-channels // TILE)


def _padded(x: Tensor) -> int:
    return next(side for side in (16, 32, LARGEST_SIDE) if side >= max(x.shape[2:]))


def _fits(z: Tensor) -> bool:
    """Whether the kernels take z; where they do not, and nothing may fall back, RuntimeError."""
    if not z.numel() or (z.dtype in C_TYPES and z.size(1) % 8 == 0 and max(z.shape[2:]) <= LARGEST_SIDE):
        return True
    cuda.refuse(
        f"sparse_mlp has no kernel for {z.dtype} of {tuple(z.shape)}: 16 bits, channels a multiple of 8, "
        f"sides up to {LARGEST_SIDE}"
    )
    return False


def _kernel(name: str, *tensors: Tensor, dense: bool = True):
    """The kernel for these tensors, or None. Images have their channels side by side and their pixels in order;
    dense: with nothing between two pixels."""
    x = tensors[0]
    if x.dtype not in C_TYPES or not cuda.wanted(x.device) or max(x.shape[2:]) > LARGEST_SIDE or not x.numel():
        return None
    for t in tensors:
        if t.dtype != x.dtype:
            return None
        if t.ndim == 4:
            _, C, H, W = t.shape
            pixel = t.stride(3)
            in_order = t.stride() == (H * W * pixel, 1, W * pixel, pixel)
            if not in_order or C % 8 or pixel % 8 or t.data_ptr() % 16 or (dense and pixel != C):
                return None
    return cuda.load(SOURCE, f"{name}<{C_TYPES[x.dtype]}, {_padded(x)}>", x.device)


@torch.library.custom_op("kernels::axial_mix", mutates_args=())
def _mix(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor) -> Tensor:
    B, C, H, W = z.shape
    tensors = [z, *(t.contiguous() for t in (A, a, D, d))]
    kernel = _kernel("axial_mix", *tensors)
    if kernel is None:
        return reference.mix(z, A, a, D, d).contiguous(memory_format=_layout(z))
    u = _like(z, 3 * C)
    args = [*(t.data_ptr() for t in (u, *tensors)), C, H, W]
    cuda.launch(kernel, 2 * B * _tiles(C), THREADS, args, z.device)
    return u


@_mix.register_fake
def _(z, A, a, D, d):
    return _like(z, 3 * z.size(1))


def _save_mix(ctx, inputs, output):
    _, A, _, D, _ = inputs
    ctx.save_for_backward(output, A, D)  # fuse keeps the output too, and its first third is z


def _mix_backward(ctx, g):
    u, A, D = ctx.saved_tensors
    dz = _unmix(g, A, D) if ctx.needs_input_grad[0] else None
    gradients = _gram(g, u[:, : u.size(1) // 3]) if any(ctx.needs_input_grad[1:]) else [None] * 4
    return dz, *gradients


_mix.register_autograd(_mix_backward, setup_context=_save_mix)


@torch.library.custom_op("kernels::axial_unmix", mutates_args=())
def _unmix(g: Tensor, A: Tensor, D: Tensor) -> Tensor:
    B, C, H, W = g.size(0), g.size(1) // 3, *g.shape[2:]
    tensors = [g, A.t().contiguous(), D.t().contiguous()]
    kernel = _kernel("axial_unmix", *tensors)
    if kernel is None:
        return reference.unmix(g, A, D).contiguous(memory_format=_layout(g))
    dz = _like(g, C)
    args = [*(t.data_ptr() for t in (dz, *tensors)), C, H, W]
    cuda.launch(kernel, B * _tiles(C), THREADS, args, g.device)
    return dz


@_unmix.register_fake
def _(g, A, D):
    return _like(g, g.size(1) // 3)


def _save_unmix(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unmix_backward(ctx, h):
    g, A, D = ctx.saved_tensors
    dA, _, dD, _ = _gram(g, h)
    return _mix(h, A, A.new_zeros(A.size(0)), D, D.new_zeros(D.size(0))), dA, dD


_unmix.register_autograd(_unmix_backward, setup_context=_save_unmix)


@torch.library.custom_op("kernels::axial_gram", mutates_args=())
def _gram(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C, H, W = z.shape
    kernel = _kernel("axial_gram", g, z, dense=False)
    if kernel is None or not reference.channels_last(g):
        return reference.gram(g, z)
    blocks = min(B * _tiles(C), 528)  # four on each of 132 SMs; more would only make more partial sums
    sizes = [W * W, W, H * H, H]
    partial = torch.empty(blocks * LARGEST_SIDE // _padded(z), sum(sizes), device=z.device)
    args = [partial.data_ptr(), g.data_ptr(), z.data_ptr(), z.stride(3), B, C, H, W]
    cuda.launch(kernel, blocks, THREADS, args, z.device)
    dA, da, dD, dd = (part.to(z.dtype, copy=True) for part in partial.sum(0).split(sizes))
    return dA.view(W, W), da, dD.view(H, H), dd


@_gram.register_fake
def _(g, z):
    H, W = z.shape[2:]
    return tuple(z.new_empty(shape) for shape in ((W, W), (W,), (H, H), (H,)))


def _save_gram(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gram_backward(ctx, hA, ha, hD, hd):
    g, z = ctx.saved_tensors
    C = z.size(1)
    moved = torch.cat([torch.zeros_like(z), g[:, C:]], dim=1)
    mixed = _mix(z, hA, ha, hD, hd)
    return torch.cat([torch.zeros_like(z), mixed[:, C:]], dim=1), _unmix(moved, hA, hD)


_gram.register_autograd(_gram_backward, setup_context=_save_gram)


# For torch's FLOP counter: every entry of C channels meets a matrix along the width and one along the height.
@register_flop_formula([torch.ops.kernels.axial_mix, torch.ops.kernels.axial_unmix])
def _flops(x_shape, *_, out_shape=None, **__) -> int:
    B, _C, H, W = x_shape
    return 2 * B * min(x_shape[1], out_shape[1]) * H * W * (H + W)


@register_flop_formula(torch.ops.kernels.axial_gram)
def _gram_flops(_g_shape, z_shape, *_, **__) -> int:
    B, C, H, W = z_shape
    return 2 * B * C * H * W * (H + W)
