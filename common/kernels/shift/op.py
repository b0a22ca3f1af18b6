"""`shift`, `shift_add` and `shift_`: shape checks, registration with PyTorch, choice of backend.

`reference.py` holds the formula, `README.md` the layouts and the measurements. The environment variable
KERNEL_BACKEND picks auto (default), reference or cuda; see `common.kernels.cuda.pick`.
"""

import torch
from torch import Tensor

from . import reference


def shift(x: Tensor, n_div: int, step: int = 1) -> Tensor:
    """Move four groups of C // n_div channels by `step` pixels: left, right, up, down; zeros enter.

    x: (B, C, H, W), any dtype and strides; the result keeps the memory format of x. The gradient is the
    opposite shift. ValueError when x has no four axes or n_div < 1.
    """
    _check(x, n_div)
    if _exporting():
        return reference.shift_by_padding(x, n_div, step)
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
    if _exporting():
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
    if _exporting():
        return x.copy_(reference.shift_by_padding(x, n_div, step))
    _shift_inplace(x, n_div, step)
    return x


def _check(x: Tensor, n_div: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"shift needs (B, C, H, W), got {x.ndim} axes: {tuple(x.shape)}")
    if n_div < 1:
        raise ValueError(f"n_div={n_div} must be at least 1: a group has C // n_div channels")


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


@torch.library.custom_op("kernels::shift", mutates_args=())
def _shift(x: Tensor, n_div: int, step: int) -> Tensor:
    return reference.shift(x, n_div, step)


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
    out = torch.add(x, residual, out=torch.empty_like(x))
    return reference.shift_(out, n_div, step)


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
    reference.shift_(x, n_div, step)
