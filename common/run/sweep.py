"""Members times seeds: several runs in one folder, and one table of them.

A paper states its members (label -> recipe), what is scored, and the columns of the table. Each run stands at
``FOLDER/seed<N>/<paper>/<label>/<timestamp>/``; what is finished stays finished when a killed sweep is resumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.run.files import UserError, read_json, write_json
from common.run.folder import finished, open_run
from common.run.options import Options
from common.run.results import finish, metric, spread
from common.run.world import World

Train = Callable[[str, Any, Options, World], Path]
"""(label, recipe, options, world) -> the run's folder"""


@dataclass(frozen=True)
class Column:
    """A score in the table."""

    title: str
    unit: str = "%"
    digits: int = 1
    per: float = 1.0
    """The cell is the value divided by this, such as 1e6."""


COUNTS = ("parameters", "multiply-adds")  # units of what no seed changes
PARAMS = Column("parameters", "parameters", 0)
MULTIPLY_ADDS = Column("multiply-adds, M", "multiply-adds", 1, 1e6)


def read_scores(home: Path, _label: str = "") -> dict[str, float]:
    """All metrics of a run by their names, and its `params` and `flops`."""
    results = read_json(home / "results.json")
    counts = {key: results[key] for key in ("params", "flops") if results[key] is not None}
    return {m["name"]: m["value"] for m in results["metrics"]} | counts


def seeds_of(options: Options) -> tuple[int, ...]:
    return options.seeds or tuple(range(options.seed, options.seed + 3))


def sweep(
    paper: str, name: str, recipe: Any, options: Options, world: World, members: Mapping[str, Any], train: Train,
    columns: Mapping[str, Column], *, scores: Callable[[Path, str], Mapping[str, float]] = read_scores,
    fixed: Callable[[Path], Mapping[str, Mapping[str, float]]] | None = None,
    picture: Callable[[Path, Mapping[str, list[Path]]], object] | None = None, title: str = "member",
) -> Path:
    """Trains every member with every seed and reports; returns the sweep's folder.

    `scores` of a finished run, asked once, on all ranks, and kept in its folder; of them the keys of `columns` are
    reported, the first first. `fixed` gives further rows that know no seed, such as baselines. `picture` draws into the
    folder it is given, from the runs of each member.
    """
    folder = open_run(paper, name, recipe, options, world)
    seeds = seeds_of(options)
    runs: dict[str, list[Path]] = {label: [] for label in members}
    found: dict[str, list[dict[str, float]]] = {label: [] for label in members}
    for seed in seeds:
        for label, member in members.items():
            out = folder / f"seed{seed}"
            own = replace(options, out=out, resume="auto", seed=seed, seeds=())
            homes = world.agree([p.parent for p in (out / paper / label).glob("*/results.json") if finished(p.parent)])
            home = homes[0] if homes else train(label, member, own, world)
            if not world.agree(finished(home)):  # --stop-at
                return folder
            runs[label].append(home)
            found[label].append(_kept(home / "scores.json", partial(scores, home, label), world))
    extra = fixed(folder) if fixed else {}
    if world.is_main:
        records = [read_json(home / "results.json") for homes in runs.values() for home in homes]
        metrics = rows(found, columns, seeds) + [
            metric(f"{label} {key}", value, columns[key].unit)
            for label, its in extra.items() for key, value in its.items() if key in columns
        ]
        finish(
            folder, paper, name, options, data=records[0]["data"], metrics=metrics,
            params=max(r["params"] for r in records), flops=max((r["flops"] or 0) for r in records) or None,
            wall_s=sum(r["wall_s"] for r in records), throughput=None,
            peak_mem_bytes=max(r["peak_mem_bytes"] for r in records), table=table(metrics, columns, title),
            then={"picture": lambda: picture(folder, runs)} if picture else {},
        )
    return folder


def over_seeds(paper: str, name: str, recipe: Any, options: Options, world: World, train: Train) -> Path:
    """One recipe with several seeds: the metrics of its runs as mean and spread."""
    folder = open_run(paper, name, recipe, options, world)
    homes = []
    for seed in options.seeds:
        out = folder / f"seed{seed}"
        done = world.agree([p.parent for p in (out / paper / name).glob("*/results.json") if finished(p.parent)])
        own = replace(options, out=out, resume="auto", seed=seed, seeds=())
        homes.append(done[0] if done else train(name, recipe, own, world))
        if not world.agree(finished(homes[-1])):  # --stop-at
            return folder
    if world.is_main:
        records = [read_json(home / "results.json") for home in homes]
        metrics = []
        for first in records[0]["metrics"]:
            same = [m for r in records for m in r["metrics"] if m["name"] == first["name"]]
            comparable = all(m["comparable"] for m in same)
            metrics.append(
                first | spread([m["value"] for m in same])
                | {"seeds": list(options.seeds[: len(same)]), "comparable": comparable}
            )
        finish(
            folder, paper, name, replace(options, seed=options.seeds[0]), data=records[0]["data"], metrics=metrics,
            params=records[0]["params"], flops=records[0]["flops"], wall_s=sum(r["wall_s"] for r in records),
            throughput=statistics.mean([r["throughput"] or 0 for r in records]) or None,
            peak_mem_bytes=max(r["peak_mem_bytes"] for r in records),
        )
    return folder


def _kept(path: Path, make: Callable[[], Mapping[str, float]], world: World) -> dict[str, float]:
    """What `make` gave when it was first asked."""
    known = world.agree(read_json(path) if path.exists() else None)
    if known is None:
        known = dict(make())
        if world.is_main:
            write_json(path, known)
    return known


def rows(
    found: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, Column], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Metrics ``<label> <key>`` of all members that have the score: mean, sample standard deviation, seeds."""
    metrics = []
    for label, runs in found.items():
        for key, column in columns.items():
            values = [scores[key] for scores in runs if key in scores]
            if values:
                over = {"value": values[0]} if column.unit in COUNTS else spread(values)
                row = metric(f"{label} {key}", over["value"], column.unit) | over
                metrics.append(row | {"seeds": list(seeds[: len(values)])})
    return metrics


def by_member(metrics: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> dict[str, dict[str, Any]]:
    """label -> key -> metric, of the rows that `rows` wrote."""
    found: dict[str, dict[str, Any]] = {}
    for row in metrics:
        keys = [key for key in columns if row["name"].endswith(key)]
        if keys:
            key = max(keys, key=len)
            found.setdefault(row["name"].removesuffix(key).rstrip(" ,:"), {})[key] = row
    return found


def table(metrics: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], title: str = "member") -> str:
    """Markdown: a row for each member, mean ± sample standard deviation in each cell."""
    members = by_member(metrics, columns)
    shown = {key: column for key, column in columns.items() if any(key in its for its in members.values())}
    titles = " | ".join([title, *(column.title for column in shown.values())])
    lines = [f"| {titles} |", "|---" + "|---:" * len(shown) + "|"]
    for label, its in members.items():
        lines.append(f"| {label} | {' | '.join(_cell(its.get(key), column) for key, column in shown.items())} |")
    seeds = sorted({seed for row in metrics for seed in row.get("seeds", ())})
    over = f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}."
    return "\n".join([*lines, "", over if len(seeds) > 1 else f"One run of each, seed {seeds[0]}.", ""])


def _cell(row: Mapping[str, Any] | None, column: Column) -> str:
    if row is None:
        return ""
    text = f"{row['value'] / column.per:,.{column.digits}f}"
    return f"{text} ± {row['spread'] / column.per:.{column.digits}f}" if "spread" in row else text


def tables(
    records: Sequence[Mapping[str, Any]], recipes: Collection[str], columns: Mapping[str, Column], title: str = "member"
) -> str:
    """For a README: the table of each record of these recipes, under its data."""
    chosen = [record for record in records if record["recipe"] in recipes]
    return "\n".join(f"{record['data']}:\n\n{table(record['metrics'], columns, title)}" for record in chosen)


def check_members(asked: Sequence[str], known: Collection[str]) -> None:
    """`UserError` if a member is asked for that there is not."""
    if unknown := [label for label in asked if label not in known]:
        raise UserError(f"no member {unknown[0]!r} in --compare; there are {', '.join(known)}")
