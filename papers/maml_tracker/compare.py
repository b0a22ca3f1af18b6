"""The paper's comparison: what gradient steps make of plain detection training, and what of meta-training.

``python -m papers.maml_tracker comparison`` runs it; ``--resume auto`` goes on where it was killed.

All members of a seed start from the same detector, that of "detection", and track by the same online steps. A detector
trained without gradient steps gets one rate for all tensors, chosen on training videos; from that of "detection"
meta-training starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common import run
from common.data import pairs
from common.metrics import trackers
from papers.maml_tracker.evaluate import PAPER, validate
from papers.maml_tracker.maml import MAML
from papers.maml_tracker.recipes import MEMBERS, Recipe, members
from papers.maml_tracker.tracker import MAMLTracker

# The same weights under other online steps.
VIEWS: dict[str, dict[str, Any]] = {
    "score": {},
    "no steps": {"first_steps": 0, "online_update": False},
    "first frame only": {"online_update": False},
    "accept 0.3": {"accept": 0.3},
    "ten first steps": {"first_steps": 10},
    "half the new size": {"size_lr": 0.5},
    "window 0.45": {"window": 0.45},
}
VIEWED = ("detection", "maml")  # the others track as their recipe says, and no other way
RATES = (0.01, 0.03, 0.1, 0.3)
LOSSES = (0, 1, 2, 4, 8)
COLUMNS = {
    **{view: run.Column(view) for view in VIEWS},
    **{f"loss after {k}": run.Column(f"loss after {k}", "", 3) for k in LOSSES},
    "rate": run.Column("rate", "", 3),
}
README_PARTS = {"compare": lambda records: run.tables(records, ("comparison", "comparison_real"), COLUMNS)}
SHARED_PARTS = {"real": trackers.real_table}


def compare(
    name: str, recipe: Recipe, options: run.Options, world: run.World, train: Callable[..., Path]
) -> Path:
    """Trains each member with each seed, tracks with all, and reports; returns the folder."""
    run.check_members(recipe.compare, MEMBERS)
    if unknown := {*recipe.views} - {*VIEWS}:
        raise run.UserError(f"no view {min(unknown)!r}; there are {', '.join(VIEWS)}")
    if recipe.compare[0] != "detection":
        raise run.UserError(f"all members start from 'detection': put it first in --compare, not {recipe.compare[0]!r}")
    if not recipe.val_pairs:
        raise run.UserError("members are compared by their losses on validation pairs: --val-pairs must be above 0")
    data = pairs.open_data(recipe, trackers.data_folder(recipe, options.data))

    def train_member(label: str, member: Recipe, own: run.Options, world: run.World) -> Path:
        if label != "detection":
            (first,) = (own.out / "maml_tracker" / "detection").glob("*/detection.safetensors")
            rate = run.read_json(first.parent / "scores.json")["rate"]  # as run.sweep keeps them
            member = replace(member, init=str(first), rate=rate)
        return train(label, member, own, world, report=False)

    def scores(home: Path, label: str) -> dict[str, float]:
        tracker, trained, settings, _ = PAPER.load(home, None, world)
        maml, trained = tracker.maml, replace(trained, val_pairs=recipe.val_pairs)
        if not (trained.inner_steps and trained.epochs):
            set_rate(maml, best_rate(maml, data, trained, world))
        rate, found = round(maml.mean_rate(), 6), {}
        for view in ("score", *(recipe.views if label in VIEWED else ())):
            online = replace(trained, **VIEWS[view])
            about = settings | {"recipe": asdict(online), "rate": rate}  # with the weights' digest
            found[view] = score(MAMLTracker(maml, online, world), home / "views" / view, data, about, world)
        losses = validate(maml, data, trained, world, steps=max(LOSSES))
        return found | {f"loss after {k}": losses[k] for k in LOSSES} | {"rate": rate}

    def baselines(folder: Path) -> dict[str, dict[str, float]]:
        return {
            label: {"score": score(make(), folder / label, data, {"baseline": label}, world)}
            for label, make in trackers.BASELINES.items()
        }

    return run.sweep(
        "maml_tracker", name, recipe, options, world, members(recipe), train_member, COLUMNS, scores=scores,
        fixed=baselines,
    )


def best_rate(maml: MAML, data: pairs.Data, recipe: Recipe, world: run.World) -> float:
    """Of RATES, that with the lowest loss on training videos after the first frame's steps. Changes `maml`."""
    videos = [sequence for found in data.train.values() for sequence in found if len(sequence) > 1]
    losses = {}
    for rate in RATES:
        set_rate(maml, rate)
        losses[rate] = validate(maml, replace(data, test=videos), recipe, world)[-1]
    return min(losses, key=losses.get)


@torch.no_grad()
def set_rate(maml: MAML, rate: float) -> None:
    for parameter in maml.rates.values():
        parameter.fill_(rate)


def score(
    tracker: trackers.Tracker, out: Path, data: pairs.Data, settings: dict[str, Any], world: run.World
) -> float:
    """Mean of the test sets' headline scores, AO or AUC; boxes made under the same `settings` are kept."""
    scores = []
    for dataset in dict.fromkeys(sequence.dataset for sequence in data.test):
        sequences = [sequence for sequence in data.test if sequence.dataset == dataset]
        trackers.evaluate(tracker, sequences, out, settings=settings, world=world)
        scores.append(next(iter(trackers.score(sequences, out).scores.values())))
    return statistics.mean(scores)
