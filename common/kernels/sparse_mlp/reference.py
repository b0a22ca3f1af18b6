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
    """[z; row; col], (B, 3C, H, W), in the memory format of z"""
    if channels_last(z):
        x = z.permute(0, 2, 3, 1)
        return torch.cat([x, _rows(x, A, a[:, None]), _columns(x, D, d[:, None])], dim=3).permute(0, 3, 1, 2)
    row = F.linear(z, A, a)
    # as a convolution: a matrix product per channel would be thousands of 7x7 products in the last stage
    col = F.conv2d(z.transpose(1, 2), D[:, :, None, None], d).transpose(1, 2)
    return torch.cat([z, row, col], dim=1)


def unmix(g: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """g: (B, 3C, H, W), the gradient of mix's output -> the gradient of z"""
    if channels_last(g):
        g_z, g_row, g_col = g.permute(0, 2, 3, 1).chunk(3, dim=3)
        dz = _rows(g_row, A.t(), g_z.flatten(0, 1))
        return _columns(g_col, D.t(), dz.flatten(2)).permute(0, 3, 1, 2)
    g_z, g_row, g_col = g.chunk(3, dim=1)
    return g_z + F.linear(g_row, A.t()) + F.conv2d(g_col.transpose(1, 2), D.t()[:, :, None, None]).transpose(1, 2)


def gram(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g: (B, 3C, H, W), the gradient of mix's output -> the gradients of A, a, D, d"""
    H, W = z.shape[2:]
    _, g_row, g_col = g.chunk(3, dim=1)
    if channels_last(g):
        x, x_row, x_col = (t.permute(0, 2, 3, 1) for t in (z, g_row, g_col))
        dA = torch.bmm(x_row.flatten(0, 1), x.flatten(0, 1).mT).sum(0)
        dD = torch.bmm(x_col.flatten(2), x.flatten(2).mT).sum(0)
    else:
        dA = g_row.reshape(-1, W).t() @ z.reshape(-1, W)
        dD = conv2d_weight(z.transpose(1, 2), (H, H, 1, 1), g_col.transpose(1, 2)).view(H, H)
    return dA, g_row.sum((0, 1, 2)), dD, g_col.sum((0, 1, 3))


def _rows(x: Tensor, matrix: Tensor, plus: Tensor) -> Tensor:
    """x: (B, H, W, C); each row times `matrix` along the width, added to `plus`, one product per row"""
    B, H, W, _ = x.shape
    return torch.baddbmm(plus, matrix.expand(B * H, W, W), x.flatten(0, 1)).view(x.shape)


def _columns(x: Tensor, matrix: Tensor, plus: Tensor) -> Tensor:
    """x: (B, H, W, C); all columns of an image times `matrix` along the height, added to `plus`, one product"""
    B, H, *_ = x.shape
    return torch.baddbmm(plus, matrix.expand(B, H, H), x.flatten(2)).view(x.shape)


def fuse(u: Tensor, F_: Tensor) -> Tensor:
    """The 1x1 convolution; with channels last in memory one matrix product, forward and backward."""
    if channels_last(u):
        return F.linear(u.permute(0, 2, 3, 1), F_).permute(0, 3, 1, 2)
    return F.conv2d(u, F_[:, :, None, None])


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
