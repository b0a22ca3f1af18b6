"""The paper's comparison: convolution, attention and MLP at several sizes, under one recipe.

``python -m papers.spach battle`` trains and compares them; ``--resume auto`` goes on where it was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import run
from common.data import images
from common.metrics import classification
from papers.spach.evaluate import PAPER
from papers.spach.figures import draw_battle, draw_receptive_field, inputs
from papers.spach.recipes import RECIPES, Recipe

COLUMNS = {
    "top1": run.Column("test, %", digits=2), "train_top1": run.Column("training, %", digits=2),
    "gap": run.Column("gap, points", "points", 2), "params": run.PARAMS, "flops": run.MULTIPLY_ADDS,
}
# What each network is told beyond its mixer.
NETWORKS = {
    "conv": {}, "attn": {}, "mlp": {}, "mlp_shared": {"share_mixers": True},
    "attn_bare": {"bypass": False}, "mlp_bare": {"bypass": False},
}


def member(recipe: Recipe, network: str, width: int) -> Recipe:
    """The recipe of one training."""
    args = {**recipe.model_args, "embed_dim": width, **NETWORKS[network]}
    model = recipe.model.format(mixer=network.split("_")[0])
    return replace(recipe, model=model, model_args=args, compare=(), widths=(), train_accuracy=True)


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Trains each network at each width with each seed and reports; returns the comparison's folder."""
    run.check_members(recipe.compare, NETWORKS)
    if "{mixer}" not in recipe.model or not recipe.widths:
        raise run.UserError(f"a comparison needs {{mixer}} in --model, got {recipe.model!r}, and one or more --widths")
    members = {f"{one}-{width}": member(recipe, one, width) for one in recipe.compare for width in recipe.widths}
    return run.sweep(
        "spach", name, recipe, options, world, members, train, COLUMNS, title="network-width",
        picture=partial(picture, recipe=recipe, data=options.data),
    )


def picture(folder: Path, runs: Mapping[str, list[Path]], *, recipe: Recipe, data: Path | None) -> None:
    """The paper's figure, and what the widest of each network sees."""
    rows = run.by_member(run.read_json(folder / "results.json")["metrics"], COLUMNS)
    draw_battle(folder / "battle.png", rows)
    val = images.open_images(classification.data_folder(recipe, data), "val")
    widest = {one: PAPER.load_run(runs[f"{one}-{max(recipe.widths)}"][0])[0] for one in recipe.compare}
    draw_receptive_field(folder / "receptive_field.png", widest, inputs(val, recipe))


COMPARISONS = [name for name, recipe in RECIPES.items() if recipe.compare]
README_PARTS = {"compare": lambda records: run.tables(records, COMPARISONS, COLUMNS, "network-width")}
