"""The paper's claim in miniature: the same network with sparse, unshared and dense mixing, under one recipe.

``python -m papers.smlpnet.train sharing`` trains and compares them; ``--resume auto`` goes on where it was killed.
``python -m papers.smlpnet.sharing`` writes the README's tables anew from results/sharing*.json.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from common.run import readme
from papers.smlpnet.figures import draw_sharing
from papers.smlpnet.model import MIXINGS
from papers.smlpnet.recipes import Recipe
from papers.smlpnet.train import train

SCORES = {"top1": "%", "train_top1": "%", "gap": "points"}
COUNTS = {"params": "parameters", "flops": "multiply-adds"}


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains each mixing with each seed, each in a run folder of its own, and reports; returns the comparison's folder.

    What is finished stays finished when a killed comparison is resumed.
    """
    if unknown := set(recipe.mixings) - MIXINGS.keys():
        raise run.UserError(f"no mixing {', '.join(sorted(unknown))}; there are {', '.join(MIXINGS)}")
    if recipe.seeds < 1:
        raise run.UserError(f"a comparison needs at least one seed, not --seeds {recipe.seeds}")
    folder = run.open_run("smlpnet", name, recipe, options, world)
    seeds = list(range(options.seed, options.seed + recipe.seeds))
    found: dict[str, list[Path]] = {mixing: [] for mixing in recipe.mixings}
    for seed in seeds:
        for mixing in recipe.mixings:
            out = folder / f"seed{seed}"
            args = {**recipe.model_args, "mixing": mixing}
            one = replace(recipe, mixings=(), train_accuracy=True, model_args=args)
            own = replace(options, out=out, resume="auto", seed=seed)
            done = [path.parent for path in (out / "smlpnet" / mixing).glob("*/results.json")]
            found[mixing] += done or [train(mixing, one, own, world, draw=False)]
            if options.stop_at and not done:
                return folder
    if world.is_main:
        report(folder, name, found, seeds)
    return folder


def report(folder: Path, name: str, found: dict[str, list[Path]], seeds: list[int]) -> None:
    """Writes results.json with all mixings' figures, the picture, and the table at the end of report.md."""
    every, metrics = [], []
    for mixing, homes in found.items():
        runs = [json.loads((home / "results.json").read_text()) for home in homes]
        every += runs
        for key, unit in SCORES.items():
            values = [m["value"] for results in runs for m in results["metrics"] if m["name"] == key]
            spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
            metrics.append(run.metric(f"{mixing} {key}", statistics.mean(values), unit) | spread | {"seeds": seeds})
        metrics += [run.metric(f"{mixing} {key}", runs[0][key], unit) for key, unit in COUNTS.items()]
    draw_sharing(folder / "sharing.png", by_mixing(metrics))
    run.write_results(folder, {
        "paper": "smlpnet", "recipe": name, "data": every[0]["data"], "metrics": metrics,
        "params": every[0]["params"], "flops": every[0]["flops"],  # of the first mixing
        "wall_s": sum(r["wall_s"] for r in every), "peak_mem_bytes": run.peak_memory_bytes(),
        "throughput": None, "seed": seeds[0],
    })
    page = folder / "report.md"
    page.write_text(f"{page.read_text()}\n{table(metrics)}")


def table(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a row for each mixing."""
    lines = ["| mixing | parameters | multiply-adds | training | test | gap |", "|---" * 6 + "|"]
    for mixing, row in by_mixing(metrics).items():
        scores = [f"{row[k]['value']:.2f} ± {row[k].get('spread', 0):.2f}" for k in ("train_top1", "top1", "gap")]
        counts = f"{row['params']['value']:,} | {row['flops']['value'] / 1e6:.2f} M"
        lines.append(f"| {mixing} | {counts} | {' | '.join(scores)} |")
    seeds = ", ".join(map(str, metrics[0]["seeds"]))
    return "\n".join([*lines, "", f"Accuracy in %, mean ± sample standard deviation over seeds {seeds}.", ""])


def by_mixing(metrics: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """mixing -> key -> metric"""
    rows = {}
    for metric in metrics:
        mixing, key = metric["name"].split()
        rows.setdefault(mixing, {})[key] = metric
    return rows


def records() -> str:
    """The tables of results/sharing*.json, each under its data."""
    found = [json.loads(p.read_text()) for p in sorted(Path(__file__).with_name("results").glob("sharing*.json"))]
    return "\n".join(f"{record['data']}:\n\n{table(record['metrics'])}" for record in found)


if __name__ == "__main__":
    readme.fill(Path(__file__).with_name("README.md"), "sharing", records())
