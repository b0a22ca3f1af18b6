"""The spatial shift of ShiftViT (arXiv 2201.10801) in plain PyTorch: the definition, the CPU path, the fallback.

With groups of g = C // n_div channels and zeros entering at the border,

    channels   0 ..  g-1   out[..., i, j] = in[..., i, j + step]    content moves left
               g .. 2g-1   out[..., i, j] = in[..., i, j - step]    right
              2g .. 3g-1   out[..., i, j] = in[..., i + step, j]    up
              3g .. 4g-1   out[..., i, j] = in[..., i - step, j]    down
              4g ..  C-1   out = in

This is the order of the authors' code; the paper's formula exchanges the first two, and the released weights
need the code's order. With n_div < 4 the groups end at channel C. `step` is any integer, in pixels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def groups(channels: int, n_div: int, step: int) -> Iterator[tuple[slice, int, int]]:
    """(channels, dim, s) of each moving group: out[index] = in[index + s] along dim."""
    g = channels // n_div
    for k, (dim, s) in enumerate(((3, step), (3, -step), (2, step), (2, -step))):
        if g and k * g < channels:
            yield slice(k * g, min((k + 1) * g, channels)), dim, s


def _move(out: Tensor, src: Tensor, dim: int, s: int) -> None:
    size = src.size(dim)
    s = max(-size, min(size, s))
    kept = size - abs(s)
    border = out.narrow(dim, kept if s > 0 else 0, abs(s))
    if dim == 3 and kept and src.numel() and all(t.stride(2) == t.size(3) * t.stride(3) for t in (out, src)):
        # the image as one long row: what crosses from row to row lands in the border, and long copies are faster
        out, src, dim = out.flatten(2), src.flatten(2), 2
        kept = out.size(2) - abs(s)
    out.narrow(dim, max(-s, 0), kept).copy_(src.narrow(dim, max(s, 0), kept))
    border.zero_()


def shift(x: Tensor, n_div: int, step: int = 1) -> Tensor:
    """A new tensor with the layout of x.

    A copy of everything, then the moving channels again: of the forms tried (README) the fastest or level with
    the fastest in every shape, because a plain copy is the fastest pass there is.
    """
    out = x.clone()
    for channels, dim, s in groups(x.size(1), n_div, step):
        _move(out[:, channels], x[:, channels], dim, s)
    return out


def shift_(x: Tensor, n_div: int, step: int = 1) -> Tensor:
    """In place: only the moving channels are read and written."""
    for channels, dim, s in groups(x.size(1), n_div, step):
        group = x[:, channels]
        _move(group, group.clone(), dim, s)
    return x


def shift_add(x: Tensor, residual: Tensor, n_div: int, step: int = 1) -> Tensor:
    """shift(x + residual); only the moving channels of the sum are touched twice."""
    return shift_(x + residual, n_div, step)


def shift_by_padding(x: Tensor, n_div: int, step: int = 1) -> Tensor:
    """The same function out of pad, slice and cat alone: what exporters see. Differentiable, any dynamic size."""
    parts = []
    for channels, dim, s in groups(x.size(1), n_div, step):
        part = x[:, channels]
        before, after = max(-s, 0), max(s, 0)
        part = F.pad(part, (before, after) if dim == 3 else (0, 0, before, after))
        parts.append(part.narrow(dim, after, x.size(dim)))
    moved = 4 * (x.size(1) // n_div)
    return torch.cat([*parts, x[:, moved:]], dim=1)
