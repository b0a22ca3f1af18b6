"""What the cross attention blocks, the kinds of block and the pre-training are worth, the paper's ablations in small:
``python -m papers.dualtfr ablation``, and with ``--compare-init RUN`` one member more, whose branches start there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common import run
from common.data import pairs
from common.metrics import trackers
from common.run import drawing
from common.run.sweep import Train
from papers.dualtfr.model import VARIANTS
from papers.dualtfr.recipes import RECIPES, Recipe

COLUMNS = {
    "got10k ao": run.Column("AO, %"), "pairs iou": run.Column("IoU on validation pairs, %"), "parameters": run.PARAMS,
}
# What each member is, and what its network is told; n stands for the number of blocks in the last stage.
MEMBERS = {
    "cab0": ("no CAB: the branches never meet", lambda n: {"cab_after": ()}),
    "cab1": ("1 CAB after all blocks", lambda n: {"cab_after": (n,)}),
    "cab2": ("2 CABs after all blocks", lambda n: {"cab_after": (n,) * 2}),
    "cab4": ("4 CABs after all blocks", lambda n: {}),
    "early": ("4 CABs before the global blocks", lambda n: {"cab_after": (0,) * 4}),
    "between": ("4 CABs, two after each of the last two blocks", lambda n: {"cab_after": (n - 1, n - 1, n, n)}),
    "local": ("as cab4, LABs in place of the GABs", lambda n: {"blocks": ("LAB",) * 3}),
    "no_bias": ("as cab4, GABs without position bias", lambda n: {"gab_bias": False}),
    "no_reference": ("as cab4, boxes without reference points", lambda n: {"reference_points": False}),
    "no_position": (
        "as cab4, nothing says where a token lies", lambda n: {"reference_points": False, "position": False}
    ),
    "pretrained": ("as cab4, the branches pre-trained", lambda n: {}),
}


def members(recipe: Recipe) -> dict[str, Recipe]:
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    added = ("pretrained",) if recipe.compare_init and "pretrained" not in recipe.compare else ()
    run.check_members(recipe.compare, MEMBERS)
    if "pretrained" in recipe.compare and not recipe.compare_init:
        raise run.UserError("the member pretrained needs --compare-init: a file, or the run folder of a pre-training")
    depth = VARIANTS[recipe.model].get("depths", (2, 2, 6))[-1]
    return {
        label: replace(
            recipe, model_args={**recipe.model_args, **MEMBERS[label][1](depth)}, compare=(), compare_init=None,
            init=recipe.compare_init if label == "pretrained" else recipe.init,
        )
        for label in recipe.compare + added
    }


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: Train) -> Path:
    """Trains every member with every seed and reports; returns the comparison's folder."""
    trained = members(recipe)
    root = trackers.data_folder(recipe, options.data)
    if not pairs.open_data(recipe, root).val:
        raise run.UserError(f"members are scored on a validation split, and {root} has none that the recipe uses")
    return run.sweep("dualtfr", name, recipe, options, world, trained, train, COLUMNS, scores=scores, picture=draw)


def scores(home: Path, _label: str = "") -> dict[str, float]:
    """Of a finished run, by the keys of `COLUMNS`."""
    found = run.read_scores(home)
    return {"got10k ao": found["got10k ao"], "pairs iou": found["pairs iou"], "parameters": found["params"]}


def draw(folder: Path, homes: Mapping[str, list[Path]]) -> None:
    """Bars of both scores."""
    figure, axes = drawing.plt.subplots(1, 2, figsize=(9, 0.35 * len(homes) + 1.2), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("pairs iou", "got10k ao")):
        found = [run.spread([scores(home)[key] for home in its]) for its in homes.values()]
        axis.barh(list(homes), [s["value"] for s in found], xerr=[s.get("spread", 0) for s in found])
        axis.set_xlabel(COLUMNS[key].title)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    drawing.save(figure, folder / "compare.png")


def tables(records: list[dict]) -> str:
    """Of the comparisons among the records, with what each member is in place of its label."""
    text = run.tables(records, [name for name, recipe in RECIPES.items() if getattr(recipe, "compare", ())], COLUMNS)
    for label, (meaning, _) in MEMBERS.items():
        text = text.replace(f"\n| {label} |", f"\n| {meaning} |")
    return text


README_PARTS = {"compare": tables}
SHARED_PARTS = {"real": trackers.real_table}
