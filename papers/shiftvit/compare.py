"""The paper's claim in miniature: the shift, nothing in its place, and attention, at equal size under one recipe.

``python -m papers.shiftvit attention --data FOLDER`` trains and compares them; ``--resume auto`` goes on where it was
killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import run
from common.data import images, loader
from common.metrics import classification
from papers.shiftvit.figures import draw_learning, learning
from papers.shiftvit.recipes import RECIPES, Recipe

COLUMNS = {
    "top1": run.Column("top-1, %", digits=2), "top5": run.Column("top-5, %", digits=2),
    "cpu_s": run.Column("training, s of one core", "s", 0), "params": run.PARAMS, "flops": run.MULTIPLY_ADDS,
}
NETWORKS = ("shift", "no_shift", "swin")


def member(recipe: Recipe, network: str) -> Recipe:
    """The recipe of one training."""
    alone = replace(recipe, compare=())
    if network == "no_shift":  # more parts than channels: none is left to move
        return replace(alone, model_args={**recipe.model_args, "n_div": 10**6})
    if network == "swin":
        swin = RECIPES["cifar10_cpu_swin"]
        size = {"img_size": recipe.input_size_px, "patch_size": recipe.model_args.get("patch_size", 4)}
        return replace(alone, model=swin.model, model_args=swin.model_args | size)
    return alone


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Trains each network with each seed and reports; returns the comparison's folder."""
    run.check_members(recipe.compare, NETWORKS)
    data = images.open_images(classification.data_folder(recipe, options.data), "train")
    return run.sweep(
        "shiftvit", name, recipe, options, world, {one: member(recipe, one) for one in recipe.compare}, train, COLUMNS,
        scores=scores, title="network",
        picture=partial(picture, steps_per_epoch=loader.steps_per_epoch(len(data), recipe.batch)),
    )


def scores(home: Path, label: str) -> dict[str, float]:
    """A run's metrics, and how long its training kept the processor, in seconds."""
    return run.read_scores(home, label) | {"cpu_s": learning(run.read_log(home))[1, -1]}


def picture(folder: Path, runs: Mapping[str, list[Path]], *, steps_per_epoch: int) -> None:
    draw_learning(folder / "attention.png", runs, steps_per_epoch)


COMPARISONS = [name for name, recipe in RECIPES.items() if recipe.compare]
README_PARTS = {"compare": lambda records: run.tables(records, COMPARISONS, COLUMNS, "network")}
