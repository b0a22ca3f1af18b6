"""One table over all papers' trackers on the same real sequences, from their records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common.metrics.trackers.baselines import BASELINES, OLD_LABELS

# A baseline's name in a record -> in the table.
BASELINE_NAMES = {name: name for name in BASELINES} | OLD_LABELS


def real_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: for each choice of data, folds apart, trackers and baselines on each real sequence that trained none of
    them, their mean, and the speeds.

    `records` by paper; those count whose metrics name sequences ("otb/Bolt auc"). Recipes of one paper share a column
    where they track different sequences, such as real_small and real_small_otb; a training that began from weights has
    one of its own.
    """
    groups: dict[tuple[str, bool], Cells] = {}
    for paper, its in records.items():
        for record in its:
            rows = [(*m["name"].partition(", "), m) for m in record["metrics"]]
            if any("/" in row for row, *_ in rows):
                key = record["data"].partition(":")[0], record["recipe"].endswith("_fold")
                cells = groups.setdefault(key, {})
                began = any(word in record["command"] for word in ("--init", "--weights", "--pretrained"))
                title = f"{paper}, pre-trained" if began else paper
                if record["recipe"].partition("real_")[2].startswith("lite0"):
                    title = f"{paper} {record['recipe']}"
                for row, _, baseline, metric in rows:
                    cells.setdefault(row, {}).setdefault(BASELINE_NAMES.get(baseline, title), metric)
    return "\n".join(_table(cells) for cells in groups.values()) or "No runs are recorded yet.\n"


Cells = dict[str, dict[str, Mapping[str, Any]]]
"""row -> column -> metric"""


def _table(cells: Cells) -> str:
    rows: dict[str, dict[str, str]] = {row: _texts(its) for row, its in cells.items() if "/" in row}
    found = dict.fromkeys(column for its in rows.values() for column in its)
    columns = [*(c for c in found if c not in BASELINE_NAMES), *(c for c in found if c in BASELINE_NAMES)]
    whole = [c for c in columns if all(c in its for its in rows.values())]
    rows[f"mean of the {len(rows)}"] = {
        c: f"{statistics.mean(its[c]['value'] for row, its in cells.items() if '/' in row):.1f}" for c in whole
    }
    sets = {row.partition("/")[0] for row in cells if "/" in row}
    for row, its in cells.items():
        if len(sets) == 1 and "/" not in row and row.endswith(" ao"):
            rows[f"{row}, all together"] = _texts(its)
        if len(sets) == 1 and row.endswith(" sizes lost"):
            rows["sequences whose box has four times or a quarter of the area for ten frames"] = _texts(its)
    for row, its in cells.items():
        for ending, text in ((" fps_model", "the tracker alone"), (" fps", "with reading")):
            if row.endswith(ending):
                rows[f"{row.removesuffix(ending)} frames/s, {text}"] = _texts(its)
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for row, texts in rows.items():
        lines.append(f"| {row} | " + " | ".join(texts.get(c, "–") for c in columns) + " |")
    spreads = any("spread" in metric for its in cells.values() for metric in its.values())
    over = "mean ± sample standard deviation over seeds" if spreads else "a single training each"
    return "\n".join([*lines, "", f"%, {over}.", ""])


def _texts(its: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {
        c: f"{m['value']:.1f}" + (f" ± {m['spread']:.1f}" if m.get("spread") is not None and "seeds" in m else "")
        for c, m in its.items()
    }
