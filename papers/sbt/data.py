"""How template and search image are cut from the frames of a sequence, and where the authors' code errs in that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.data import crops, pairs
from common.metrics import trackers
from papers.sbt.recipes import Recipe


def transform(recipe: Recipe) -> pairs.PairTransform:
    """Template and search crops as the recipe asks for them."""
    return (AuthorsTransform if recipe.authors_errors else pairs.PairTransform)(
        recipe.template_px, recipe.search_px, recipe.template_factor, recipe.search_factor, recipe.center_jitter,
        recipe.scale_jitter, recipe.gray, recipe.flip, recipe.brightness,
    )


def training_pairs(recipe: Recipe, data: pairs.Data, report: Path) -> pairs.Pairs:
    """An epoch of them; frames that cannot be read go to `report`."""
    return pairs.Pairs(
        data.train, transform(recipe), length=recipe.pairs_per_epoch, max_gap=recipe.max_gap,
        weights=trackers.shares(recipe), report=report,
    )


def validation_pairs(recipe: Recipe, data: pairs.Data) -> pairs.Pairs | None:
    """None where the data have no validation split."""
    if not data.val:
        return None
    sets = {"val": data.val}
    return pairs.Pairs(sets, transform(recipe), length=recipe.val_pairs, max_gap=recipe.max_gap, limit=0)


@dataclass(frozen=True)
class AuthorsCrop(crops.Crop):
    """A crop into which boxes are mapped as if the center that it was cut around came to lie on a given point of it.
    Windows fall on whole pixels: that is up to half a pixel off."""

    off_px: tuple[float, float]
    """The error, in pixels of the frame."""

    def to_crop(self, boxes) -> np.ndarray:
        return super().to_crop(np.asarray(boxes, dtype=np.float64) - (*self.off_px, 0, 0))

    def to_frame(self, boxes) -> np.ndarray:
        return super().to_frame(boxes) + (*self.off_px, 0, 0)


def authors_around(box, factor: float, size: int, center_at: float) -> AuthorsCrop:
    """`crops.around`, with the box's center mapped to (center_at, center_at) of the crop: the authors' code takes
    (size - 1) / 2 in training and size / 2 in tracking."""
    crop = crops.around(box, factor, size)
    x, y, w, h = (float(v) for v in box)
    reach = center_at / crop.scale
    return AuthorsCrop(
        crop.left, crop.top, crop.side, size, (x + 0.5 * w - reach - crop.left, y + 0.5 * h - reach - crop.top)
    )


def authors_frame(frame: np.ndarray) -> np.ndarray:
    """What the authors' code sees of a frame: a crop that reaches beyond the right or bottom border loses the last
    column or row."""
    return frame[:-1, :-1]


@dataclass(frozen=True)
class AuthorsTransform(pairs.PairTransform):
    """Both errors, in training."""

    def around(self, box, factor: float, size: int) -> AuthorsCrop:
        return authors_around(box, factor, size, (size - 1) / 2)

    def __call__(self, samples: list[pairs.Sample], rng: np.random.Generator) -> dict[str, torch.Tensor] | None:
        return super().__call__([replace(s, image=authors_frame(s.image)) for s in samples], rng)
