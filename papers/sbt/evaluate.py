"""Scores of a tracker: ``python -m papers.sbt.evaluate CHECKPOINT --recipe NAME --data FOLDER [--baselines]``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors' as published.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from common import run
from common.metrics import trackers
from papers.sbt.correlation import CorrelationNet, Siamese
from papers.sbt.model import VARIANTS, SBTBackbone, create_tracker, first_three
from papers.sbt.official import convert
from papers.sbt.recipes import RECIPES, Recipe
from papers.sbt.tracker import SBTTracker


def build(recipe: Recipe) -> torch.nn.Module:
    """The recipe's network, at random."""
    try:
        if recipe.head == "correlation":
            known = recipe.model in VARIANTS
            backbone = (
                SBTBackbone(num_classes=0, published=recipe.published, **first_three(recipe.model) | recipe.model_args)
                if known else Siamese(recipe.model, **recipe.model_args)
            )
            return CorrelationNet(backbone, recipe.search_px)
        if recipe.model not in VARIANTS:
            raise ValueError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
        return create_tracker(
            recipe.model, search_size=recipe.search_px, head=recipe.head, published=recipe.published,
            **recipe.model_args,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise run.UserError(f"cannot build {recipe.model} with head {recipe.head}: {error}") from None


def make_tracker(network: torch.nn.Module, recipe: Recipe, world: run.World) -> SBTTracker:
    """The network as a tracker."""
    return SBTTracker(
        network, template_size=recipe.template_px, search_size=recipe.search_px,
        template_factor=recipe.template_factor, search_factor=recipe.search_factor, window=recipe.window,
        precision=world.amp or torch.float32, speed=recipe.speed, published=recipe.published,
    )


def official(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors bear the names of the authors' code."""
    return any(name.startswith("backbone.patch_embed1.") for name in weights)


def convert_weights(weights: Mapping[str, torch.Tensor], network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A file's tensors under our names. The authors' were trained with what their code does, and go nowhere else."""
    if official(weights) and network.backbone.stages[0].norm_applied:
        raise run.UserError("these weights are the authors': take the recipe authors_base, _large or _huge for them")
    return convert(weights)


PAPER = trackers.Paper(
    name="sbt",
    recipes={name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Recipe)},
    build=build, make_tracker=make_tracker, convert_weights=convert_weights,
    rules={"lasot": "lasot_pytracking"},  # the authors evaluate with PyTracking
)

if __name__ == "__main__":
    run.main(lambda: trackers.main(PAPER))
