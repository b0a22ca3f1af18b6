"""The paper's norm, over all channels and positions of an image, for a GPU's channels-last maps in eager mode.

PyTorch's own kernel wants channels first there: it copies each map into that layout, and the convolution behind it
copies it back. torch.compile takes both apart anyway, and a CPU's kernel reads either layout.
"""

from __future__ import annotations

import timm.layers
import torch
from timm.models import register_notrace_module
from torch import Tensor

from common.kernels import cuda


@register_notrace_module  # what it chooses by the map's layout a symbolic trace cannot see
class GroupNorm1(timm.layers.GroupNorm1):
    """timm's, with its names and results."""

    before_convolution = False
    """Whether a convolution takes the result: under autocast it is then written in the type that this one reads."""

    def forward(self, x: Tensor) -> Tensor:
        if not here(x):
            return super().forward(x)
        narrow = self.before_convolution and torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if narrow else torch.float32
        return ImageNorm.apply(x.float(), self.weight, self.bias, self.eps, dtype)


def here(x: Tensor) -> bool:
    """Whether x is a map that PyTorch's kernel would copy into another layout."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.is_cuda and last and x.dtype != torch.float64 and not torch.compiler.is_compiling() and not cuda.plain()


class ImageNorm(torch.autograd.Function):
    """w (x - mean) / std + b with mean and std of each image: x (B, C, H, W), w and b (C,), in any layout.

    One pass reads the statistics, one writes the result; the gradient takes the sums of g and g x by channel, then
    dx = g w / std + x B + K with two numbers B and K of each image.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        var, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
        rstd = (var + eps).rsqrt()
        scale = rstd * weight.view(-1, 1, 1)
        ctx.save_for_backward(x, weight, mean, rstd)
        return torch.addcmul(bias.view(-1, 1, 1) - mean * scale, x, scale, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        weight, size = weight.view(-1, 1, 1), x[0].numel()
        sums = g.sum((2, 3), keepdim=True, dtype=x.dtype)
        products = rstd * ((g * x).sum((2, 3), keepdim=True) - mean * sums)  # of g and the normalised x
        along = rstd**2 * (weight * products).sum(1, keepdim=True) / size
        dx = torch.addcmul(mean * along - rstd * (weight * sums).sum(1, keepdim=True) / size, x, -along)
        dx.addcmul_(g, rstd * weight)
        return dx, products.sum((0, 2, 3)), sums.sum((0, 2, 3)), None, None
