"""The README's second table: what comes from the image, for VLoRA and the token baseline, from the records kept.

``python -m papers.vlora.compare`` writes it anew between the two marker lines.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

from common.run import readme
from papers.vlora.recipes import RECIPES

HERE = Path(__file__).parent
EXCHANGED, PRIOR = ", images exchanged", ", prior"


def table() -> str:
    """Markdown: for each setting with records, every score that has a control beside it."""
    runs = defaultdict(list)
    for path in sorted((HERE / "results").glob("*.json")):
        record = json.loads(path.read_text())
        setting = re.sub(r".*\.train | --(seed|data) \S+", "", record["command"])
        runs[setting].append(({m["name"]: m for m in record["metrics"]}, record))
    lines = []
    for setting in sorted(runs, key=lambda setting: list(RECIPES).index(setting.split()[0])):
        records = runs[setting]
        first, about = records[0]
        seeds = ", ".join(str(record["seed"]) for _, record in records)
        seconds = statistics.mean(record["wall_s"] for _, record in records)
        plural = "s" if len(records) > 1 else ""
        lines += [
            f"`{setting}`, {about['data']}, seed{plural} {seeds}, {about['params']:,} parameters, "
            f"trained {seconds:.0f} s:", "",
            "| score | right image | another image | prior |", "|---|---:|---:|---:|",
        ]
        for name in first:
            if f"{name}{EXCHANGED}" in first:
                cells = [_cell([metrics.get(f"{name}{x}") for metrics, _ in records]) for x in ("", EXCHANGED, PRIOR)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        preferred = _cell([metrics.get("right image preferred") for metrics, _ in records])
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


if __name__ == "__main__":
    readme.fill(HERE / "README.md", "controls", table())
