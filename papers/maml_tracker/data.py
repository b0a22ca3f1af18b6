"""The support and target sets that are cut from a video."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.data import crops, pairs
from common.metrics import trackers
from common.run import Options, World
from papers.maml_tracker.model import Crops
from papers.maml_tracker.recipes import Recipe


def context_side(w: float, h: float) -> float:
    """Side of a target with its margin, sqrt((w + p) (h + p)) with p = (w + h) / 2."""
    margin = (w + h) / 2
    return math.sqrt((w + margin) * (h + margin))


def crop_around(box, recipe: Recipe, zoom: float = 1.0, shift_px: tuple[float, float] = (0.0, 0.0)) -> crops.Crop:
    """The crop that shows a box x, y, w, h (px) at the usual size times `zoom`, its middle `shift_px` (of the crop) off
    the box's centre."""
    x, y, w, h = (float(v) for v in box)
    side = context_side(w, h) * recipe.context / zoom
    dx, dy = (shift * side / recipe.crop_px for shift in shift_px)
    return crops.square(x + 0.5 * w + dx, y + 0.5 * h + dy, side, recipe.crop_px)


def zooms(recipe: Recipe) -> tuple[float, ...]:
    """Of the support set's crops."""
    return (1.0,) if recipe.zoom == 1 else (1.0, recipe.zoom, 1 / recipe.zoom)


def support_crops(box, recipe: Recipe, rng: np.random.Generator) -> list[crops.Crop]:
    """Of the support set: the target in the middle, then each zoomed copy moved off the middle at random."""
    first, *others = zooms(recipe)
    shifts = recipe.support_shift_px * rng.uniform(-1, 1, (len(others), 2))
    moved = [crop_around(box, recipe, zoom, tuple(shift)) for zoom, shift in zip(others, shifts)]
    return [crop_around(box, recipe, first), *moved]


def cut(frame: np.ndarray, crop: crops.Crop) -> np.ndarray:
    """(H, W, 3) -> (S, S, 3) uint8; the mean color beyond the frame."""
    return crops.cut(frame, crop, "mean")


def corners(crop: crops.Crop, box) -> np.ndarray:
    """A box x, y, w, h of the frame as x1, y1, x2, y2 in the crop, (4,) float64."""
    x, y, w, h = crop.to_crop(box)
    return np.array([x, y, x + w, y + h])


@dataclass(frozen=True)
class VideoSets:
    """Support and target set of one video, from two of its frames: what `pairs.Pairs` asks of a transform."""

    recipe: Recipe

    def __call__(self, samples: list[pairs.Sample], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """{"support": (Z, 3, S, S) uint8, "support_box": (Z, 4), "target": (3, S, S), "target_box": (4,) float32,
        "present": () bool}: boxes x1, y1, x2, y2 in crop pixels; Z crops of the support frame (`support_crops`).

        A target frame of another video is cut around that video's target: a negative that looks like an object.
        """
        recipe, (support, target) = self.recipe, samples
        around = support_crops(support.box, recipe, rng)
        shift = recipe.shift_px * rng.uniform(-1, 1, 2)
        moved = crop_around(target.box, recipe, math.exp(rng.uniform(*np.log(recipe.scale))), tuple(shift))
        picture = pairs.brighten(cut(target.image, moved), 1 + recipe.brightness * rng.uniform(-1, 1))
        if rng.random() < recipe.gray:
            picture = pairs.to_gray(picture)
        return {
            "support": torch.stack([crops.to_tensor(cut(support.image, crop)) for crop in around]),
            "support_box": torch.from_numpy(np.stack([corners(crop, support.box) for crop in around])).float(),
            "target": crops.to_tensor(picture),
            "target_box": torch.from_numpy(corners(moved, target.box)).float(),
            "present": torch.tensor(support.sequence is target.sequence),
        }


def training_batches(
    data: pairs.Data, recipe: Recipe, options: Options, world: World, start: int, end: int, report: Path
) -> DataLoader:
    """This rank's part of the batches of steps ``start + 1 .. end``; `report` names frames that cannot be read."""
    samples = pairs.Pairs(
        data.train, VideoSets(recipe), length=recipe.pairs_per_epoch, max_gap=recipe.max_gap,
        negatives=recipe.negatives, weights=trackers.shares(recipe), report=report,
    )
    return pairs.pairs_loader(
        samples, recipe.batch, end, seed=options.seed, start=start, rank=world.rank, world=world.size,
        workers=options.workers,
    )


def support_set(batch: dict[str, torch.Tensor], row: int, device: torch.device) -> Crops:
    """Ds of one video of a batch."""
    images, boxes = (batch[key][row].to(device, non_blocking=True) for key in ("support", "support_box"))
    ones = torch.ones(len(images), device=device)
    return Crops(images, boxes, ones.bool(), ones)


def target_set(batch: dict[str, torch.Tensor], rows: slice, device: torch.device) -> Crops:
    """Dt of one video of a batch, or the target images of several as one set."""
    images, boxes, present = (
        batch[key][rows].to(device, non_blocking=True) for key in ("target", "target_box", "present")
    )
    return Crops(images, boxes, present, torch.ones(len(images), device=device))
