"""What is done for one paper, in a process of its own."""

from __future__ import annotations

import importlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from common.run import ROOT
from tools.rehearse import data as data_of
from tools.rehearse.cost import VIEWS
from tools.rehearse.layouts import lay_out
from tools.rehearse.walk import Row, table, walk


@dataclass
class Arguments:
    paper: Annotated[str, tyro.conf.Positional] = ""
    """Folder under papers/; "": all of them."""
    recipe: Annotated[str, tyro.conf.Positional] = ""
    """One recipe; "": all that are full-scale."""
    data: Literal["none", "whole"] = "none"
    """"whole": also lay out the data in their real number, for minutes, and open them."""
    views: int = 0
    """Views through each distinct augmentation; -1: as many as could show a rare error; 0: none."""
    check: bool = False
    """Compare with the tables that are there instead of writing them."""
    processes: int = 2
    """Papers at once."""


def walk_paper(job: tuple[str, list[str], Arguments]) -> list[str]:
    """What is wrong with a paper's recipes, or with its table where they are compared."""
    paper, names, args = job
    torch.set_num_threads(1)
    recipes = importlib.import_module(f"papers.{paper}.recipes").RECIPES
    rows, seen, wrong = [], {}, []
    with tempfile.TemporaryDirectory() as home:
        for name in names:
            recipe = recipes[name]
            few = Path(home) / recipe.dataset.replace(", ", "+").replace(" ", "_")
            if not few.exists():
                lay_out(recipe.dataset, few)
            row = walk(paper, name, recipe, few)
            if args.views and row.shown.samples is not None:
                row.why_not = row.why_not or _views(paper, name, row, seen, args.views)
            rows.append(row)
            print(f"{paper} {name}: {row.why_not or 'ready'}", flush=True)
    if args.data == "whole":
        wrong += _whole(paper, {recipes[name].dataset: name for name in reversed(names)})
    if args.recipe:
        print(table(rows))
        return wrong + [f"{paper} {row.recipe} is not ready: {row.why_not}" for row in rows if row.why_not]
    path = ROOT / "papers" / paper / "results" / "rehearsal.md"
    text = table(rows)
    if args.check:
        return wrong + _stale(path, text)
    path.write_text(text, encoding="utf-8")
    return wrong


def _views(paper: str, name: str, row: Row, seen: dict[str, tuple[float, list[str]]], count: int) -> str:
    samples, key = row.shown.samples, data_of.signature(row.shown.samples)
    if key not in seen:
        seen[key] = data_of.look(samples, count if count > 0 else data_of.VIEWS[data_of.kind(samples)])
    seconds, wrong = seen[key]
    path = VIEWS / f"{paper}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found | {name: round(seconds, 4)}, indent=0, sort_keys=True) + "\n")
    return f"{len(wrong)} views fail, the first: {wrong[0]}" if wrong else ""


def _whole(paper: str, datasets: dict[str, str]) -> list[str]:
    """Each data set of a paper in its real number, opened in a process of its own, twice: the second finds an index."""
    wrong = []
    for dataset, name in datasets.items():
        with tempfile.TemporaryDirectory() as home:
            root = Path(home) / "data"
            lay_out(dataset, root, 1.0)
            for turn in ("first", "again"):
                found = data_of.in_a_process(_open, paper, name, root)
                print(f"{dataset}, opened {turn}: {found}", flush=True)
                wrong += [f"{dataset} cannot be opened: {found.error}"] if found.error else []
    return wrong


def _open(paper: str, name: str, root: Path) -> data_of.Opening:
    cases = importlib.import_module(f"papers.{paper}.cases")
    recipes = importlib.import_module(f"papers.{paper}.recipes").RECIPES
    return data_of.opening(cases.rehearsal(recipes[name]), root)


def _stale(path: Path, text: str) -> list[str]:
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    new = text.splitlines()
    differ = [(a, b) for a, b in zip(old, new) if a != b]
    if not differ and len(old) == len(new):
        return []
    first = f": {differ[0][0]} is now {differ[0][1]}" if differ else ""
    return [f"{path} is stale (make rehearse){first}"]
