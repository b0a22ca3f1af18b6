"""Results tables of the papers' READMEs, from the records kept in ``papers/<name>/results/*.json``.

``python -m tools.tables`` rewrites what stands between the two marker lines of each README; ``--check`` only says
which are stale, and fails if any is. A record is the results.json of one run (common/results.schema.json). Records
that differ only in their seed share a row: mean ± sample standard deviation. The trackers' READMEs have a second table,
between markers of their own: all of them on the same real sequences.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jsonschema
import tyro

from common.run import ROOT, SCHEMA, UserError
from common.run import main as run_main
from common.run.readme import filled, markers
from tools.list import recipes

START, END = markers("results")
REAL_START, REAL_END = markers("real")
# Trackers by paper, and the records of their small trainings on real videos: tested on OTB, and the other way round.
TRACKERS = {
    ("sbt", ""): "SBT", ("dualtfr", ""): "DualTFR", ("maml_tracker", ""): "Retina-MAML",
    ("sbt", "_long"): "SBT, long", ("dualtfr", "_long"): "DualTFR, long",
}
REAL = ("real_small{}-seed0.json", "real_small_otb{}-seed0.json")
COLUMNS = ("recipe", "data", "metric", "paper", "ours", "seeds", "comparable", "hardware", "revision")
# Options that tell runs of one setting apart without changing what is measured.
_PER_RUN = {"--seed", "--out", "--resume"}

Record = dict[str, Any]


@dataclass
class Arguments:
    check: bool = False
    """Write nothing; fail if a README is stale."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m tools.tables", description=__doc__)
    stale = update(ROOT / "papers", write=not args.check)
    for readme in stale:
        print(f"{readme.relative_to(ROOT)} {'is stale: run make tables' if args.check else 'rewritten'}")
    if args.check and stale:
        sys.exit(1)


def update(papers: Path, *, write: bool) -> list[Path]:
    """READMEs under `papers` whose table does not show the records; rewritten with `write`."""
    stale, real = [], real_table(papers)
    for folder in sorted(p for p in papers.iterdir() if p.is_dir()):
        records = read_records(folder)
        readme = folder / "README.md"
        text = readme.read_text() if readme.is_file() else ""
        new = filled(text, "results", table(records))
        if new is None and (records or START in text):
            raise UserError(f"{readme}: add these two lines where the results belong:\n{START}\n{END}")
        new = filled(new or text, "real", real) or new
        if new not in (None, text):
            stale.append((readme, new))
    if write:
        for readme, new in stale:
            readme.write_text(new)
    return [readme for readme, _ in stale]


def read_records(folder: Path) -> list[Record]:
    """Records kept for the paper in `folder`, in the order of its recipes, then by data, command, hardware and seed."""
    paths = sorted((folder / "results").glob("*.json"))
    records = [read_record(path) for path in paths]
    for path, record in zip(paths, records):
        if record["paper"] != folder.name:
            raise UserError(f"{path}: field paper: expected {folder.name!r}, got {record['paper']!r}")
    names = list(recipes(folder.name).RECIPES) if records else []
    place = {name: i for i, name in enumerate(names)}
    return sorted(records, key=lambda r: (place.get(r["recipe"], len(names)), _setting(r), r["seed"]))


def read_record(path: Path) -> Record:
    """A results.json that fits the schema; otherwise `UserError` names the file and the field."""

    def refuse(constant: str):
        raise ValueError(f"expected finite numbers, got {constant}")

    try:
        record = json.loads(path.read_text(), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(record))
    if error:
        field = error.json_path.removeprefix("$").lstrip(".")
        raise UserError(f"{path}: {f'field {field}: ' if field else ''}{error.message[:300]}")
    return record


def table(records: list[Record]) -> str:
    """Markdown: a row for each metric of each setting, then the commands behind them."""
    if not records:
        return "No runs are recorded yet.\n"
    rows, notes, spread = [], [], False
    for (recipe, data, command, hardware), group in groupby(records, _setting):
        runs = list(group)
        for metric in headline(runs[0]["metrics"]):
            found = [(r, m) for r in runs for m in r["metrics"] if m["name"] == metric["name"]]
            seeds, same = _seeds(found), [m for _, m in found]
            value, sd = mean_sd(same)
            spread |= sd is not None
            paper = "–" if metric["paper_value"] is None else f"{figure(metric['paper_value'])} {metric['unit']}"
            rows.append([
                recipe, data, metric["name"], paper, f"{figure(value, sd)} {metric['unit']}", seeds,
                "yes" if all(m["comparable"] for m in same) else "no",
                hardware, ", ".join(dict.fromkeys(short(r["git"]) for r in runs)),
            ])
        sources = dict.fromkeys(m["paper_source"] for m in runs[0]["metrics"] if m["paper_source"])
        notes.append(f"- {recipe}: `{command}`" + "".join(f"; paper: {source}" for source in sources))
    lines = [_row(COLUMNS), "|" + "---|" * len(COLUMNS), *map(_row, rows), ""]
    if spread:
        lines += ["±: sample standard deviation over the seeds.", ""]
    return "\n".join([*lines, *dict.fromkeys(notes), ""])


def real_table(papers: Path) -> str:
    """Markdown: trackers and baselines on each real sequence of the records in `REAL`, their mean, and the speeds."""
    cells: dict[str, dict[str, float]] = {}
    for (name, kind), title in TRACKERS.items():
        for path in (papers / name / "results" / file.format(kind) for file in REAL):
            for metric in read_record(path)["metrics"] if path.is_file() else ():
                row, _, baseline = metric["name"].partition(", ")
                cells.setdefault(row, {}).setdefault(baseline or title, metric["value"])
    rows = {row: its for row, its in cells.items() if "/" in row}
    if not rows:
        return "No runs are recorded yet.\n"
    columns = [c for c in (*TRACKERS.values(), "still", "correlation") if any(c in its for its in rows.values())]
    whole = [c for c in columns if all(c in its for its in rows.values())]
    rows[f"mean of the {len(rows)}"] = {c: statistics.mean(its[c] for its in rows.values()) for c in whole}
    for row, its in cells.items():
        if (dataset := row.removesuffix(" fps")) != row:
            rows[f"{dataset} frames/s, with reading"] = its
        elif (dataset := row.removesuffix(" fps_model")) != row:
            rows[f"{dataset} frames/s, the tracker alone"] = its
    lines = [_row(["", *columns]), "|---" + "|---:" * len(columns) + "|"]
    lines += [_row([row, *(f"{its[c]:.1f}" if c in its else "–" for c in columns)]) for row, its in rows.items()]
    note = "%, a single training each: `real_small` for OTB, `real_small_otb` for the others."
    if any(column.endswith(", long") for column in columns):
        note += "\nLong: from a network pre-trained on Imagenette, 2,400 steps instead of 700."
    return "\n".join([*lines, "", note, ""])


def headline(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics worth a row: all of up to four, else the first and those the paper gives."""
    return metrics if len(metrics) <= 4 else [metrics[0], *(m for m in metrics[1:] if m["paper_value"] is not None)]


def mean_sd(metrics: list[dict[str, Any]]) -> tuple[float, float | None]:
    """Mean and sample standard deviation of one metric over runs; of a single run, what it recorded."""
    if len(metrics) == 1:
        return metrics[0]["value"], metrics[0].get("spread")
    values = [m["value"] for m in metrics]
    return statistics.mean(values), statistics.stdev(values)


def figure(value: float, sd: float | None = None) -> str:
    """Four significant digits; with a standard deviation, as many decimals as its two leading digits ask for."""
    if sd:
        decimals = max(0, 1 - math.floor(math.log10(sd)))
        return f"{value:.{decimals}f} ± {sd:.{decimals}f}"
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return text if sd is None else f"{text} ± 0"


def short(revision: str) -> str:
    """A commit's first seven digits; a '-dirty' stays."""
    commit, dash, dirty = revision.partition("-")
    return commit[:7] + dash + dirty


def _setting(record: Record) -> tuple[str, str, str, str]:
    """What must be equal for two records to share a row."""
    words = shlex.split(record["command"])
    if "-m" in words:  # the interpreter's path is the machine's own
        words = ["python", *words[words.index("-m"):]]
    kept, drop = [], False
    for word in words:
        if not drop and word.split("=")[0] not in _PER_RUN:
            kept.append(word)
        drop = word in _PER_RUN
    return record["recipe"], record["data"], shlex.join(kept), record["hardware"]


def _seeds(found: list[tuple[Record, dict[str, Any]]]) -> str:
    """The seeds behind one metric of several records; each may count once, and means are not averaged again."""
    seeds = [seed for record, metric in found for seed in metric.get("seeds", [record["seed"]])]
    if len(set(seeds)) < len(seeds) or (len(found) > 1 and any("spread" in metric for _, metric in found)):
        record, metric = found[0]
        raise UserError(
            f"papers/{record['paper']}/results: {len(found)} records of {record['recipe']} on {record['hardware']} "
            f"give {metric['name']} for seeds {', '.join(map(str, seeds))}; expected one record per seed, or one "
            "that holds their spread: remove the others"
        )
    return ", ".join(map(str, seeds))


def _row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    run_main(main)
