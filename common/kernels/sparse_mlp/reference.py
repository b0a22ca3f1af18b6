"""The three-branch mixing of sMLPNet (arXiv 2109.05422) in plain PyTorch: the definition, the CPU path, the fallback.

    row[b, c, i, j] = sum_k A[j, k] z[b, c, i, k] + a[j]        along the width,  A: (W, W)
    col[b, c, i, j] = sum_k D[i, k] z[b, c, k, j] + d[i]        along the height, D: (H, H)
    out = F [z; row; col]                                       channels,         F: (C_out, 3C)

`mix` makes [z; row; col] and `fuse` applies F. Of `mix` this file also has the two halves of the gradient: `unmix`,
its adjoint in z, and `gram`, the gradient of matrices and biases. The three are closed under differentiation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def sparse_mlp(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor, F_: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C_out, H, W)"""
    return fuse(mix(z, A, a, D, d), F_)


def mix(z: Tensor, A: Tensor, a: Tensor, D: Tensor, d: Tensor) -> Tensor:
    """[z; row; col], (B, 3C, H, W)"""
    return torch.cat([z, _along_width(z, A, a), _along_height(z, D, d)], dim=1)


def unmix(g: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """g: (B, 3C, H, W), the gradient of mix's output -> the gradient of z"""
    g_z, g_row, g_col = g.chunk(3, dim=1)
    return g_z + _along_width(g_row, A.t()) + _along_height(g_col, D.t())


def gram(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g: (B, 3C, H, W), the gradient of mix's output -> the gradients of A, a, D, d"""
    _, g_row, g_col = g.chunk(3, dim=1)
    H, W = z.shape[2:]
    dA = g_row.reshape(-1, W).t() @ z.reshape(-1, W)
    dD = conv2d_weight(z.transpose(1, 2), (H, H, 1, 1), g_col.transpose(1, 2)).view(H, H)  # as in _along_height
    return dA, g_row.sum((0, 1, 2)), dD, g_col.sum((0, 1, 3))


def _along_width(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, matrix, bias)


def _along_height(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    # a matrix product per channel would be thousands of 7x7 products in the last stage
    return F.conv2d(x.transpose(1, 2), matrix[:, :, None, None], bias).transpose(1, 2)


def fuse(u: Tensor, F_: Tensor) -> Tensor:
    """The 1x1 convolution; with channels last in memory one matrix product, forward and backward."""
    if channels_last(u):
        return F.linear(u.permute(0, 2, 3, 1), F_).permute(0, 3, 1, 2)
    return F.conv2d(u, F_[:, :, None, None])


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
