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
    for name in ("axial_mix", "axial_backward")
    for dtype in C_TYPES.values()
    for side in (16, 32, 64)
]
THREADS, TILE, LARGEST_SIDE = 256, 32, 64  # as in the .cu file: threads of a block, channels of a tile, side


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


def _like(x: Tensor, channels: int, layout: torch.memory_format | None = None) -> Tensor:
    """An empty tensor with x's shape but `channels`, in x's layout or another."""
    shape = (x.size(0), channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout or _layout(x))


def _tiles(channels: int) -> int:
    return -(-channels // TILE)


def _padded(x: Tensor) -> int:
    return next(side for side in (16, 32, LARGEST_SIDE) if side >= max(x.shape[2:]))


def _fits(z: Tensor) -> bool:
    """Whether the kernels take z; where they do not, and nothing may fall back, RuntimeError."""
    _, C, H, W = z.shape
    if not z.numel() or (z.dtype in C_TYPES and C % 8 == 0 and max(H, W) <= LARGEST_SIDE and 3 * C * H * W < 2**31):
        return True
    cuda.refuse(
        f"sparse_mlp has no kernel for {z.dtype} of {tuple(z.shape)}: 16 bits, channels a multiple of 8, "
        f"sides up to {LARGEST_SIDE}"
    )
    return False


def _kernel(name: str, z: Tensor):
    """The kernel for z, or None: the reference takes over."""
    if not cuda.wanted(z.device) or not z.numel() or not _fits(z):
        return None
    return cuda.load(SOURCE, f"{name}<{C_TYPES[z.dtype]}, {_padded(z)}>", z.device)


def _dense(x: Tensor) -> Tensor:
    """x as the kernels read it: channels side by side, pixels in order, 16-byte addresses."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


@torch.library.custom_op("kernels::axial_mix", mutates_args=())
def _mix(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor) -> Tensor:
    B, C, H, W = z.shape
    layout = _layout(z)
    if kernel := _kernel("axial_mix", z):
        u = _like(z, 3 * C, torch.channels_last)
        args = [u, _dense(z), *(t.contiguous() for t in (A, a, D, d)), C, H, W]
        if cuda.launch(kernel, 2 * B * _tiles(C), THREADS, args, z.device):
            return u.contiguous(memory_format=layout)
    return reference.mix(z, A, a, D, d).contiguous(memory_format=layout)


@_mix.register_fake
def _(z, A, a, D, d):
    return _like(z, 3 * z.size(1))


def _save_mix(ctx, inputs, output):
    _, A, _, D, _ = inputs
    ctx.save_for_backward(output, A, D)  # fuse keeps the output too, and its first third is z


def _mix_backward(ctx, g):
    u, A, D = ctx.saved_tensors
    dz, packed = _backward(g, u[:, : u.size(1) // 3], A, D)
    return dz, *_unpack(packed, *dz.shape[2:])


_mix.register_autograd(_mix_backward, setup_context=_save_mix)


@torch.library.custom_op("kernels::axial_backward", mutates_args=())
def _backward(g: Tensor, z: Tensor, A: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """g: the gradient of mix's output -> that of z, in g's layout, and those of A, a, D and d one after the other"""
    layout = _layout(g)
    B, C, H, W = z.shape
    if kernel := _kernel("axial_backward", z):
        pixel = z.stride(3)  # a third of mix's output serves as it lies
        in_order = z.stride() == (H * W * pixel, 1, W * pixel, pixel)
        x = z if in_order and pixel % 8 == 0 and z.data_ptr() % 16 == 0 else _dense(z)
        dz = _like(g, C, torch.channels_last)
        blocks = min(B * _tiles(C), 264)  # two on each of 132 SMs; more would only make more partial sums
        partial = torch.empty(blocks * LARGEST_SIDE // _padded(z), W * W + W + H * H + H, device=z.device)
        args = [dz, partial, _dense(g), x, A.contiguous(), D.contiguous(), pixel if x is z else C, B, C, H, W]
        if cuda.launch(kernel, blocks, THREADS, args, z.device):
            return dz.contiguous(memory_format=layout), partial.sum(0).to(z.dtype)
    packed = torch.cat([t.flatten() for t in reference.gram(g, z)])
    return reference.unmix(g, A, D).contiguous(memory_format=layout), packed


@_backward.register_fake
def _(g, z, A, D):
    H, W = z.shape[2:]
    return _like(g, z.size(1)), z.new_empty(W * W + W + H * H + H)


def _unpack(packed: Tensor, H: int, W: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dA, da, dD, dd = packed.split([W * W, W, H * H, H])
    return dA.view(W, W), da, dD.view(H, H), dd


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_backward(ctx, h, packed):
    g, z, A, D = ctx.saved_tensors
    C, H, W = z.shape[1:]
    hA, ha, hD, hd = _unpack(packed, H, W)
    none = torch.zeros_like(z)
    dg = _mix(h, A, A.new_zeros(W), D, D.new_zeros(H))
    dg = dg + torch.cat([none, _mix(z, hA, ha, hD, hd)[:, C:]], dim=1)
    dz, _ = _backward(torch.cat([none, g[:, C:]], dim=1), z, hA, hD)
    dA, _, dD, _ = _unpack(_backward(g, h, A, D)[1], H, W)
    return dg, dz, dA, dD


_backward.register_autograd(_backward_backward, setup_context=_save_backward)


# For torch's FLOP counter: every entry of C channels meets a matrix along the width and one along the height, backward
# once for z and once for the matrices.
@register_flop_formula(torch.ops.kernels.axial_mix)
def _flops(z_shape, *_, **__) -> int:
    B, C, H, W = z_shape
    return 2 * B * C * H * W * (H + W)


@register_flop_formula(torch.ops.kernels.axial_backward)
def _backward_flops(_g_shape, z_shape, *_, **__) -> int:
    return 2 * _flops(z_shape)
