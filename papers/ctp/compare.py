"""What pre-training is worth: CtP against its ablations, the baselines, and none at all, under one recipe.

``python -m papers.ctp.train compare`` runs it; ``--resume auto`` goes on where it was killed.
``python -m papers.ctp.compare`` writes the README's tables anew from results/compare*.json.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from common.data.video import open_videos
from common.run import readme
from papers.ctp import cases, evaluate
from papers.ctp.official import load_backbone
from papers.ctp.recipes import BASELINES, RECIPES, Recipe
from papers.ctp.train import describe, train

# What each contender changes in the pre-training; "random" has none.
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "random": None, "ctp": {}, "ctp_one_patch": {"patches": 1}, "ctp_never_hidden": {"visible": 1.0}, **BASELINES,
}
COLUMNS = {
    "iou": "IoU", "iou_hidden": "IoU hidden", "own_top1": "own task", "R@1": "nearest", "probe_top1": "linear",
    "finetune_top1": "fine-tuned",
}


def contender(recipe: Recipe, name: str) -> Recipe | None:
    """The recipe of one pre-training."""
    if name not in CONTENDERS:
        raise run.UserError(f"no contender {name!r}; there are {', '.join(CONTENDERS)}")
    changes = CONTENDERS[name]
    if changes is None:
        return None
    # Sizes stay those of the recipe's clips, the schedule the recipe's own.
    changes = {k: v for k, v in changes.items() if k not in ("decay_epochs", "short_sides_px")}
    return replace(recipe, contenders=(), downstream="", **changes)


def judge(
    home: Path, init: str, recipe: Recipe, options: run.Options, world: run.World
) -> dict[str, float]:
    """Scores of the backbone of `init`, or of a random one: as it stands (linear, nearest neighbours), and fine-tuned
    by `recipe.downstream` in a run under `home`. Nothing if the run is stopped before its end."""
    down = replace(RECIPES[recipe.downstream], backbone=recipe.backbone, width=recipe.width, init=init)
    own = replace(options, out=home, resume="auto")
    done = [path.parent for path in sorted((home / "ctp" / recipe.downstream).glob("*/results.json"))]
    folder = done[0] if done else train(recipe.downstream, down, own, world, draw=False)
    if not (folder / "results.json").exists() and world.is_main:
        return {}
    root = evaluate.data_folder(down, options.data)
    videos, val = (open_videos(root, split, fold=down.fold) for split in ("train", "val"))
    run.seed_all(options.seed)
    backbone = evaluate.build(down, len(val.classes)).backbone
    if init:
        load_backbone(backbone, init)
    scores = evaluate.frozen(backbone, videos, val, down, world, workers=options.workers)
    if world.is_main:
        scores |= {"finetune_top1": _scores(folder)["top1"]}
    return scores


def _scores(folder: Path) -> dict[str, float]:
    return {m["name"]: m["value"] for m in json.loads((folder / "results.json").read_text())["metrics"]}


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Pre-trains each contender with each seed and judges it; returns the comparison's folder. What is finished stays
    finished when a killed comparison is resumed."""
    if recipe.downstream not in RECIPES or recipe.seeds < 1:
        raise run.UserError("a comparison needs --downstream, a recipe's name, and at least one of --seeds")
    members = {label: contender(recipe, label) for label in recipe.contenders}
    folder = run.open_run("ctp", name, recipe, options, world)
    root = evaluate.data_folder(recipe, options.data)
    val = open_videos(root, "val", fold=recipe.fold)
    seeds = list(range(options.seed, options.seed + recipe.seeds))
    rows: dict[str, list[dict[str, float]]] = {label: [] for label in members}
    wall_s = 0.0
    for seed in seeds:
        for label, one in members.items():
            home = folder / f"seed{seed}" / label
            own = replace(options, out=home, resume="auto", seed=seed)
            kept, scores, init = home / "scores.json", {}, ""
            if one:
                done = [path.parent for path in (home / "ctp" / label).glob("*/results.json")]
                init = str(done[0] if done else train(label, one, own, world, draw=False))
                if not (Path(init) / "results.json").exists() and options.stop_at:
                    return folder
            if kept.exists():
                rows[label].append(json.loads(kept.read_text()))
                continue
            if one and one.method == "ctp":  # every tracker in the same games
                model, _, _ = evaluate.load_run(Path(init))
                scores |= evaluate.trained(model.to(world.device), val, recipe, world, workers=options.workers)
            elif one:
                model, _, _ = evaluate.load_run(Path(init))
                found = evaluate.trained(model.to(world.device), val, one, world, workers=options.workers)
                scores["own_top1"] = found["top1"]
            worth = judge(home / "downstream", init, recipe, replace(own, stop_at=0), world)
            if world.is_main:
                run.write_json(kept, scores | worth)
            rows[label].append(scores | worth)
    if world.is_main:
        for path in folder.glob("seed*/*/**/results.json"):
            wall_s += json.loads(path.read_text())["wall_s"]
        train_videos = open_videos(root, "train", fold=recipe.fold)
        _report(folder, name, recipe, rows, seeds, wall_s, describe(recipe, options.data, len(train_videos), len(val)))
    return folder


def _report(
    folder: Path, name: str, recipe: Recipe, rows: dict[str, list[dict[str, float]]], seeds: list[int], wall_s: float,
    about: str,
) -> None:
    metrics = []
    order = ["ctp", *(label for label in rows if label != "ctp")] if "ctp" in rows else list(rows)
    for label in order:
        for key in COLUMNS:
            values = [scores[key] for scores in rows[label] if key in scores]
            if values:
                spread = {"spread": statistics.stdev(values)} if len(values) > 1 else {}
                unit = evaluate.UNITS.get(key, "%")
                metrics.append(run.metric(f"{label} {key}", statistics.mean(values), unit) | spread | {"seeds": seeds})
    metrics.sort(key=lambda m: m["name"] != "ctp finetune_top1")  # the headline first
    model = evaluate.build(recipe, 1)
    run.write_results(folder, {
        "paper": "ctp", "recipe": name, "data": about, "metrics": metrics,
        "params": sum(p.numel() for p in model.parameters()),
        "flops": run.multiply_adds(model, *cases.inputs(recipe)), "wall_s": wall_s,
        "peak_mem_bytes": run.peak_memory_bytes(), "throughput": None, "seed": seeds[0],
    })
    page = folder / "report.md"
    page.write_text(f"{page.read_text()}\n{table(metrics)}")


def table(metrics: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        label, key = metric["name"].split(" ")
        found.setdefault(label, {})[key] = metric
    lines = [f"| pre-training | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for label in [name for name in CONTENDERS if name in found]:
        cells = []
        for key in COLUMNS:
            m = found[label].get(key)
            digits = 3 if key.startswith("iou") else 1
            spread = f" ± {m['spread']:.{digits}f}" if m and "spread" in m else ""
            cells.append(f"{m['value']:.{digits}f}{spread}" if m else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, metrics[0]["seeds"]))
    return "\n".join([*lines, "", f"Accuracy in %; mean ± sample standard deviation over seeds {seeds}.", ""])


def records() -> str:
    """The tables of results/compare*.json, each under its data."""
    found = [json.loads(p.read_text()) for p in sorted(Path(__file__).with_name("results").glob("compare*.json"))]
    return "\n".join(f"{record['data']}:\n\n{table(record['metrics'])}" for record in found)


if __name__ == "__main__":
    readme.fill(Path(__file__).with_name("README.md"), "compare", records())
