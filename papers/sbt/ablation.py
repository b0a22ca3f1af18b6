"""What carries the paper: how many blocks let the images look at each other, and where they stand; beside it the head,
and the features in a plain correlation tracker.

``python -m papers.sbt.train ablation`` trains the contenders; ``--resume auto`` goes on where it was killed.
``python -m papers.sbt.ablation`` writes the README's table anew from results/ablation*.json.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from common.data import pairs
from common.metrics import trackers
from common.run import readme
from papers.sbt.figures import draw_ablation
from papers.sbt.model import VARIANTS
from papers.sbt.recipes import Recipe
from papers.sbt.train import train

SCORES = {"ao": "%", "iou": "%"}


def contenders(model: str) -> dict[str, dict[str, Any]]:
    """What each contender changes in a recipe of `model`; 'interleaved' is the paper's network. Nothing reads the
    template of 'none'; it goes through the network all the same, and its multiply-adds count."""
    blocks = VARIANTS[model]["depths"][2]
    half = len(VARIANTS[model]["cross_blocks"][2])

    def cross(*numbers: int) -> dict[str, Any]:
        return {"model_args": {"cross_blocks": ((), (), tuple(numbers))}}

    return {
        "none": cross(),
        "one": cross(VARIANTS[model]["cross_blocks"][2][0]),
        "early": cross(*range(1, half + 1)),
        "interleaved": {},
        "late": cross(*range(blocks - half + 1, blocks + 1)),
        "all": cross(*range(1, blocks + 1)),
        "mlp_head": {"head": "mlp"},
        "correlation": cross() | {"head": "correlation"},
        "correlation_sbt": {"head": "correlation"},
    }


def member(recipe: Recipe, contender: str) -> Recipe:
    """The recipe of one training."""
    known = contenders(recipe.model)
    if contender not in known:
        raise run.UserError(f"no contender {contender!r}; there are {', '.join(known)}")
    changes = known[contender]
    args = {**recipe.model_args, **changes.get("model_args", {})}
    return replace(recipe, contenders=(), **changes | {"model_args": args})


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains each contender with each seed, each in a run folder of its own, and reports; returns the ablation's
    folder. What is finished stays finished when it is resumed."""
    if recipe.seeds < 1 or recipe.model not in VARIANTS:
        raise run.UserError(f"an ablation needs --seeds of 1 or more and one of the models {', '.join(VARIANTS)}")
    root = trackers.data_folder(recipe, options.data)
    if not pairs.open_data(recipe, root).val:
        raise run.UserError(f"an ablation is scored on a validation split, and {root} has none that the recipe uses")
    members = {contender: member(recipe, contender) for contender in recipe.contenders}
    folder = run.open_run("sbt", name, recipe, options, world)
    seeds = list(range(options.seed, options.seed + recipe.seeds))
    found: dict[str, list[Path]] = {label: [] for label in members}
    for seed in seeds:
        for label, one in members.items():
            out = folder / f"seed{seed}"
            own = replace(options, out=out, resume="auto", seed=seed)
            done = [path.parent for path in (out / "sbt" / label).glob("*/results.json")]
            found[label] += done or [train(label, one, own, world, report=False)]
            if options.stop_at and not done:
                return folder
    if world.is_main:
        report(folder, name, found, seeds)
    return folder


def report(folder: Path, name: str, found: dict[str, list[Path]], seeds: list[int]) -> None:
    """Writes results.json with all contenders' figures, a chart, and the table at the end of report.md."""
    every, metrics = [], []
    for label, homes in found.items():
        runs = [json.loads((home / "results.json").read_text()) for home in homes]
        every += runs
        values = {
            "ao": [results["metrics"][0]["value"] for results in runs],
            "iou": [100 * run.read_log(home)[-1]["val/iou"] for home in homes],
        }
        for key, unit in SCORES.items():
            spread = {"spread": statistics.stdev(values[key])} if len(seeds) > 1 else {}
            metrics.append(run.metric(f"{label} {key}", statistics.mean(values[key]), unit) | spread | {"seeds": seeds})
        metrics.append(run.metric(f"{label} params", runs[0]["params"], "parameters"))
        metrics.append(run.metric(f"{label} flops", runs[0]["flops"], "multiply-adds"))
    draw_ablation(folder / "ablation.png", by_member(metrics))
    run.write_results(folder, {
        "paper": "sbt", "recipe": name, "data": every[0]["data"], "metrics": metrics,
        "params": max(r["params"] for r in every), "flops": max(r["flops"] for r in every),  # of the largest
        "wall_s": sum(r["wall_s"] for r in every), "peak_mem_bytes": run.peak_memory_bytes(),
        "throughput": None, "seed": seeds[0],
    })
    page = folder / "report.md"
    page.write_text(f"{page.read_text()}\n{table(metrics)}")


def by_member(metrics: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """contender -> key -> metric"""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        contender, key = metric["name"].split(" ")
        rows.setdefault(contender, {})[key] = metric
    return rows


def table(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender."""
    lines = ["| contender | parameters | multiply-adds | IoU on validation pairs | AO |", "|---" * 5 + "|"]
    for contender, row in by_member(metrics).items():
        counts = f"{row['params']['value']:,} | {row['flops']['value'] / 1e6:.1f} M"
        scores = [
            f"{row[key]['value']:.1f}" + (f" ± {row[key]['spread']:.1f}" if "spread" in row[key] else "")
            for key in ("iou", "ao")
        ]
        lines.append(f"| {contender} | {counts} | {' | '.join(scores)} |")
    seeds = metrics[0]["seeds"]
    over = "mean ± sample standard deviation over seeds" if len(seeds) > 1 else "one training, seed"
    return "\n".join([*lines, "", f"%, {over} {', '.join(map(str, seeds))}.", ""])


def write_table(path: Path, results: Path) -> None:
    """Rewrites what stands between the README's marker lines: a table of each record, under its data."""
    records = [json.loads(file.read_text()) for file in sorted(results.glob("ablation*.json"))]
    made = "\n".join(f"{record['data']}:\n\n{table(record['metrics'])}" for record in records)
    readme.fill(path, "ablation", made)


if __name__ == "__main__":
    write_table(Path(__file__).with_name("README.md"), Path(__file__).with_name("results"))
