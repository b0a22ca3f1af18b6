"""What comes from the image, for VLoRA and the baseline: ``python -m papers.vlora flickr8k_compare --data FOLDER``.

And tables of the README from the records that are kept.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import run
from papers.vlora.recipes import RECIPES, Recipe

EXCHANGED, PRIOR, BLIND = ", images exchanged", ", prior", ", blind"
COLUMNS = {
    "right image preferred": run.Column("right image preferred, %"),
    "right image first of all": run.Column("first of 21, %"), "loss": run.Column("loss, nats", "nats", 3),
    f"loss{EXCHANGED}": run.Column("exchanged", "nats", 3), f"loss{BLIND}": run.Column("no image", "nats", 3),
    "cider_d": run.Column("CIDEr-D", "", 3), f"cider_d{EXCHANGED}": run.Column("exchanged", "", 3),
    "bleu4": run.Column("BLEU-4", "", 3), "rouge_l": run.Column("ROUGE-L", "", 3),
    "minutes": run.Column("minutes of training", "min", 1),
}


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Trains each member with each seed; returns the comparison's folder."""
    run.check_members(recipe.compare, RECIPES)

    def scores(home: Path, _label: str) -> dict[str, float]:
        return run.read_scores(home) | {"minutes": run.read_json(home / "results.json")["wall_s"] / 60}

    members = {label: RECIPES[label] for label in recipe.compare}
    return run.sweep("vlora", name, recipe, options, world, members, train, COLUMNS, scores=scores)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each setting with records, every score that has a control beside it."""
    runs = defaultdict(list)
    compared = [name for name, recipe in RECIPES.items() if recipe.compare]
    for record in sorted((r for r in records if r["recipe"] not in compared), key=lambda record: record["seed"]):
        setting = re.sub(r".*papers\.vlora(\.train)? | --(seed|data) \S+", "", record["command"])
        runs[setting].append(({m["name"]: m for m in record["metrics"]}, record))
    lines = []
    for setting in sorted(runs, key=lambda setting: (list(RECIPES).index(setting.split()[0]), setting)):
        rows = runs[setting]
        first, about = rows[0]
        captions = f"loss{BLIND}" in first
        seeds = ", ".join(str(record["seed"]) for _, record in rows)
        seconds = statistics.mean(record["wall_s"] for _, record in rows)
        plural = "s" if len(rows) > 1 else ""
        lines += [
            f"`{setting}`, {about['data']}, seed{plural} {seeds}, {about['params']:,} parameters, "
            f"trained {seconds:.0f} s:", "",
            f"| score | right image | another image | {'no image' if captions else 'prior'} |", "|---|---:|---:|---:|",
        ]
        last = BLIND if captions else PRIOR
        for name in first:
            if f"{name}{EXCHANGED}" in first:
                cells = [_cell([metrics.get(f"{name}{x}") for metrics, _ in rows]) for x in ("", EXCHANGED, last)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        preferred = _cell([metrics.get("right image preferred") for metrics, _ in rows])
        lines.append(f"| right image gives the lower loss | {preferred} | 50 % | |")
        if "right image first of all" in first:
            best = _cell([metrics.get("right image first of all") for metrics, _ in rows])
            lines.append(f"| right image first of 21 | {best} | 4.8 % | |")
        lines.append("")
    return "\n".join([*lines, run.tables(records, compared, COLUMNS)])


def _cell(metrics: list[dict | None]) -> str:
    if None in metrics:
        return ""
    values = [metric["value"] for metric in metrics]
    places = 1 if metrics[0]["unit"] == "%" else 3
    text = f"{statistics.mean(values):.{places}f}"
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{text}{spread} {metrics[0]['unit']}".strip()


README_PARTS = {"compare": table}
