"""How template and search image are cut from the frames of a sequence."""

from __future__ import annotations

from pathlib import Path

from common.data import pairs
from common.metrics import trackers
from papers.dualtfr.recipes import Recipe


def transform(recipe: Recipe) -> pairs.PairTransform:
    """Template and search crops as the recipe asks for them."""
    return pairs.PairTransform(
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
