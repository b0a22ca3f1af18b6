"""What trackers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.metrics.trackers.protocol import Box


def hann_window(grid: int) -> torch.Tensor:
    """(grid * grid,), row by row: the outer product of two Hann windows whose ends are zero."""
    window = torch.hann_window(grid, periodic=False)
    return torch.outer(window, window).flatten()


def keep_inside(box: Sequence[float], width: int, height: int, margin: float = 10) -> Box:
    """The part of a box x, y, w, h inside a frame of `width` x `height`, moved or enlarged so that its sides are at
    least `margin`; all in pixels. As PyTracking's `clip_box`, whose trackers pass it a margin of 10."""
    x, y, w, h = (float(v) for v in box)
    left, right = min(max(x, 0.0), width - margin), min(max(x + w, margin), width)
    top, bottom = min(max(y, 0.0), height - margin), min(max(y + h, margin), height)
    return left, top, max(right - left, margin), max(bottom - top, margin)


def smoothed(box: Sequence[float], last: Sequence[float], size_lr: float) -> Box:
    """A box x, y, w, h whose sides count `size_lr` and those of the `last` box the rest, about its own center."""
    sides = [size_lr * new + (1 - size_lr) * old for new, old in zip(box[2:], last[2:])]
    x, y = (at + (new - side) / 2 for at, new, side in zip(box, box[2:], sides))
    return float(x), float(y), float(sides[0]), float(sides[1])
