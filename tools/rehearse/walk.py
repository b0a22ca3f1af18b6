"""A recipe walked from its data to its hours, and the tables of what was found."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.run.cases import Rehearsal, TrainingCost
from tools.rehearse import curve
from tools.rehearse.cost import UTILISATIONS, Cost, cost
from tools.rehearse.stage import Shown, rehearse_parts, rehearse_step

CARD_GB = 80


@dataclass
class Row:
    """What a rehearsal says of a recipe."""

    recipe: str
    why_not: str
    """Empty: it is ready."""
    cost: Cost | None
    shown: Shown
    rates: str = ""


def walk(paper: str, name: str, recipe: Any, data: Path, **options: Any) -> Row:
    """Step, schedule, memory and hours of a recipe, its `data` a few files in the real layout."""
    cases = importlib.import_module(f"papers.{paper}.cases")
    return judge(paper, name, cases.rehearsal(recipe), cases.training_cost(recipe), data, **options)


def judge(paper: str, name: str, work: Rehearsal, counted: TrainingCost, data: Path, **options: Any) -> Row:
    """As `walk`, of what a paper's cases.py says."""
    per_epoch = work.samples // counted.batch
    choose = curve.turning_points(work.curve, per_epoch)
    shown = (
        rehearse_parts(work, choose) if work.train is None
        else rehearse_step(name, work, data, choose, samples=work.samples, **options)
    )
    if shown.fault:
        return Row(name, shown.fault, None, shown)
    rates = {step: groups[0][0] for step, groups in shown.rates.items()}
    found = cost(paper, name, work, counted, shown)
    why = curve.differs(work.curve, rates, shown.steps, per_epoch)
    if not why and not found.fits(CARD_GB):
        why = f"{found.memory_gb:.0f} GB do not fit into a card of {CARD_GB} GB at {shown.batch} samples"
    return Row(name, why, found, shown, curve.told(work.curve, rates, per_epoch))


HEAD = f"""# Full-scale recipes, rehearsed

Made by `make rehearse`, without the data and without a GPU (tools/rehearse). Hours are an estimate, on 8 A100 of 80 GB:
the larger of what {UTILISATIONS[1]:.0%} to {UTILISATIONS[0]:.0%} of peak FLOP/s give and what 16 loader processes a GPU
can feed. Memory is that of one GPU. Processes: loaders that one GPU needs not to wait, between the same two paces.

| recipe | ready | hours | GB | batch on a GPU | processes | learning rate |
|---|---|---|---|---|---|---|
"""


def table(rows: list[Row]) -> str:
    return HEAD + "".join(_line(row) for row in rows)


def _line(row: Row) -> str:
    ready = f"no: {row.why_not}" if row.why_not else "yes"
    if row.cost is None:
        return f"| {row.recipe} | {ready} | | | {row.shown.batch or ''} | | |\n"
    low, high = row.cost.hours
    processes = "" if row.cost.processes is None else "{} to {}".format(*row.cost.processes)
    return (
        f"| {row.recipe} | {ready} | {low:.3g} to {high:.3g} | {row.cost.memory_gb:.1f} | {row.shown.batch} | "
        f"{processes} | {row.rates} |\n"
    )
