"""Windows of a map, as Swin has them: cut, put back, and which of their tokens may attend to each other.

Shapes: B batch, C channels, H x W positions of a map, G windows of M tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def partition(x_BHWC: torch.Tensor, window: tuple[int, int], fill: float = 0.0) -> torch.Tensor:
    """Cuts a map into windows, (B, G, M, C), row by row; where they do not fit, `fill` is added at right and bottom."""
    B, H, W, C = x_BHWC.shape
    h, w = window
    x = F.pad(x_BHWC, (0, 0, 0, -W % w, 0, -H % h), value=fill)
    return x.view(B, x.shape[1] // h, h, x.shape[2] // w, w, C).transpose(2, 3).reshape(B, -1, h * w, C)


def merge(windows_BGMC: torch.Tensor, window: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """The inverse of `partition` for a map of `size` (H, W)."""
    (h, w), (H, W) = window, size
    rows, columns = -(-H // h), -(-W // w)
    x = windows_BGMC.view(-1, rows, columns, h, w, windows_BGMC.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], rows * h, columns * w, x.shape[-1])[:, :H, :W]


def local_attention_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device | None = None
) -> torch.Tensor:
    """(G, M, M) bool: which tokens of a window may attend to each other once the map was rolled by `shift` and padded.

    Those that were not neighbors before the roll may not, and padding attends to padding alone, as nothing else to it.
    """
    rows, columns = ((torch.arange(side, device=device) >= side - s).float() for side, s in zip(size, shift))
    region = partition((2 * rows[:, None] + columns)[None, :, :, None], window, fill=-1.0)[0, :, :, 0]
    return region[:, :, None] == region[:, None, :]
