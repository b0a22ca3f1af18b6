"""Stands in for mmcv's compiled operators: torchvision's non-maximum suppression and RoIAlign, on CPUs and GPUs.

tools/mm.sh lays this file into mmcv as ``mmcv/_ext.py``, so it imports nothing of this repository. mmcv's functions and
modules call what is here by its name and keep their interface, gradients included; an operator that is not here says
so when it is called.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torchvision  # noqa: F401 (registers its operators)
from torch import Tensor

_AVERAGE = 1


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that stay, the best first. boxes (N, 4): x1, y1, x2, y2 in px; `offset`: 1 where the last
    pixel belongs to the box."""
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()  # mmcv compares overlaps with a float
    return torch.ops.torchvision.nms(boxes, scores, threshold)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, *, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:
    """Fills `output` (R, C, h, w) with `input` (B, C, H, W) in the regions (R, 5): picture, x1, y1, x2, y2."""
    if pool_mode != _AVERAGE:
        _missing("roi_align with pool_mode='max'")
    output.copy_(torch.ops.torchvision.roi_align(
        _single(input), _single(rois), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    ))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, *, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:
    """Fills `grad_input` (B, C, H, W) with the gradient that `grad_output` (R, C, h, w) gives it."""
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(
        _single(grad_output), _single(rois), spatial_scale, aligned_height, aligned_width, *grad_input.shape,
        sampling_ratio, aligned,
    ))


def _single(x: Tensor) -> Tensor:
    """Half precisions in float32: not every device has these operators in them."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def __getattr__(name: str):
    """Whatever else mmcv asks for when it is imported; a lack that shows when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: _missing(name)


def _missing(name: str) -> NoReturn:
    raise NotImplementedError(
        f"mmcv's operator {name} is not among those that torchvision has: MMCV_WITH_OPS=1 tools/mm.sh compiles all"
    )
