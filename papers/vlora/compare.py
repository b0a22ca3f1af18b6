"""What comes from the image, for VLoRA and the token baseline: a table of the README from the records that are kept."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from papers.vlora.recipes import RECIPES

EXCHANGED, PRIOR = ", images exchanged", ", prior"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each setting with records, every score that has a control beside it."""
    runs = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        setting = re.sub(r".*papers\.vlora(\.train)? | --(seed|data) \S+", "", record["command"])
        runs[setting].append(({m["name"]: m for m in record["metrics"]}, record))
    lines = []
    for setting in sorted(runs, key=lambda setting: (list(RECIPES).index(setting.split()[0]), setting)):
        rows = runs[setting]
        first, about = rows[0]
        seeds = ", ".join(str(record["seed"]) for _, record in rows)
        seconds = statistics.mean(record["wall_s"] for _, record in rows)
        plural = "s" if len(rows) > 1 else ""
        lines += [
            f"`{setting}`, {about['data']}, seed{plural} {seeds}, {about['params']:,} parameters, "
            f"trained {seconds:.0f} s:", "",
            "| score | right image | another image | prior |", "|---|---:|---:|---:|",
        ]
        for name in first:
            if f"{name}{EXCHANGED}" in first:
                cells = [_cell([metrics.get(f"{name}{x}") for metrics, _ in rows]) for x in ("", EXCHANGED, PRIOR)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        preferred = _cell([metrics.get("right image preferred") for metrics, _ in rows])
        lines += [f"| right image gives the lower loss | {preferred} | 50 % | |", ""]
    return "\n".join(lines)


def _cell(metrics: list[dict | None]) -> str:
    if None in metrics:
        return ""
    values = [metric["value"] for metric in metrics]
    places = 1 if metrics[0]["unit"] == "%" else 3
    text = f"{statistics.mean(values):.{places}f}"
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{text}{spread} {metrics[0]['unit']}".strip()


README_PARTS = {"compare": table}
