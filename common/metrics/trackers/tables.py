"""One table over all papers' trackers on the same real sequences, from their records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common.metrics.trackers.baselines import BASELINES, OLD_LABELS

# A baseline's name in a record -> in the table.
BASELINE_NAMES = {name: name for name in BASELINES} | OLD_LABELS


def real_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: trackers and baselines on each held-out real sequence, their mean, and the speeds.

    `records` by paper; those count whose metrics name sequences ("otb/Bolt auc"). A training that began from weights
    has a column of its own.
    """
    cells: dict[str, dict[str, float]] = {}
    for paper, its in records.items():
        for record in its:
            rows = [m["name"].partition(", ") + (m["value"],) for m in record["metrics"]]
            if any("/" in row for row, *_ in rows):
                began = any(word in record["command"] for word in ("--init", "--weights", "--pretrained"))
                title = f"{paper}, pre-trained" if began else paper
                for row, _, baseline, value in rows:
                    cells.setdefault(row, {}).setdefault(BASELINE_NAMES.get(baseline, title), value)
    rows = {row: its for row, its in cells.items() if "/" in row}
    if not rows:
        return "No runs are recorded yet.\n"
    found = dict.fromkeys(column for its in rows.values() for column in its)
    columns = [*(c for c in found if c not in BASELINE_NAMES), *(c for c in found if c in BASELINE_NAMES)]
    whole = [c for c in columns if all(c in its for its in rows.values())]
    rows[f"mean of the {len(rows)}"] = {c: statistics.mean(its[c] for its in rows.values()) for c in whole}
    for row, its in cells.items():
        for ending, text in ((" fps_model", "the tracker alone"), (" fps", "with reading")):
            if row.endswith(ending):
                rows[f"{row.removesuffix(ending)} frames/s, {text}"] = its
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for row, its in rows.items():
        lines.append(f"| {row} | " + " | ".join(f"{its[c]:.1f}" if c in its else "–" for c in columns) + " |")
    return "\n".join([*lines, "", "%, a single training each.", ""])
