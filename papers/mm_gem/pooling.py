"""Boxes on feature maps: what a box must be, and the PoolAggregator.

R boxes, I images, C width of the feature map, H x W its grid; g x g cells of a pooled region.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from .configuration import InputError


def whole_images(count: int, size_px: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """The boxes (count, 5) of whole images of size (height, width)."""
    boxes = torch.zeros(count, 5, device=device)
    boxes[:, 0] = torch.arange(count, device=device)
    boxes[:, 3], boxes[:, 4] = size_px[1], size_px[0]
    return boxes


def clipped(boxes_R5: Tensor, images: int, size_px: tuple[int, int], *, checked: bool = False) -> Tensor:
    """Boxes (image index, left, top, right, bottom) in pixels of images of `size_px` = (height, width), clipped to
    their image.

    `InputError` if one is not finite, belongs to none of the `images`, or holds nothing of its image: RoI Align would
    read memory that is not the map's, or crash. Boxes that were `checked` on the CPU are not looked at again: the host
    would wait for a GPU.
    """
    if boxes_R5.dim() != 2 or boxes_R5.shape[1] != 5:
        raise InputError(
            f"boxes of shape {tuple(boxes_R5.shape)}; expected (R, 5): image index, left, top, right, bottom"
        )
    height, width = size_px
    boxes = boxes_R5.float()
    x, y = boxes[:, 1::2].clamp(0, width), boxes[:, 2::2].clamp(0, height)
    index = boxes[:, 0]
    if checked:
        return torch.stack([index, x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    finite, belongs = boxes.isfinite().all(1), (index >= 0) & (index < images) & (index == index.floor())
    holds = (x[:, 1] > x[:, 0]) & (y[:, 1] > y[:, 0])
    if not (good := finite & belongs & holds).all():
        row = int(good.int().argmin())
        values = boxes_R5[row].tolist()
        if not finite[row]:
            raise InputError(f"box {row}, {values}, is not of finite numbers")
        if not belongs[row]:
            raise InputError(f"box {row} is of image {values[0]:g}, but there are {images} images, counted from 0")
        raise InputError(f"box {row}, {values[1:]}, is empty in the image of {width} x {height} px")
    return torch.stack([index, x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


class PoolAggregator(nn.Module):
    """A feature map and boxes -> g x g cells for each box. No parameters; the whole image is a box like any other.

    The exact form is [ours]: RoI Align, whose cells are means of the map's bilinear interpolation at 2 x 2 points.
    """

    def __init__(self, grid: int):
        super().__init__()
        self.grid = grid

    def forward(
        self, maps_ICHW: Tensor, boxes_R5: Tensor, size_px: tuple[int, int], checked: bool = False
    ) -> Tensor:
        """Boxes as `clipped` takes them, which refuses bad ones. Returns (R, C, g, g)."""
        (height, width), (H, W) = size_px, maps_ICHW.shape[2:]
        boxes = clipped(boxes_R5, len(maps_ICHW), size_px, checked=checked)
        boxes[:, 1::2] *= W / width
        boxes[:, 2::2] *= H / height
        size = (self.grid, self.grid) if self.grid else (H, W)
        return roi_align(maps_ICHW.float(), boxes, size, sampling_ratio=2, aligned=True).to(maps_ICHW.dtype)
