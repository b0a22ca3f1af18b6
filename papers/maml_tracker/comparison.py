"""The paper's comparison: what gradient steps make of plain detection training, and what of meta-training.

``python -m papers.maml_tracker.train comparison`` runs it; ``--resume auto`` goes on where it was killed.
``python -m papers.maml_tracker.comparison`` writes the README's tables anew from results/comparison*.json.

All contenders of a seed start from the same detector, that of contender "detection", and track by the same online
steps. A detector trained without gradient steps gets one rate for all tensors, chosen on training videos; from that of
"detection" meta-training starts.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import run
from common.data import pairs
from common.metrics import trackers
from common.run import readme
from papers.maml_tracker.evaluate import PAPER
from papers.maml_tracker.maml import MAML
from papers.maml_tracker.recipes import Recipe
from papers.maml_tracker.tracker import MAMLTracker
from papers.maml_tracker.train import train, validate

# An outer step of MAML takes about as long as this many of plain detection.
MAML_TO_DETECTION = 20
# From so large a rate as detection training's, longer outer steps blow up within tens of steps.
META_CLIP_NORM = 1.0
CONTENDERS: dict[str, dict[str, Any]] = {
    "detection": {"epochs": 0},
    "detection_long": {"inner_steps": 0},  # as long as maml
    "maml": {},
    "last_step": {"multi_step": "last"},
    "fixed_rate": {"rate_lr": 0.0},
    "per_filter": {"granularity": "per_filter"},
    "first_order": {"second_order": False},
}
# The same network under other online steps.
VIEWS: dict[str, dict[str, Any]] = {
    "no steps": {"first_steps": 0, "online_update": False},
    "first frame only": {"online_update": False},
}
VIEWED = ("detection", "maml")
RATES = (0.01, 0.03, 0.1, 0.3)
LOSSES = (0, 1, 2, 4, 8)


def member(recipe: Recipe, contender: str, start: str | None, rate: float | None = None) -> Recipe:
    """The recipe of one training, from the detector in the file `start` and its rate."""
    if contender not in CONTENDERS:
        raise run.UserError(f"no contender {contender!r}; there are {', '.join(CONTENDERS)}")
    own = replace(recipe, contenders=(), seeds=1, start=start, val_pairs=0, **CONTENDERS[contender])
    if start:
        own = replace(own, detection_epochs=0, rate=rate)
        if own.inner_steps:
            own = replace(own, clip_norm=META_CLIP_NORM)
    if contender == "detection_long":
        epochs = MAML_TO_DETECTION * recipe.epochs
        own = replace(own, epochs=epochs, drop_epochs=tuple(MAML_TO_DETECTION * e for e in recipe.drop_epochs))
    return own


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains each contender with each seed, each in a run folder of its own, tracks with all, and reports; returns
    the folder. What is finished stays finished when a killed comparison is resumed."""
    if recipe.contenders[0] != "detection" or recipe.seeds < 1:
        raise run.UserError("a comparison needs at least one of --seeds, and 'detection' as the first of --contenders")
    folder = run.open_run("maml_tracker", name, recipe, options, world)
    data = pairs.open_data(recipe, trackers.data_folder(recipe, options.data))
    seeds = list(range(options.seed, options.seed + recipe.seeds))
    found: dict[str, list[dict[str, float]]] = {}
    homes = []
    for seed in seeds:
        start, rate = None, None
        for contender in recipe.contenders:
            out = folder / f"seed{seed}"
            own = replace(options, out=out, resume="auto", seed=seed)
            done = [path.parent for path in (out / "maml_tracker" / contender).glob("*/results.json")]
            one = member(recipe, contender, start, rate)
            home = done[0] if done else train(contender, one, own, world, report=False)
            if options.stop_at and not done:
                return folder
            homes.append(home)
            measured = replace(one, val_pairs=recipe.val_pairs)
            for label, scores in measure(home, contender, measured, data, world).items():
                found.setdefault(label, []).append(scores)
            start, rate = start or str(home / "detection.safetensors"), found["detection"][-1]["rate"]
    for label, make in trackers.BASELINES.items():
        found[label] = [{"score": score(make(), folder / label, data, world)}]
    if world.is_main:
        report(folder, name, found, seeds, homes)
    return folder


def measure(
    home: Path, contender: str, recipe: Recipe, data: pairs.Data, world: run.World
) -> dict[str, dict[str, float]]:
    """Scores of a finished training, and of it under other online steps: kept in its folder, by label."""
    kept = home / "comparison.json"
    if kept.exists():
        return json.loads(kept.read_text())
    tracker, *_ = PAPER.load(home, None, world)
    maml = tracker.maml
    if not (recipe.inner_steps and recipe.epochs):
        training = replace(data, test=[s for found in data.train.values() for s in found if len(s) > 1])
        set_rate(maml, min(RATES, key=lambda rate: validate(set_rate(maml, rate), training, recipe, world)[-1]))
    found = {}
    for label, changes in {"": {}, **(VIEWS if contender in VIEWED else {})}.items():
        tracker = MAMLTracker(maml, replace(recipe, **changes), world)
        reached = score(tracker, home / "views" / (label or "own"), data, world)
        found[f"{contender}, {label}" if label else contender] = {"score": reached}
    losses = validate(maml, data, recipe, world, steps=max(LOSSES))
    rate = torch.cat([rate.flatten() for rate in maml.rates.values()]).mean().item()
    found[contender] |= {f"loss after {k}": losses[k] for k in LOSSES} | {"rate": round(rate, 6)}
    if world.is_main:
        run.write_json(kept, found)
    return found


def set_rate(maml: MAML, rate: float) -> MAML:
    with torch.no_grad():
        for parameter in maml.rates.values():
            parameter.fill_(rate)
    return maml


def score(tracker: trackers.Tracker, out: Path, data: pairs.Data, world: run.World) -> float:
    """Mean of the test sets' headline scores, AO or AUC."""
    scores = []
    for dataset in dict.fromkeys(sequence.dataset for sequence in data.test):
        sequences = [sequence for sequence in data.test if sequence.dataset == dataset]
        trackers.evaluate(tracker, sequences, out, settings={}, world=world)
        scores.append(next(iter(trackers.score(sequences, out).scores.values())))
    return statistics.mean(scores)


def report(
    folder: Path, name: str, found: dict[str, list[dict[str, float]]], seeds: list[int], homes: list[Path]
) -> None:
    """Writes results.json with all contenders' figures, and the table at the end of report.md."""
    runs, metrics = [json.loads((home / "results.json").read_text()) for home in homes], []
    for label, runs_of_it in found.items():
        for key in runs_of_it[0]:
            values = [scores[key] for scores in runs_of_it]
            spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
            row = run.metric(f"{label}: {key}", statistics.mean(values), "%" if key == "score" else "")
            metrics.append(row | spread | ({"seeds": seeds} if label not in trackers.BASELINES else {}))
    run.write_results(folder, {
        "paper": "maml_tracker", "recipe": name, "data": runs[0]["data"], "metrics": metrics,
        "params": max(r["params"] for r in runs), "flops": runs[0]["flops"],
        "wall_s": sum(r["wall_s"] for r in runs), "peak_mem_bytes": run.peak_memory_bytes(),
        "throughput": None, "seed": seeds[0],
    })
    page = folder / "report.md"
    page.write_text(f"{page.read_text()}\n{table(metrics)}")


def table(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        label, key = metric["name"].split(": ")
        rows.setdefault(label, {})[key] = metric
    columns = ["score", *(f"loss after {k}" for k in LOSSES), "rate"]
    lines = [f"| contender | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | {' | '.join(_cell(row[key]) if key in row else '' for key in columns)} |")
    seeds = ", ".join(map(str, metrics[0]["seeds"]))
    return "\n".join([*lines, "", f"Mean ± sample standard deviation over seeds {seeds}.", ""])


def _cell(metric: dict[str, Any]) -> str:
    digits = 1 if metric["unit"] == "%" else 3
    spread = f" ± {metric['spread']:.{digits}f}" if "spread" in metric else ""
    return f"{metric['value']:.{digits}f}{spread}"


def records() -> str:
    """The tables of results/comparison*.json, each under its data."""
    found = [json.loads(p.read_text()) for p in sorted(Path(__file__).with_name("results").glob("comparison*.json"))]
    return "\n".join(f"{record['data']}:\n\n{table(record['metrics'])}" for record in found)


if __name__ == "__main__":
    readme.fill(Path(__file__).with_name("README.md"), "comparison", records())
