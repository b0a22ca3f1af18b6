"""All scores of the kept records, the two objectives apart and together: a table of the README."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

# Recipes that differ in nothing but their objectives.
FAMILIES = (
    ("tiny",), ("objectives_both", "objectives_embedding", "objectives_generation"),
    ("smollm2", "smollm2_embedding", "smollm2_generation"),
)


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each family with records a table with a column for each recipe and a row for each score."""
    runs = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        runs[record["recipe"]].append(record)
    found = [{name: runs[name] for name in family if name in runs} for family in FAMILIES]
    return "\n".join(_table(family) for family in found if family)


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    first = next(iter(runs.values()))[0]
    seeds = "; ".join(f"{name} {', '.join(str(r['seed']) for r in found)}" for name, found in runs.items())
    scores = {name: [{m["name"]: m for m in r["metrics"]} for r in found] for name, found in runs.items()}
    names = dict.fromkeys(metric for found in scores.values() for metric in found[0])
    rows = [
        f"| {metric} | {' | '.join(_cell([s.get(metric) for s in found]) for found in scores.values())} |"
        for metric in names
    ]
    return "\n".join([
        f"{first['data']}. Seeds: {seeds}.", "",
        f"| score | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|", *rows, "",
    ])


def _cell(metrics: list[dict[str, Any] | None]) -> str:
    """Mean ± sample standard deviation."""
    if None in metrics:
        return ""
    values, places = [metric["value"] for metric in metrics], 1 if metrics[0]["unit"] == "%" else 2
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread} {metrics[0]['unit']}".strip()


README_PARTS = {"compare": tables}
