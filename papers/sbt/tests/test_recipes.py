"""Which recipes train as the authors did."""

import pytest

from papers.sbt.evaluate import PAPER
from papers.sbt.recipes import RECIPES, Recipe

FULL = ("full", "full_large", "full_huge", "got10k", "got10k_large", "authors_base", "authors_large", "authors_huge")


@pytest.mark.parametrize("name", FULL)
def test_the_authors_recipes_take_small_objects_and_full_precision(name):
    assert RECIPES[name].coco_side_px == 0 and PAPER.float32(RECIPES[name]) and RECIPES[name].size_lr == 1


def test_all_others_are_small():
    small = [name for name, recipe in RECIPES.items() if isinstance(recipe, Recipe) and name not in FULL]
    assert "tiny" in small and not any(RECIPES[name].float32 or not RECIPES[name].coco_side_px for name in small)
