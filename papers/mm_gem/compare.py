"""All scores of the kept records, the two objectives apart and together: the README's second table.

``python -m papers.mm_gem.compare`` writes it anew between the two marker lines.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.run import readme

HERE = Path(__file__).parent
# Recipes that differ in nothing but their objectives.
FAMILIES = (
    ("tiny",), ("objectives_both", "objectives_embedding", "objectives_generation"),
    ("smollm2", "smollm2_embedding", "smollm2_generation"),
)


def tables(folder: Path = HERE / "results") -> str:
    """Markdown: for each family with records a table with a column for each recipe and a row for each score."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
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


if __name__ == "__main__":
    readme.fill(HERE / "README.md", "compare", tables())
