"""What pre-training is worth, by data and method: the README's second table, from the records of scripts/compare.sh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from common import run
from papers.maskco.recipes import RECIPES

SCORES = ("probe_top1", "probe_map", "random_probe_top1", "random_probe_map", "contrast_top1", "contrast_rank")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each pre-training data set and "mini" recipe, mean ± sample standard deviation over its
    seeds."""
    seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: r["seed"]):
        if record["recipe"].startswith("mini"):
            row = record["data"], record["recipe"]
            seeds[row].append(record["seed"])
            for metric in record["metrics"]:
                values[row][metric["name"]].append(metric["value"])
    columns = [name for name in SCORES if any(name in scores for scores in values.values())]
    if not columns:
        return ""
    order = list(RECIPES)
    lines = [f"| pre-trained on | recipe | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 3) + "|"]
    for row in sorted(seeds, key=lambda row: (row[0], order.index(row[1]))):
        cells = [_cell(values[row][name]) for name in columns]
        lines.append(f"| {' | '.join([*row, *cells])} | {', '.join(map(str, seeds[row]))} |")
    return "\n".join([*lines, ""])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    found = run.spread(values)
    return f"{found['value']:.1f}" + (f" ± {found['spread']:.1f} %" if "spread" in found else " %")


README_PARTS = {"compare": table}
