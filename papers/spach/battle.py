"""The paper's comparison: convolution, attention and MLP at several sizes, under one recipe.

``python -m papers.spach.train battle`` fights it; ``--resume auto`` goes on where it was killed.
``python -m papers.spach.battle`` writes the README's tables anew from results/battle*.json.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from common.data import images
from common.metrics import classification
from common.run import readme
from papers.spach.evaluate import PAPER
from papers.spach.figures import draw_battle, draw_sight, pictures
from papers.spach.recipes import Recipe
from papers.spach.train import train

SCORES = {"top1": "%", "train_top1": "%", "gap": "points"}
COUNTS = {"params": "parameters", "flops": "multiply-adds"}
# What each contender's model is told beyond its mixer.
CONTENDERS = {
    "conv": {}, "attn": {}, "mlp": {}, "mlp_shared": {"share_mixers": True},
    "attn_bare": {"bypass": False}, "mlp_bare": {"bypass": False},
}


def member(recipe: Recipe, contender: str, width: int) -> Recipe:
    """The recipe of one training."""
    if contender not in CONTENDERS:
        raise run.UserError(f"no contender {contender!r}; there are {', '.join(CONTENDERS)}")
    args = {**recipe.model_args, "embed_dim": width, **CONTENDERS[contender]}
    model = recipe.model.format(mixer=contender.split("_")[0])
    return replace(recipe, model=model, model_args=args, contenders=(), widths=(), train_accuracy=True)


def fight(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains each contender at each width with each seed, each in a run folder of its own, and reports; returns the
    battle's folder. What is finished stays finished when a killed battle is resumed."""
    if "{mixer}" not in recipe.model or not recipe.widths or recipe.seeds < 1:
        raise run.UserError("a battle needs {mixer} in --model, and at least one of --widths and of --seeds")
    members = {f"{c}-{w}": member(recipe, c, w) for c in recipe.contenders for w in recipe.widths}
    folder = run.open_run("spach", name, recipe, options, world)
    seeds = list(range(options.seed, options.seed + recipe.seeds))
    found: dict[str, list[Path]] = {label: [] for label in members}
    for seed in seeds:
        for label, one in members.items():
            out = folder / f"seed{seed}"
            own = replace(options, out=out, resume="auto", seed=seed)
            done = [path.parent for path in (out / "spach" / label).glob("*/results.json")]
            found[label] += done or [train(label, one, own, world, draw=False)]
            if options.stop_at and not done:
                return folder
    if world.is_main:
        val = images.open_images(classification.data_folder(recipe, options.data), "val")
        largest = {c: PAPER.load_run(found[f"{c}-{max(recipe.widths)}"][0])[0] for c in recipe.contenders}
        draw_sight(folder / "what_each_mixing_sees.png", largest, pictures(val, recipe))
        report(folder, name, found, seeds)
    return folder


def report(folder: Path, name: str, found: dict[str, list[Path]], seeds: list[int]) -> None:
    """Writes results.json with all contenders' figures, the paper's figure, and the table at the end of report.md."""
    every, metrics = [], []
    for label, homes in found.items():
        runs = [json.loads((home / "results.json").read_text()) for home in homes]
        every += runs
        for key, unit in SCORES.items():
            values = [m["value"] for results in runs for m in results["metrics"] if m["name"] == key]
            spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
            metrics.append(run.metric(f"{label} {key}", statistics.mean(values), unit) | spread | {"seeds": seeds})
        metrics += [run.metric(f"{label} {key}", runs[0][key], unit) for key, unit in COUNTS.items()]
    draw_battle(folder / "battle.png", by_member(metrics))
    run.write_results(folder, {
        "paper": "spach", "recipe": name, "data": every[0]["data"], "metrics": metrics,
        "params": max(r["params"] for r in every), "flops": max(r["flops"] for r in every),  # of the largest
        "wall_s": sum(r["wall_s"] for r in every), "peak_mem_bytes": run.peak_memory_bytes(),
        "throughput": None, "seed": seeds[0],
    })
    page = folder / "report.md"
    page.write_text(f"{page.read_text()}\n{table(metrics)}")


def by_member(metrics: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """(contender, width) -> key -> metric"""
    rows = {}
    for metric in metrics:
        contender, width, key = re.split("[- ]", metric["name"])
        rows.setdefault((contender, int(width)), {})[key] = metric
    return rows


def table(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender at each width."""
    lines = ["| contender | width | parameters | multiply-adds | training | test | gap |", "|---" * 7 + "|"]
    for (contender, width), row in by_member(metrics).items():
        scores = [f"{row[k]['value']:.2f} ± {row[k].get('spread', 0):.2f}" for k in ("train_top1", "top1", "gap")]
        counts = f"{row['params']['value']:,} | {row['flops']['value'] / 1e6:.2f} M"
        lines.append(f"| {contender} | {width} | {counts} | {' | '.join(scores)} |")
    seeds = ", ".join(map(str, metrics[0]["seeds"]))
    return "\n".join([*lines, "", f"Accuracy in %, mean ± sample standard deviation over seeds {seeds}.", ""])


def records() -> str:
    """The tables of results/battle*.json, each under its data."""
    found = [json.loads(p.read_text()) for p in sorted(Path(__file__).with_name("results").glob("battle*.json"))]
    return "\n".join(f"{record['data']}:\n\n{table(record['metrics'])}" for record in found)


if __name__ == "__main__":
    readme.fill(Path(__file__).with_name("README.md"), "battle", records())
