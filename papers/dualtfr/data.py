"""How template and search image are cut from the frames of a sequence."""

from __future__ import annotations

from common.data import pairs
from papers.dualtfr.recipes import Recipe


def transform(recipe: Recipe) -> pairs.PairTransform:
    """Template and search crops as the recipe asks for them."""
    return pairs.PairTransform(
        recipe.template_px, recipe.search_px, recipe.template_factor, recipe.search_factor, recipe.centre_jitter,
        recipe.scale_jitter, recipe.grey, recipe.flip, recipe.brightness,
    )
