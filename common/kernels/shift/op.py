"""`shift`, `shift_add` and `shift_`: shape checks, registration with PyTorch, choice of backend.

`reference.py` holds the formula, `README.md` the layouts and the measurements. The environment variable
KERNEL_BACKEND picks auto (default), reference or cuda; see `common.kernels.cuda.wanted`.
"""

from math import ceil, gcd, prod
from pathlib import Path

import torch
from torch import Tensor

from .. import cuda
from . import reference

SOURCE = Path(__file__).with_name("shift.cu")
WORDS = {2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}  # by element size; others: the reference
# (x, residual) that one kernel adds and shifts; other pairs are added by PyTorch, then shifted in place
C_TYPES = {torch.float64: "double", torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
ADDS = [(a, a) for a in C_TYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]

LARGEST_LAUNCH = 2**30  # elements: `dense` counts them in 32 bits

_TYPES = [f"{word}, void" for word in WORDS.values()] + [f"{C_TYPES[a]}, {C_TYPES[b]}" for a, b in ADDS]
KERNELS = [
    *(f"dense<{types}, {channels_last}>" for types in _TYPES for channels_last in ("false", "true")),
    *(f"strided<{types}>" for types in _TYPES),
    *(f"in_place_planes<{word}>" for word in WORDS.values()),
    *(f"in_place<{word}>" for word in (*WORDS.values(), "uint4")),
]


def shift(x: Tensor, n_div: int, step: int = 1) -> Tensor:
    """Move four groups of C // n_div channels by `step` pixels: left, right, up, down; zeros enter.

    x: (B, C, H, W), any dtype and strides; the result keeps the memory format of x. The gradient is the
    opposite shift. ValueError when x has no four axes or n_div < 1.
    """
    _check(x, n_div)
    if _decomposed():
        return reference.shift_by_padding(x, n_div, step)
    if _unregistered(x):
        return reference.shift(x, n_div, step)
    return _shift(x, n_div, step)


def shift_add(x: Tensor, residual: Tensor, n_div: int, step: int = 1) -> Tensor:
    """shift(x + residual) without the sum in memory: the residual addition that precedes the next block's shift.

    x, residual: (B, C, H, W), equal shapes on one device, no broadcasting; dtypes promote as in x + residual.
    The result keeps the memory format of the operand that has the result's dtype (x, if both have it).
    """
    _check(x, n_div)
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"shift_add needs two tensors of one shape on one device, got x {tuple(x.shape)} on {x.device} "
            f"and residual {tuple(residual.shape)} on {residual.device}"
        )
    if _decomposed():
        return reference.shift_by_padding(x + residual, n_div, step)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if residual.dtype == dtype != x.dtype:
        x, residual = residual, x
    return _shift_add(x.to(dtype), residual, n_div, step)


def shift_(x: Tensor, n_div: int, step: int = 1) -> Tensor:
    """Shift x in place and return it; for inference. RuntimeError where autograd would need the old x."""
    _check(x, n_div)
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("shift_ overwrites a tensor that requires grad; use shift, or call under torch.no_grad()")
    if _decomposed():
        return x.copy_(reference.shift_by_padding(x, n_div, step))
    if _unregistered(x):
        return reference.shift_(x, n_div, step)
    _shift_inplace(x, n_div, step)
    return x


def _check(x: Tensor, n_div: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"shift needs (B, C, H, W), got {x.ndim} axes: {tuple(x.shape)}")
    if n_div < 1:
        raise ValueError(f"n_div={n_div} must be at least 1: a group has C // n_div channels")


def _decomposed() -> bool:
    """Compiled code sees pad, slice and cat, because the compiler makes them part of the passes before and after,
    where an operator would cost a pass of its own (README). Only KERNEL_BACKEND=cuda insists on the operator."""
    return cuda.plain() or (torch.compiler.is_compiling() and not cuda.required())


def _unregistered(x: Tensor) -> bool:
    """Eager inference on the CPU gains nothing from a registered operator and saves its 15 us."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return not needs_grad and not torch.compiler.is_compiling() and not cuda.wanted(x.device)


@torch.library.custom_op("kernels::shift", mutates_args=())
def _shift(x: Tensor, n_div: int, step: int) -> Tensor:
    out = _shift_cuda(x, None, n_div, step)
    return reference.shift(x, n_div, step) if out is None else out


@_shift.register_fake
def _(x, n_div, step):
    return torch.empty_like(x)


def _save_args(ctx, inputs, output):
    *_, ctx.n_div, ctx.step = inputs


def _shift_backward(ctx, grad):
    return _shift(grad, ctx.n_div, -ctx.step), None, None


_shift.register_autograd(_shift_backward, setup_context=_save_args)


@torch.library.custom_op("kernels::shift_add", mutates_args=())
def _shift_add(x: Tensor, residual: Tensor, n_div: int, step: int) -> Tensor:
    out = _shift_cuda(x, residual, n_div, step) if (x.dtype, residual.dtype) in ADDS else None
    if out is None:
        out = torch.add(x, residual, out=torch.empty_like(x))
        _shift_inplace(out, n_div, step)
    return out


@_shift_add.register_fake
def _(x, residual, n_div, step):
    return torch.empty_like(x)


def _save_add_args(ctx, inputs, output):
    _, residual, ctx.n_div, ctx.step = inputs
    ctx.residual_dtype = residual.dtype


def _shift_add_backward(ctx, grad):
    grad = _shift(grad, ctx.n_div, -ctx.step)
    return grad, grad.to(ctx.residual_dtype), None, None


_shift_add.register_autograd(_shift_add_backward, setup_context=_save_add_args)


@torch.library.custom_op("kernels::shift_inplace", mutates_args={"x"})
def _shift_inplace(x: Tensor, n_div: int, step: int) -> None:
    if not _shift_inplace_cuda(x, n_div, step):
        reference.shift_(x, n_div, step)


def _shift_cuda(x: Tensor, residual: Tensor | None, n_div: int, step: int) -> Tensor | None:
    if not _want_cuda(x):
        return None
    if residual is None:
        types = f"{WORDS[x.element_size()]}, void"
    else:
        types = f"{C_TYPES[x.dtype]}, {C_TYPES[residual.dtype]}"
    layout, images = _vectors(x, residual)
    name = f"strided<{types}>" if layout is None else f"dense<{types}, {str(layout == torch.channels_last).lower()}>"
    kernel = cuda.load(SOURCE, name, x.device)
    if kernel is None:
        return None

    out = torch.empty_like(x)
    B, C, H, W = x.shape
    group = C // n_div
    if layout is None:
        args = [out, x, residual, x.numel(), C, H, W, group, _clamp(step, max(x.shape))]
        args += [*out.stride(), *x.stride(), *(x if residual is None else residual).stride()]
        if x.numel() and not cuda.launch(kernel, ceil(x.numel() / 256), 256, args, x.device):
            return None
        return out
    channel = 1 if layout == torch.channels_last else H * W  # neighbouring elements of one channel
    cycle, run = C * channel, max(1, group * channel)
    W, plane, step_w, step_h, *by_sides = _move_args(x, step)
    geometry = [cycle, run, min(4 * group * channel, cycle), W, plane, step_w, step_h]
    geometry += [_divisor(cycle), _divisor(run), *by_sides]
    for first in range(0, B, images):
        parts = [t if images >= B or t is None else t[first : first + images] for t in (out, x, residual)]
        vectors = parts[0].numel() * x.element_size() // 16
        if not cuda.launch(kernel, ceil(vectors / 256), 256, [*parts, vectors, *geometry], x.device):
            return None
    return out


def _vectors(x: Tensor, residual: Tensor | None) -> tuple[torch.memory_format | None, int]:
    """The layout in which x and residual are dense and in whole 16-byte vectors, or None; images in one launch."""
    tensors = [x] if residual is None else [x, residual]
    per_vector = 16 // min(t.element_size() for t in tensors)
    B, *image = x.shape
    images = LARGEST_LAUNCH // max(1, prod(image))
    images = B if images >= B else images // per_vector * per_vector
    if not x.numel() or not images or any(t.data_ptr() % (16 // x.element_size() * t.element_size()) for t in tensors):
        return None, 0
    if x.numel() * x.element_size() % 16 == 0 and all(t.is_contiguous() for t in tensors):
        return torch.contiguous_format, images
    last = all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    if last and x.size(1) * x.element_size() % 16 == 0:
        return torch.channels_last, images
    return None, 0


def _move_args(x: Tensor, step: int) -> list[int]:
    """W, plane, step_w, step_h, by_W, by_plane of the kernels"""
    H, W = x.shape[2:]
    return [W, H * W, _clamp(step, W), _clamp(step, H) * W, _divisor(W), _divisor(H * W)]


def _divisor(d: int) -> int:
    """n // d = (high half of n * multiplier + n) >> shift, for n below 2^31: multiplier + 2^32 shift"""
    shift = (d - 1).bit_length()
    return (shift << 32) + (((1 << shift) - d << 32) // d + 1)


def _shift_inplace_cuda(x: Tensor, n_div: int, step: int) -> bool:
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    if not _want_cuda(x) or overlapping:  # the reference refuses an overlapping x as PyTorch does
        return False
    B, C, H, W = x.shape
    group = C // n_div
    moving = min(4 * group, C)
    if not x.numel() or not moving or not step:
        return True

    per_vector = 16 // x.element_size()
    planes = per_vector // gcd(per_vector, H * W)  # the fewest that are whole vectors
    whole = x.is_contiguous() and x.data_ptr() % 16 == 0 and C * H * W % per_vector == 0
    if whole and group % planes == 0 and moving % planes == 0 and planes * H * W <= LARGEST_LAUNCH:
        kernel = cuda.load(SOURCE, f"in_place_planes<{WORDS[x.element_size()]}>", x.device)
        if kernel is None:
            return False
        vectors, blocks = planes * H * W // per_vector, moving // planes
        args = [x, vectors, C * H * W, blocks, group // planes, *_move_args(x, step)]
        return cuda.launch(kernel, B * blocks, min(256, 32 * ceil(vectors / 128)), args, x.device)

    sn, sc, si, sj = x.stride()
    # the widest words that neither a group's end nor an address cuts
    first = x.data_ptr() // x.element_size()
    per_word = gcd(per_vector, group, moving, sn, si, sj, first) if sc == 1 else 1
    word_bytes = per_word * x.element_size()
    kernel = cuda.load(SOURCE, f"in_place<{WORDS.get(word_bytes, 'uint4')}>", x.device)
    if kernel is None:
        return False
    words = moving // per_word
    width = min(words, 64 // word_bytes) if sc == 1 else 1  # neighbouring channels of a pixel: 64 bytes
    threads = min(256, 32 * ceil(width * ceil(H * W / 8) / 32))
    strides = [sn // per_word, sc, si // per_word, sj // per_word]
    args = [x, words, width, H, W, group // per_word, _clamp(step, max(x.shape)), *strides]
    return cuda.launch(kernel, B * ceil(words / width), threads, args, x.device)


def _want_cuda(x: Tensor) -> bool:
    if not cuda.wanted(x.device):
        return False
    if x.element_size() in WORDS and max(x.shape) < 2**29:  # the kernels count along one axis in 32 bits
        return True
    cuda.refuse(f"shift has no kernel for {x.dtype} of {tuple(x.shape)}: 2, 4 or 8 bytes, axes below 2^29")
    return False


def _clamp(step: int, size: int) -> int:
    return max(-size, min(step, size))
