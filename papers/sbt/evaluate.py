"""Scores of a tracker: ``python -m papers.sbt.evaluate CHECKPOINT --recipe NAME --data FOLDER [--baselines]``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors' as published.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.data import DataLoader

from common import run
from common.data import crops, loader, pairs
from common.metrics import trackers
from papers.sbt import loss
from papers.sbt.correlation import CorrelationNet, Siamese
from papers.sbt.model import VARIANTS, SBTBackbone, checkpoint_filter_fn, create_tracker, first_three
from papers.sbt.recipes import RECIPES, Recipe
from papers.sbt.tracker import SBTTracker


def build(recipe: Recipe) -> torch.nn.Module:
    """The recipe's network, at random."""
    errors = recipe.authors_errors
    try:
        if recipe.head != "correlation" and recipe.model not in VARIANTS:
            raise ValueError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
        if recipe.head != "correlation":
            return create_tracker(
                recipe.model, search_size=recipe.search_px, head=recipe.head, authors_errors=errors, **recipe.model_args
            )
        if recipe.model in VARIANTS:
            args = first_three(recipe.model) | recipe.model_args
            backbone = SBTBackbone(num_classes=0, authors_errors=errors, **args)
        else:
            backbone = Siamese(recipe.model, **recipe.model_args)
        return CorrelationNet(backbone, recipe.search_px)
    except (TypeError, ValueError, RuntimeError) as error:
        raise run.UserError(f"cannot build {recipe.model} with head {recipe.head}: {error}") from None


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
        positives = loss.assign(box, grid, recipe.authors_errors)
        with world.autocast():
            prediction = model(crops.normalize(z), crops.normalize(x))
        sums += torch.stack(loss.terms(prediction, box, positives, torch.ones(2, device=world.device))).double()
        totals += loss.totals(positives)
    run.add_up(sums)
    count, weight_sum = run.add_up(totals).tolist()
    count = max(count, 1)  # all targets may lie outside their crops
    return loss.named(loss.Terms(*(sums / torch.tensor([weight_sum, count, count, count]).to(sums)).tolist()))


def make_tracker(network: torch.nn.Module, recipe: Recipe, world: run.World) -> SBTTracker:
    """The network as a tracker."""
    return SBTTracker(network, recipe, world.amp or torch.float32)


def official(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors bear the names of the authors' code."""
    return any(name.startswith("backbone.patch_embed1.") for name in weights)


def convert_weights(weights: Mapping[str, torch.Tensor], network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A file's tensors under our names. The authors' were trained with what their code does, and go nowhere else."""
    if official(weights) and network.backbone.stages[0].norm_applied:
        raise run.UserError("these weights are the authors': take the recipe authors_base, _large or _huge for them")
    return checkpoint_filter_fn(weights, network)


PAPER = trackers.Paper(
    name="sbt",
    recipes={name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Recipe)},
    build=build, make_tracker=make_tracker, convert_weights=convert_weights, float32=lambda recipe: recipe.float32,
    rules={"lasot": "lasot_wh_valid"},  # the authors' evaluation
)

if __name__ == "__main__":
    run.main(lambda: trackers.main(PAPER))
