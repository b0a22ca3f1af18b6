"""What the cross attention blocks, the kinds of block and the pre-training are worth: the paper's ablations in small.

``python -m papers.dualtfr.train ablation`` trains every contender with every seed, and with ``--pretrained RUN`` one
more, whose branches start from that pre-training; ``--resume auto`` goes on where it was killed.
``python -m papers.dualtfr.ablation`` writes the README's table anew from results/ablation*.json.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from common.run import drawing, readme
from papers.dualtfr.model import VARIANTS
from papers.dualtfr.recipes import Recipe
from papers.dualtfr.train import train

# What each contender is, and what its network is told; n stands for the number of blocks in the last stage.
CONTENDERS = {
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


def member(recipe: Recipe, contender: str) -> Recipe:
    """The recipe of one training."""
    if contender not in CONTENDERS:
        raise run.UserError(f"no contender {contender!r}; there are {', '.join(CONTENDERS)}")
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    if contender == "pretrained" and not recipe.pretrained:
        raise run.UserError("the contender pretrained needs --pretrained: a file, or the run folder of a pre-training")
    depth = VARIANTS[recipe.model].get("depths", (2, 2, 6))[-1]
    args = {**recipe.model_args, **CONTENDERS[contender][1](depth)}
    weights = recipe.pretrained if contender == "pretrained" else recipe.weights
    return replace(recipe, model_args=args, weights=weights, contenders=(), pretrained=None, seeds=1)


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains each contender with each seed, each in a run folder of its own, and reports; returns the comparison's
    folder. What is finished stays finished when a killed comparison is resumed."""
    if recipe.seeds < 1:
        raise run.UserError(f"--seeds {recipe.seeds}: expected at least 1")
    added = ("pretrained",) if recipe.pretrained and "pretrained" not in recipe.contenders else ()
    members = {contender: member(recipe, contender) for contender in recipe.contenders + added}
    folder = run.open_run("dualtfr", name, recipe, options, world)
    seeds = list(range(options.seed, options.seed + recipe.seeds))
    found: dict[str, list[Path]] = {contender: [] for contender in members}
    for seed in seeds:
        for contender, one in members.items():
            out = folder / f"seed{seed}"
            done = [path.parent for path in (out / "dualtfr" / contender).glob("*/results.json")]
            own = replace(options, out=out, resume="auto", seed=seed)
            found[contender] += done or [train(contender, one, own, world, report=False)]
            if options.stop_at and not done:
                return folder
    if world.is_main:
        report(folder, name, found, seeds)
    return folder


def report(folder: Path, name: str, found: dict[str, list[Path]], seeds: list[int]) -> None:
    """Writes results.json with all contenders' scores, a picture of them, and the table at the end of report.md."""
    every = [json.loads((home / "results.json").read_text()) for homes in found.values() for home in homes]
    metrics = []
    for contender, homes in found.items():
        runs = [json.loads((home / "results.json").read_text()) for home in homes]
        for first in runs[0]["metrics"]:
            if re.match(r"\w+/\S+ ", first["name"]) or "fps" in first["name"]:
                continue  # a single sequence; a speed
            values = [m["value"] for results in runs for m in results["metrics"] if m["name"] == first["name"]]
            spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
            key = f"{contender}, {first['name']}"
            metrics.append(run.metric(key, statistics.mean(values), first["unit"]) | spread | {"seeds": seeds})
        metrics.append(run.metric(f"{contender}, parameters", runs[0]["params"], ""))
    draw(folder / "ablation.png", metrics)
    run.write_results(folder, {
        "paper": "dualtfr", "recipe": name, "data": every[0]["data"], "metrics": metrics,
        "params": max(r["params"] for r in every), "flops": max(r["flops"] for r in every),  # of the largest
        "wall_s": sum(r["wall_s"] for r in every), "peak_mem_bytes": run.peak_memory_bytes(), "throughput": None,
        "seed": seeds[0],
    })
    page = folder / "report.md"
    page.write_text(f"{page.read_text()}\n{table(metrics)}")


def by_contender(metrics: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """contender -> key -> metric"""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        contender, key = metric["name"].split(", ")
        rows.setdefault(contender, {})[key] = metric
    return rows


def table(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender."""
    rows = by_contender(metrics)
    scores = [key for key in next(iter(rows.values())) if key != "parameters"]
    lines = [f"| | parameters | {' | '.join(scores)} |", "|---" * (2 + len(scores)) + "|"]
    for contender, row in rows.items():
        cells = [_cell(row[key]) for key in scores]
        lines.append(f"| {CONTENDERS[contender][0]} | {row['parameters']['value']:,} | {' | '.join(cells)} |")
    seeds = metrics[0]["seeds"]
    told = f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else (
        f"One training each, seed {seeds[0]}."
    )
    return "\n".join([*lines, "", told, ""])


def _cell(metric: dict[str, Any]) -> str:
    spread = f" ± {metric['spread']:.1f}" if "spread" in metric else ""
    return f"{metric['value']:.1f}{spread} {metric['unit']}".strip()


def draw(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Bars of the first score."""
    rows = by_contender(metrics)
    key = next(iter(next(iter(rows.values()))))
    values = [row[key] for row in rows.values()]
    figure, axis = drawing.plt.subplots(figsize=(6.5, 0.4 * len(rows) + 1), layout="constrained")
    names = [CONTENDERS[contender][0] for contender in rows]
    axis.barh(names[::-1], [v["value"] for v in values[::-1]], xerr=[v.get("spread", 0) for v in values[::-1]])
    axis.set_xlabel(f"{key}, {values[0]['unit']}")
    drawing.save(figure, path)


def records() -> str:
    """The tables of results/ablation*.json, each under its data."""
    found = [json.loads(p.read_text()) for p in sorted(Path(__file__).with_name("results").glob("ablation*.json"))]
    return "\n".join(f"{record['data']}:\n\n{table(record['metrics'])}" for record in found)


if __name__ == "__main__":
    readme.fill(Path(__file__).with_name("README.md"), "ablation", records())
