"""Which tokens are the target, and the terms of the loss. Boxes x, y, w, h are fractions of the search crop.

The weights are those of the authors' code; the paper's text was not at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from papers.sbt.model import Prediction

BACKGROUND_WEIGHT = 0.0625  # of a background token in the cross-entropy; a target's is 1
CE, L1, GIOU = 120.0, 70.0, 50.0  # weights of the terms in the loss
EPS = 1e-7  # added to areas that divide


def assign(box_xywh: Tensor, grid: int, authors_errors: bool = False) -> Tensor:
    """(B, 4) boxes -> (B, grid * grid), True for the tokens that the box covers: the positives. None are ignored.

    Column c is covered if ceil(grid * xmin) <= c < ceil(grid * xmax), a row likewise; of a box too small for that, the
    one at its upper left corner. What sticks out of the crop is cut off; a box wholly outside has no positives.

    With `authors_errors` a start left of or above the crop is what it is in the authors' code, an index counted from
    the far end: such a box has no positives, or has them on the wrong side.
    """
    low, high = box_xywh[:, :2], box_xywh[:, :2] + box_xywh[:, 2:]
    start, stop = (grid * low).ceil(), (grid * high).ceil()
    if authors_errors:
        stop = torch.where(stop == start, stop + 1, stop)
        start, stop = (torch.where(i < 0, (i + grid).clamp(min=0), i) for i in (start, stop))
    else:
        inside = ((low < 1) & (high > 0)).all(1, keepdim=True)
        start = torch.where(inside, start.clamp(0, grid - 1), grid)
        stop = torch.maximum(stop, start + 1)
    cells = torch.arange(grid, device=box_xywh.device)
    columns, rows = ((cells >= start[:, i, None]) & (cells < stop[:, i, None]) for i in (0, 1))
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def totals(positives: Tensor) -> Tensor:
    """What a batch's terms are divided by: (2,) the number of positives, and the sum of all tokens' weights in the
    cross-entropy."""
    count = positives.sum()
    return torch.stack([count.float(), count + BACKGROUND_WEIGHT * (positives.numel() - count)])


class Terms(NamedTuple):
    """Scalars, before their weights; `iou` is for the log."""

    ce: Tensor
    l1: Tensor
    giou: Tensor
    iou: Tensor


def terms(prediction: Prediction, box_xywh: Tensor, positives: Tensor, totals: Tensor) -> Terms:
    """Cross-entropy of all tokens; L1 distance and 1 - GIoU of the boxes that the positives give.

    Of a part of a batch: B crops with their boxes (B, 4) and `assign`'s positives (B, N). With the `totals` of the
    whole batch, the terms of its parts, on however many devices, add up to the batch's.
    """
    count, weight_sum = totals[0].clamp(min=1), totals[1]
    logits, boxes = prediction.logits.float(), prediction.boxes.float()
    weights = torch.where(positives, 1.0, BACKGROUND_WEIGHT).flatten()
    ce = F.cross_entropy(logits.flatten(0, 1), (~positives).long().flatten(), reduction="none")  # 0 is the target
    # Masked, not picked out: how many positives there are only the device knows, and asking makes the host wait.
    truth = box_convert(box_xywh, "xywh", "cxcywh")[:, None]
    l1 = (boxes - truth).abs().sum(-1).masked_fill(~positives, 0).sum()
    iou, giou = overlaps(box_convert(boxes, "cxcywh", "xyxy"), box_convert(box_xywh, "xywh", "xyxy")[:, None])
    missing, shared = (1 - giou).masked_fill(~positives, 0).sum(), iou.detach().masked_fill(~positives, 0).sum()
    return Terms((ce * weights).sum() / weight_sum, l1 / count, missing / count, shared / count)


def overlaps(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of boxes (..., 4): torchvision's formula, whose own code picks entries out by a mask."""
    (ax, ay, az, aw), (bx, by, bz, bw) = a_xyxy.unbind(-1), b_xyxy.unbind(-1)
    shared = (torch.minimum(az, bz) - torch.maximum(ax, bx)).clamp(min=0)
    shared = shared * (torch.minimum(aw, bw) - torch.maximum(ay, by)).clamp(min=0)
    union = (az - ax) * (aw - ay) + (bz - bx) * (bw - by) - shared
    hull = (torch.maximum(az, bz) - torch.minimum(ax, bx)) * (torch.maximum(aw, bw) - torch.minimum(ay, by))
    iou = shared / (union + EPS)
    return iou, iou - (hull - union) / (hull + EPS)


def total(terms: Terms) -> Tensor:
    """What is minimized."""
    return CE * terms.ce + L1 * terms.l1 + GIOU * terms.giou


def named(terms: Terms) -> dict[str, float]:
    """The loss and its terms for the log."""
    return {"loss": total(terms), **terms._asdict()}
