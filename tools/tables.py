"""The parts of the papers' READMEs that are made from records, papers/<name>/results/*.json.

``python -m tools.tables`` rewrites what stands between the marker lines of each README; ``--check`` only says which are
stale, and fails if any is. A record is the results.json of one run (common/run/results.schema.json). In the part
"results" records that differ only in their seed share a row: mean ± sample standard deviation. Further parts are a
paper's own, in its compare.py: ``README_PARTS`` maps a part's name to a function of the paper's records,
``SHARED_PARTS`` to one of all papers' records, by paper.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import stat
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jsonschema
import tyro

from common.run import ROOT, SCHEMA, UserError, write_text
from common.run import main as run_main
from common.run.options import RENAMED
from common.run.readme import filled, markers
from tools.glance import table as glance_table
from tools.list import papers as listed
from tools.list import recipes

RECORD_BYTES = 2**20
"""Most that a results.json may have."""
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
    """READMEs under `papers` that do not show the records; rewritten with `write`."""
    records = {folder.name: read_records(folder) for folder in sorted(papers.iterdir()) if folder.is_dir()}
    stale = with_glances(papers, write)
    for paper, own in records.items():
        readme = papers / paper / "README.md"
        if not readme.is_file():
            continue
        text = readme.read_text(encoding="utf-8")
        wanted = with_parts(text, readme, parts(papers / paper, own, records))
        if wanted != text:
            stale.append(readme)
            if write:
                write_text(readme, wanted)
    return stale


def with_glances(papers: Path, write: bool) -> list[Path]:
    """The README above `papers`, if its table of the papers' glances is not what their READMEs say."""
    readme = papers.parent / "README.md"
    titles = {name: recipes(name).NAME for name in listed() if (papers / name).is_dir()} if readme.is_file() else {}
    text = readme.read_text(encoding="utf-8") if titles else ""
    wanted = filled(text, "glance", glance_table(papers, titles))
    if wanted in (None, text):
        return []
    if write:
        write_text(readme, wanted)
    return [readme]


def parts(folder: Path, own: list[Record], records: Mapping[str, list[Record]]) -> dict[str, str]:
    """The contents of a README's parts, by name."""
    made = {"results": table(own)}
    if (folder / "compare.py").is_file():
        compare = importlib.import_module(f"papers.{folder.name}.compare")
        made |= {name: make(own) for name, make in compare.README_PARTS.items()}
        made |= {name: make(records) for name, make in getattr(compare, "SHARED_PARTS", {}).items()}
    return made


def with_parts(text: str, readme: Path, made: Mapping[str, str]) -> str:
    """A README with its parts made anew. `UserError` where one has no place in it."""
    for name, content in made.items():
        filled_in = filled(text, name, content)
        if filled_in is None:
            lines = "\n".join(markers(name))
            raise UserError(f"{readme}: add these two lines where the part {name!r} belongs:\n{lines}")
        text = filled_in
    return text


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
        raise ValueError(f"expected finite numbers, got {constant[:40]}")

    def finite(number: str, kind: type = float) -> float:
        return kind(number) if math.isfinite(float(number)) else refuse(number)

    try:
        text = content(path, RECORD_BYTES).decode("utf-8-sig")
        record = json.loads(text, parse_constant=refuse, parse_float=finite, parse_int=partial(finite, kind=int))
        json.dumps(record, ensure_ascii=False).encode()  # half a character cannot be written into a page
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(record))
    if error:
        field = error.json_path.removeprefix("$").lstrip(".")
        raise UserError(f"{path}: {f'field {field}: ' if field else ''}{error.message[:300]}")
    return record


def content(path: Path, most: int) -> bytes:
    """A file's bytes. ValueError for a link, a pipe, anything else that is no regular file, or more than `most` bytes:
    run folders come from others, and what is read here is shown to everybody."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("a link, pipe or folder, not a file")
    if found.st_size > most:
        raise ValueError(f"{found.st_size:,} bytes, more than the {most:,} of any such file")
    return path.read_bytes()


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
        command = in_present_words(command, runs[0]["metrics"])
        notes.append(f"- {_plain(recipe)}: {_code(command)}" + "".join(f"; paper: {_plain(s)}" for s in sources))
    lines = [_row(COLUMNS), "|" + "---|" * len(COLUMNS), *map(_row, rows), ""]
    if spread:
        lines += ["±: sample standard deviation over the seeds.", ""]
    return "\n".join([*lines, *dict.fromkeys(notes), ""])


def in_present_words(command: str, metrics: list[dict[str, Any]]) -> str:
    """A recorded command with its options as they are called today; a number of seeds as these seeds."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in RENAMED:
            words[i] = "--" + RENAMED[name].replace("_", "-")
        if word == "--seeds" and len(seeds := metrics[0].get("seeds", ())) == int(words[i + 1]):
            words[i + 1] = " ".join(map(str, seeds))
    return " ".join(word if " " in word and word[0].isdecimal() else shlex.quote(word) for word in words)


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
    try:
        words = shlex.split(record["command"])
    except ValueError:  # quotes that never end
        words = record["command"].split()
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
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """A text as one line that is neither HTML nor a marker."""
    return " ".join(text.split()).replace("<", "&lt;")


def _code(text: str) -> str:
    """A command as one line of code, whatever backticks and markers are in it."""
    text = " ".join(text.split()).replace("<!--", "<! --")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}"


if __name__ == "__main__":
    run_main(main)
