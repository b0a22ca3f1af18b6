"""Scores of a tracker: ``python -m papers.dualtfr.evaluate CHECKPOINT --recipe NAME --data FOLDER [--baselines]``.

CHECKPOINT is a run folder or a file of weights.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from common import run
from common.data import crops, loader, pairs
from common.metrics import trackers
from papers.dualtfr import loss
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


def crop_shapes(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """A template and a search crop of the recipe's sizes, empty, for counting."""
    return tuple(torch.empty(1, 3, side, side, device="meta") for side in (recipe.template_px, recipe.search_px))


@torch.inference_mode()
def validate(
    model: torch.nn.Module, samples: pairs.Pairs | None, recipe: Recipe, world: run.World, workers: int = 0
) -> dict[str, float]:
    """The loss and its terms over validation pairs, which are the same every time; nothing where there are none."""
    if samples is None:
        return {}
    grid = recipe.search_px // model.backbone.reduction
    mine = range(world.rank, len(samples), world.size)
    batches = [[(i, i) for i in mine[at : at + 32]] for at in range(0, len(mine), 32)]
    sums, totals = (torch.zeros(n, device=world.device, dtype=torch.float64) for n in (4, 2))
    model.eval()
    for batch in loader.progress(
        DataLoader(samples, batch_sampler=batches, num_workers=workers), "validating", active=world.is_main
    ):
        z, x, box = (batch[key].to(world.device) for key in ("template", "search", "search_box"))
        positives = loss.assign(box, grid)
        with world.autocast():
            prediction = model(crops.normalize(z), crops.normalize(x))
        sums += torch.stack(loss.terms(prediction, box, positives, torch.ones(2, device=world.device))).double()
        totals += loss.totals(positives)
    run.add_up(sums)
    count, weight_sum = run.add_up(totals).tolist()
    count = max(count, 1)  # all targets may lie outside their crops
    return loss.named(loss.Terms(*(sums / torch.tensor([weight_sum, count, count, count]).to(sums)).tolist()))


PAPER = trackers.Paper(
    name="dualtfr",
    recipes={name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Recipe)},
    build=build,
    make_tracker=lambda model, recipe, world: DualTFRTracker(model, recipe, world.amp or torch.float32),
)

if __name__ == "__main__":
    run.main(lambda: trackers.main(PAPER))
