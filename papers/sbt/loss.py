"""Which tokens are the target, and the three loss terms. Boxes x, y, w, h are shares of the search crop."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss

from papers.sbt.model import Prediction

BACKGROUND_WEIGHT = 0.0625  # of a background token in the cross-entropy
CE, L1, GIOU = 120.0, 70.0, 50.0  # weights of the terms in the loss


def assign(box_xywh: torch.Tensor, grid: int, published: bool = False) -> torch.Tensor:
    """(B, 4) boxes -> (B, grid * grid), True for the tokens that the box covers: the positives. None are ignored.

    Column c is covered if ceil(grid * xmin) <= c < ceil(grid * xmax), a row likewise; of a box too small for that, the
    one at its upper left corner. What sticks out of the crop is cut off; a box wholly outside has no positives.

    With `published` a start left of or above the crop is what it is in the authors' code, an index counted from
    the far end: such a box has no positives, or has them on the wrong side.
    """
    low, high = box_xywh[:, :2], box_xywh[:, :2] + box_xywh[:, 2:]
    start, stop = (grid * low).ceil(), (grid * high).ceil()
    stop = torch.where(stop == start, stop + 1, stop)
    if published:
        start, stop = (torch.where(i < 0, (i + grid).clamp(min=0), i) for i in (start, stop))
    else:
        inside = ((low < 1) & (high > 0)).all(1, keepdim=True)
        start = torch.where(inside, start.clamp(0, grid - 1), grid)
        stop = torch.maximum(stop, start + 1)
    cells = torch.arange(grid, device=box_xywh.device)
    columns, rows = ((cells >= start[:, i, None]) & (cells < stop[:, i, None]) for i in (0, 1))
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


class Terms(NamedTuple):
    """Scalars; `iou` is for the log."""

    ce: torch.Tensor
    l1: torch.Tensor
    giou: torch.Tensor
    iou: torch.Tensor


def weight_sum(positives: torch.Tensor) -> torch.Tensor:
    """Of all tokens' weights in the cross-entropy: 1 on the target, `BACKGROUND_WEIGHT` elsewhere."""
    count = positives.sum()
    return count + BACKGROUND_WEIGHT * (positives.numel() - count)


def terms(
    prediction: Prediction, box_xywh: torch.Tensor, positives: torch.Tensor, count: torch.Tensor | float,
    weights: torch.Tensor | float,
) -> Terms:
    """Loss terms of a part of a batch: B crops with their boxes (B, 4) and `assign`'s positives (B, N).

    `count` is the number of positives of the whole batch, at least 1, and `weights` its `weight_sum`: with them the
    terms of a batch's parts, on however many devices, add up to those of the batch.
    """
    target = (~positives).long()  # class 0 is the target
    class_weights = prediction.logits.new_tensor([1.0, BACKGROUND_WEIGHT], dtype=torch.float)
    ce = F.cross_entropy(prediction.logits.float().flatten(0, 1), target.flatten(), class_weights, reduction="sum")
    rows, _ = positives.nonzero(as_tuple=True)
    boxes, truth = prediction.boxes.float()[positives], box_convert(box_xywh, "xywh", "cxcywh")[rows]
    l1 = (boxes - truth).abs().sum()
    corners, true_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, truth))
    giou = generalized_box_iou_loss(corners, true_corners, reduction="sum")
    low, high = torch.maximum(corners, true_corners)[:, :2], torch.minimum(corners, true_corners)[:, 2:]
    shared = (high - low).clamp(min=0).prod(1)
    iou = (shared / (boxes[:, 2:].prod(1) + truth[:, 2:].prod(1) - shared)).sum().detach()
    return Terms(ce / weights, l1 / count, giou / count, iou / count)


def total(parts: Terms) -> torch.Tensor:
    return CE * parts.ce + L1 * parts.l1 + GIOU * parts.giou
