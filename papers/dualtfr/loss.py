"""Which tokens are the target, and the loss on them. Boxes x, y, w, h are shares of the search crop.

As in the authors' next tracker, SBT: nothing is known of DualTFR's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss

from papers.dualtfr.model import Prediction
from papers.dualtfr.recipes import Recipe

BACKGROUND = 0.0625
"""Weight of a background token in the cross-entropy; a target's is 1."""


def positives(box_xywh: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, 4) boxes -> (B, grid * grid), True for the target's tokens: those whose top left corner lies in the box.

    A box between two corners of a row or column takes the next one. What sticks out of the crop is cut off; a box
    wholly outside has no tokens.
    """
    corners, along = torch.arange(grid, device=box_xywh.device) / grid, []
    for axis in (0, 1):
        start, stop = box_xywh[:, axis, None], (box_xywh[:, axis] + box_xywh[:, axis + 2])[:, None]
        inside = (corners >= start) & (corners < stop)
        next_one = (corners < start).sum(1).clamp(max=grid - 1)
        empty = ~inside.any(1, keepdim=True) & (stop > 0) & (start < 1)
        along.append(inside | (F.one_hot(next_one, grid).bool() & empty))
    columns, rows = along
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def totals(target: torch.Tensor) -> torch.Tensor:
    """What a batch's loss is divided by: (2,) the number of its target's tokens, and the sum of all tokens' weights."""
    count = target.sum()
    return torch.stack([count.float(), count + BACKGROUND * (target.numel() - count)])


class Loss(NamedTuple):
    """The terms of the loss before their weights. `iou` is for the log."""

    cls: torch.Tensor
    l1: torch.Tensor
    giou: torch.Tensor
    iou: torch.Tensor


def loss(prediction: Prediction, box_xywh: torch.Tensor, target: torch.Tensor, totals: torch.Tensor) -> Loss:
    """Cross-entropy of all tokens; L1 distance and 1 - GIoU of the boxes that the `target`'s tokens give.

    `target` is of `positives`. With the `totals` of a whole batch, the losses of its parts add up to the batch's.
    """
    tokens, weight = totals[0].clamp(min=1), totals[1]
    logits, boxes = prediction.logits.float(), prediction.boxes.float()[target]
    weights = torch.tensor([1.0, BACKGROUND], device=logits.device)  # class 0 is the target
    cls = F.cross_entropy(logits.flatten(0, 1), (~target).long().flatten(), weights, reduction="sum")
    truth = box_xywh[:, None].expand(*target.shape, 4)[target]
    l1 = F.l1_loss(boxes, box_convert(truth, "xywh", "cxcywh"), reduction="sum")
    corners, true_corners = box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth, "xywh", "xyxy")
    giou = generalized_box_iou_loss(corners, true_corners, reduction="sum")
    low, high = torch.maximum(corners, true_corners)[:, :2], torch.minimum(corners, true_corners)[:, 2:]
    shared = (high - low).clamp(min=0).prod(1)
    iou = (shared / (boxes[:, 2:].prod(1) + truth[:, 2:].prod(1) - shared)).sum().detach()
    return Loss(cls / weight, l1 / tokens, giou / tokens, iou / tokens)


def total(recipe: Recipe, terms: Loss) -> torch.Tensor:
    """What is minimised."""
    return recipe.cls_weight * terms.cls + recipe.l1_weight * terms.l1 + recipe.giou_weight * terms.giou
