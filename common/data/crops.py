"""Square crops around a target: what is cut, where boxes come to lie in it, and the way back.

Boxes are (..., 4) arrays of x, y, w, h in pixels, zero-based: a pixel covers [i, i + 1), so the frame is
[0, W) x [0, H) and the crop [0, size) x [0, size).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from common.run import UserError


@dataclass(frozen=True)
class Crop:
    """A square of the frame, resized: window [left, left + side) x [top, top + side) -> size x size pixels."""

    left: int
    top: int
    side: int
    size: int

    @property
    def scale(self) -> float:
        """Crop pixels per frame pixel."""
        return self.size / self.side

    def to_crop(self, boxes) -> np.ndarray:
        """Boxes x, y, w, h of the frame (px) -> the same boxes in the crop (px), (..., 4) float64."""
        return (np.asarray(boxes, dtype=np.float64) - (self.left, self.top, 0, 0)) * self.scale

    def to_frame(self, boxes) -> np.ndarray:
        """The inverse of `to_crop`."""
        return np.asarray(boxes, dtype=np.float64) / self.scale + (self.left, self.top, 0, 0)


def square(cx: float, cy: float, side: float, size: int) -> Crop:
    """The crop of `side` frame pixels (rounded up to a whole number) centered on (cx, cy), resized to `size`.

    The window falls on whole pixels, so the center is up to half a pixel off the crop's middle; boxes are mapped
    accordingly. `UserError` where there is nothing to crop.
    """
    whole = math.ceil(side)
    if whole < 1 or not math.isfinite(cx + cy):
        raise UserError(f"cannot crop {side} px around ({cx}, {cy}): the box it comes from is empty or not finite")
    return Crop(round(cx - 0.5 * whole), round(cy - 0.5 * whole), whole, size)


def around(box, factor: float, size: int) -> Crop:
    """The crop centered on a box, its side `factor` times the box's mean side sqrt(w h). See `square`."""
    x, y, w, h = (float(v) for v in box)
    side = math.sqrt(w * h) * factor if w > 0 and h > 0 else 0.0
    return square(x + 0.5 * w, y + 0.5 * h, side, size)


def _inside(first: int, side: int, length: int) -> slice:
    """Of the `side` rows (columns) of a window from `first` on, those that a frame of `length` rows has."""
    start, stop = max(-first, 0), side - max(first + side - length, 0)
    return slice(min(start, side), max(stop, start, 0))


def cut(frame: np.ndarray, crop: Crop, fill: float | Sequence[float] | Literal["mean"] = 0.0) -> np.ndarray:
    """The crop's pixels, (size, size, C) uint8, resized bilinearly (OpenCV's; not antialiased, as trackers do).

    What lies outside the frame takes the color `fill` (a gray level, one per channel, or 'mean': the frame's mean
    color).
    """
    height, width, channels = frame.shape
    rows, columns = _inside(crop.top, crop.side, height), _inside(crop.left, crop.side, width)
    seen = frame[: crop.top + rows.stop, : crop.left + columns.stop]
    window = seen[crop.top + rows.start :, crop.left + columns.start :]
    wide = crop.side > 8 * crop.size  # after a wild jitter: a padded copy would take hundreds of megabytes
    if window.shape[:2] == (crop.side, crop.side) and not wide:
        return cv2.resize(window, (crop.size, crop.size))
    color = np.round(cv2.mean(frame)[:channels] if isinstance(fill, str) else fill)
    if wide:
        step = 1 / crop.scale
        matrix = np.array([[step, 0, crop.left + 0.5 * step - 0.5], [0, step, crop.top + 0.5 * step - 0.5]])
        border = np.broadcast_to(color, channels).tolist()
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(seen, matrix, (crop.size, crop.size), flags=flags, borderValue=border)
    padded = np.empty((crop.side, crop.side, channels), dtype=np.uint8)
    padded[:] = color
    padded[rows, columns] = window
    return cv2.resize(padded, (crop.size, crop.size))


def padding(crop: Crop, width: int, height: int) -> np.ndarray:
    """(size, size) bool: crop pixels that take anything from outside a frame of `width` x `height`."""

    def touched(first: int, length: int) -> np.ndarray:
        outside = np.ones((crop.side, 1))
        outside[_inside(first, crop.side, length)] = 0
        return cv2.resize(outside, (1, crop.size)) > 0

    return touched(crop.top, height) | touched(crop.left, width).T


def jitter(box, center: float, scale: float, normal: Sequence[float], uniform: Sequence[float]) -> np.ndarray:
    """A box moved and resized at random, as SBT's code does: (4,) x, y, w, h.

    Sides are multiplied by exp(scale * normal), then the center moves by (uniform - 0.5) * center * sqrt(w h) of the
    new sides; `normal` and `uniform` are two numbers each, drawn from N(0, 1) and U(0, 1).
    """
    box = np.asarray(box, dtype=np.float64)
    sides = box[2:] * np.exp(scale * np.asarray(normal))
    middle = box[:2] + 0.5 * box[2:] + (np.asarray(uniform) - 0.5) * center * math.sqrt(sides.prod())
    return np.concatenate([middle - 0.5 * sides, sides])


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 pixels -> (C, H, W) uint8 tensor, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor to the device, for which the host does not wait: out of pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) uint8 RGB -> float32 with ImageNet's mean and standard deviation, on the tensor's device."""
    mean, std = _imagenet(pixels.device)
    return (pixels.float() / 255 - mean) / std


@functools.cache
def _imagenet(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, (3, 1, 1) each: made once, because a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        values = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in values)
    return mean, std
