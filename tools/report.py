"""One page over all runs: ``python -m tools.report`` writes runs/report.html, which needs no network.

It opens on a card for each paper: what its README says at a glance (`tools.glance`), and its runs: every folder
``<runs>/<paper>/<recipe>/<timestamp>/``, finished or not, and the records kept in papers/*/results. Runs that are
ticked are laid side by side by the page's script; all else is there without it. What cannot be read or drawn is named
in the page and on stderr, and only regular files are read: what a link or pipe in a run folder leads to is not shown.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import tyro
from PIL import Image

from common.data.text import printable
from common.run import ROOT, Options, UserError, read_log, write_text
from common.run import main as run_main
from tools.glance import glance, plain
from tools.list import papers, recipes
from tools.tables import Record, content, figure, headline, read_record, short

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}
MOST = {"log.jsonl": 2**28, "config.json": 2**22, "environment.json": 2**22, "picture": 2**24}
"""Bytes that a file of a run folder may have."""
POINTS = 400
"""Most points of a drawn curve; longer logs keep the lowest and highest value of each stretch."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 190, 48, 8, 24
"""Of a curve's panel, in px of its own coordinates, and the margins of its axes."""


@dataclass
class Arguments:
    runs: Path = Path("runs")
    """Folder of the runs."""
    out: Path | None = None
    """Page to write; report.html in the folder of the runs if not given."""


@dataclass
class Run:
    """What is known about one run folder, or about one kept record."""

    paper: str
    recipe: str
    path: Path
    time: float
    """Seconds since 1970, for the order of the page."""
    record: Record | None = None
    """results.json; None for a run that is unfinished or damaged."""
    kept: bool = False
    """From papers/*/results, not from a run folder."""
    log: list[dict[str, Any]] = field(default_factory=list)
    panels: list[dict[str, Any]] = field(default_factory=list)
    """Its curves, drawn from the log."""
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """(name, data URI) of its other pictures."""
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Recipe and options of its config.json."""
    changes: list[tuple[str, str, str]] | None = None
    """(field, the recipe's default, this run's value); None where they cannot be told."""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem if self.kept else self.path.name

    @property
    def anchor(self) -> str:
        return f"{self.paper}-{self.recipe}-{self.name}"

    @property
    def state(self) -> str:
        if self.record:
            return "finished"
        if self.problems and (not self.log or any("results.json" in problem for problem in self.problems)):
            return "damaged: no result"
        steps = [row["step"] for row in self.log]
        return f"unfinished: {f'last logged step {steps[-1]}' if steps else 'no step logged'}, no result"

    @property
    def comparable(self) -> bool:
        return self.record is not None and self.record["metrics"][0]["comparable"]


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m tools.report", description=__doc__)
    if not args.runs.is_dir():
        raise UserError(f"no folder of runs at {args.runs}; make reproduce PAPER=... makes one, --runs names another")
    out = args.out or args.runs / "report.html"
    runs = find_runs(args.runs, ROOT / "papers")
    for problem in (p for run in runs for p in run.problems):
        print(f"damaged: {printable(problem)}", file=sys.stderr)
    write_text(out, page(runs, args.runs).encode("utf-8", "replace").decode())
    print(f"{len(runs)} runs in {out} ({out.stat().st_size / 2**20:.1f} MiB)")


def find_runs(root: Path, kept: Path) -> list[Run]:
    """All runs under `root` and all records kept under `kept` but not among them, newest first."""
    runs = [read_run(path) for path in sorted(root.glob("*/*/*")) if path.is_dir() or path.is_symlink()]
    records = [run.record for run in runs]
    for path in sorted(kept.glob("*/results/*.json")):
        run = Run(path.parent.parent.name, "", path, path.stat().st_mtime, kept=True)
        try:
            run.record = read_record(path)
        except UserError as error:
            run.problems.append(str(error))
        if run.record is None or run.record not in records:
            runs.append(run)
    for run in runs:
        if run.record:
            run.recipe = run.record["recipe"]
            run.environment = {key: run.record[key] for key in ("hardware", "git", "command", "time")} | run.environment
        # if not, the time of the folder or file stands in
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, OSError):
            run.time = datetime.datetime.fromisoformat(run.environment["time"]).timestamp()
    return sorted(runs, key=lambda run: (-run.time, run.anchor))


def read_run(path: Path) -> Run:
    """A run folder; what is damaged in it goes to `problems`."""
    run = Run(path.parent.parent.name, path.parent.name, path, path.lstat().st_mtime)
    if any(each.is_symlink() for each in (path, path.parent, path.parent.parent)):
        run.problems.append(f"{path}: a link, and what it leads to is not shown")
        return run
    if os.path.lexists(path / "results.json"):
        with _named(run):
            run.record = read_record(path / "results.json")
    run.environment = _read_object(run, "environment.json")
    config = _read_object(run, "config.json")
    with _named(run, "config.json", "not a run's settings"):
        run.settings = {**config.get("recipe", {}), **config.get("options", {})}
        run.changes = changes(run.paper, run.recipe, config) if config else None
    with _named(run, "log.jsonl", "not readable as text"):
        if os.path.lexists(path / "log.jsonl"):
            content(path / "log.jsonl", MOST["log.jsonl"])
        run.log = [row for row in read_log(path) if isinstance(row.get("step"), int)]
    with _named(run, "log.jsonl", "its curves cannot be drawn"):
        run.panels = panels(run.log)
    for picture in sorted(path.glob("*")):
        if picture.suffix.lower() in PICTURES and picture.stem != "curves":  # curves are drawn from the log
            with _named(run, picture.name, "no picture"):
                run.pictures.append((picture.stem.replace("_", " "), data_uri(picture)))
    return run


@contextlib.contextmanager
def _named(run: Run, file: str = "", what: str = "") -> Iterator[None]:
    """Whatever goes wrong with one file is the run's problem, and ends nothing: run folders come from others."""
    try:
        yield
    except UserError as error:
        run.problems.append(str(error))
    except Exception as error:
        run.problems.append(f"{run.path / file}: {what}: {type(error).__name__}: {error}"[:400])


def _read_object(run: Run, name: str) -> dict[str, Any]:
    """A JSON file's object; empty where there is none or it is damaged."""
    value: Any = {}
    if not os.path.lexists(run.path / name):
        return value
    with _named(run, name, "not readable as JSON"):
        value = json.loads(content(run.path / name, MOST[name]).decode("utf-8-sig"))
        if not isinstance(value, dict):
            run.problems.append(f"{run.path / name}: expected an object, got {type(value).__name__}")
    return value if isinstance(value, dict) else {}


def changes(paper: str, recipe: str, config: dict[str, Any]) -> list[tuple[str, str, str]] | None:
    """Fields of a run's config.json that differ from the recipe and options as they are defined now."""
    try:
        default = recipes(paper).RECIPES[recipe]
    except (OSError, KeyError):
        return None
    rows = []
    for part, value in (("recipe", default), ("options", Options())):
        before = json.loads(json.dumps(dataclasses.asdict(value), default=str))
        after = config.get(part, {})
        rows += [
            (key, *(json.dumps(side[key]) if key in side else "no such field" for side in (before, after)))
            for key in {**before, **after} if before.get(key) != after.get(key)
        ]
    return rows


@dataclass
class Paper:
    """A paper's card, and its runs, newest first."""

    name: str
    title: str
    claim: str
    glance: dict[str, str]
    runs: list[Run]

    @property
    def counts(self) -> str:
        finished = sum(run.record is not None for run in self.runs)
        unfinished = sum(not run.record and not run.problems for run in self.runs)
        damaged = len(self.runs) - finished - unfinished
        counts = ((finished, "finished"), (unfinished, "unfinished"), (damaged, "damaged"))
        return ", ".join(f"{n} {word}" for n, word in counts if n) or "none yet"

    @property
    def picture(self) -> str | None:
        """Of the newest finished run that drew one."""
        return next((uri for run in self.runs if run.record for _, uri in run.pictures), None)


@functools.cache
def known() -> dict[str, tuple[str, str, dict[str, str]]]:
    """Name, claim and glance of the papers that are here, in the order of their names."""
    return {
        name: (module.NAME, module.CLAIM, glance(ROOT / "papers" / name / "README.md"))
        for name in papers() for module in [recipes(name)]
    }


def cards(runs: list[Run]) -> list[Paper]:
    """The papers that are here, then any that runs are of."""
    names = [*known(), *sorted({run.paper for run in runs} - known().keys())]
    said = {name: known().get(name, (name, "", {})) for name in names}
    return [
        Paper(
            name, title, claim, {row: plain(text) for row, text in rows.items()},
            [run for run in runs if run.paper == name],
        )
        for name, (title, claim, rows) in said.items()
    ]


def panels(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Curves of a log: keys with the same last part (loss, val/loss) share a panel."""
    keys = dict.fromkeys(key for row in log for key in row if key != "step")
    groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key in keys:
        groups.setdefault(key.rpartition("/")[2], {})[key] = _points(log, key)
    return [panel(title, series) for title, series in groups.items()]


def panel(title: str, series: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """One set of axes: paths in px of the panel, ticks, and what to say below it."""
    finite = {key: [p for p in points if math.isfinite(p[1])] for key, points in series.items()}
    every = [p for points in finite.values() for p in points] or [(0, 0.0)]
    x_ticks, y_ticks = ticks(0, max(s for s, _ in every)), ticks(min(v for _, v in every), max(v for _, v in every))
    x_span, (low, high) = max(s for s, _ in every) or 1, (y_ticks[0], y_ticks[-1])

    def x(step: float) -> float:
        return round(LEFT + step / x_span * (WIDTH - LEFT - 8), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "title": title, "steps": x_span, "low": low, "high": high,
        "series": [
            {
                "key": key,
                "points": [(x(s), y(v)) for s, v in _thin(points)],
                "last": f"{figure(points[-1][1])} at step {points[-1][0]}" if points else "no finite value",
                "lost": len(series[key]) - len(points),
            }
            for key, points in finite.items()
        ],
        "x_ticks": [(x(t), f"{t:,.6g}") for t in x_ticks if t <= x_span],
        "y_ticks": [(y(t), f"{t:.6g}") for t in y_ticks],
    }


def ticks(low: float, high: float) -> list[float]:
    """Three to six round values from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    unit = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(unit * m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= 4)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _points(log: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in log if isinstance(row.get(key), int | float)]


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(points) <= POINTS:
        return points
    size = math.ceil(len(points) / (POINTS // 2))
    stretches = (points[i:i + size] for i in range(0, len(points), size))
    return [p for s in stretches for p in sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])})]


def data_uri(path: Path) -> str:
    """A picture as an address that holds it; ValueError or OSError if it is none, or too large for a page."""
    data = content(path, MOST["picture"])
    with Image.open(io.BytesIO(data), formats=[PICTURES[path.suffix.lower()]]) as image:
        image.verify()
        return f"data:{image.get_format_mimetype()};base64,{base64.b64encode(data).decode()}"


def page(runs: list[Run], root: Path) -> str:
    """The HTML page. A run that cannot be shown stands in it as damaged."""
    return _page([_shown(run, root) for run in runs], root)


def _shown(run: Run, root: Path) -> Run:
    try:
        _page([run], root)
        return run
    except Exception as error:  # figures that are no figures, such as a spread below 0
        problem = f"{run.path}: cannot be shown: {type(error).__name__}: {error}"[:400]
        print(f"damaged: {printable(problem)}", file=sys.stderr)
        return Run(run.paper, run.path.parent.name, run.path, run.time, kept=run.kept, problems=[problem])


def _page(runs: list[Run], root: Path) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    jinja = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return jinja.get_template("report.html.jinja").render(
        runs=runs, root=root, papers=cards(runs), now=datetime.datetime.now().astimezone(),
        figure=figure, short=short, headline=headline,
        size=(WIDTH, HEIGHT), left=LEFT, base=HEIGHT - BOTTOM, top=TOP,
    )


if __name__ == "__main__":
    run_main(main)
