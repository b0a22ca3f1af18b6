"""Scores of a tracker: ``python -m papers.dualtfr.evaluate CHECKPOINT --recipe NAME --data FOLDER [--baselines]``.

CHECKPOINT is a run folder or a file of weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from common import run
from common.metrics import trackers
from papers.dualtfr.model import VARIANTS, DualTFR, create_tracker
from papers.dualtfr.recipes import RECIPES, Recipe
from papers.dualtfr.tracker import DualTFRTracker


def build(recipe: Recipe) -> DualTFR:
    """The recipe's network, at random."""
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    try:
        model = create_tracker(recipe.model, **recipe.model_args)
    except (TypeError, ValueError) as error:
        raise run.UserError(f"cannot build {recipe.model} with {recipe.model_args}: {error}") from None
    if recipe.search_px % model.backbone.reduction or recipe.template_px % model.backbone.reduction:
        raise run.UserError(
            f"crops of {recipe.template_px} and {recipe.search_px} px: expected multiples of the network's stride, "
            f"{model.backbone.reduction}"
        )
    grid = recipe.search_px // model.backbone.reduction
    try:
        for block in model.backbone.stages[-1].blocks:
            block.extent((grid, grid))
    except ValueError as error:
        raise run.UserError(f"--search-px {recipe.search_px}: {error}") from None
    return model


def weights_of(source: str) -> dict[str, torch.Tensor]:
    """A state dict from a run folder (its newest weights), a file, or a timm model, whose weights timm fetches."""
    path = Path(source)
    if path.is_dir():
        if not (found := run.load_checkpoint(path)):
            raise run.UserError(f"{path} is no run folder with a whole checkpoint")
        return found[1]["model"]
    if path.suffix:
        return run.load_weights(path)
    import timm

    if not timm.is_model(source):
        raise run.UserError(f"weights {source!r}: expected a run folder, a file of weights or the name of a timm model")
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # whatever a hub client raises without a network
        raise run.UserError(
            f"timm could not fetch the weights of {source} ({type(error).__name__}); give a file or a run folder with "
            "--weights, or start at random with --weights None"
        ) from None


PAPER = trackers.Paper(
    name="dualtfr",
    recipes={name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Recipe)},
    build=build,
    make_tracker=lambda model, recipe, world: DualTFRTracker(model, recipe, world.amp or torch.float32),
)

if __name__ == "__main__":
    run.main(lambda: trackers.main(PAPER))
