"""Looks at what was typed before anything is installed, launched, downloaded or built: standard library only.

    [PAPER=... RECIPE=... DATA=... CHECKPOINT=... INPUT=... GPUS=... SEEDS=...] python -m tools.check VERB

Status 2 and one line for a mistake.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load(path: Path):
    """A module of the standard library's only, without its package."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def mistake(verb: str, given: dict[str, str]) -> str | None:
    """What is wrong with what was typed, in one line; None if nothing is."""
    listing = load(HERE / "list.py")
    paper, recipe = given.get("PAPER", ""), given.get("RECIPE", "")
    known = listing.papers()
    needs_paper = verb in ("reproduce", "train", "smoke", "evaluate", "demo", "plan")
    if (paper or needs_paper) and paper not in known:
        return f"{f'no paper {paper!r}' if paper else 'which paper? PAPER=...'}; there are: {' '.join(known)}"
    for name in ("GPUS", "SEEDS"):
        if not all(word.isdecimal() for word in given.get(name, "").split()):
            return f"{name} takes whole numbers, got {given[name]!r}"
    if verb == "bench" and paper and not (listing.PAPERS / paper / "bench.py").is_file():
        return f"{paper} has no benchmark of its own"
    if verb == "demo" and given.get("INPUT") and not Path(given["INPUT"]).exists():
        return f"no INPUT at {given['INPUT']}: expected a picture or a video"
    if verb == "evaluate" and not given.get("CHECKPOINT"):
        return "which checkpoint? CHECKPOINT=run folder, file of weights, or shipped"
    if verb == "evaluate" and not given["CHECKPOINT"].startswith("shipped") and not Path(given["CHECKPOINT"]).exists():
        return f"no checkpoint at {given['CHECKPOINT']}: expected a run folder or a file of weights"
    if verb == "plan" and not recipe:
        return "which recipe? RECIPE=...; make list shows them"
    if given.get("DATA") and not Path(given["DATA"]).is_dir():
        return f"no data folder {given['DATA']}{whence(listing, paper, recipe)}"
    if verb in ("reproduce", "train", "plan") and paper:
        recipes = listing.recipes(paper)
        if recipe and recipe not in recipes.RECIPES:
            return f"{paper} has no recipe {recipe!r}; there are {', '.join(recipes.RECIPES)}"
        needs = recipes.RECIPES[recipe or "tiny"].dataset
        if verb != "plan" and not given.get("DATA") and "--data" not in given.get("ARGS", "") and (
            needs not in recipes.BUILT_IN
        ):
            return f"this recipe is meant for {needs}: give its folder with DATA=FOLDER{whence(listing, paper, recipe)}"
    return None


def whence(listing, paper: str, recipe: str) -> str:
    """Where the data of a recipe come from, as the end of a sentence."""
    if paper not in listing.papers():
        return ""
    found = listing.recipes(paper).RECIPES.get(recipe or "tiny")
    text = load(HERE.parent / "common" / "run" / "sources.py").source(found.dataset) if found else ""
    return f" ({text})" if text else ""


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    names = ("PAPER", "RECIPE", "DATA", "CHECKPOINT", "INPUT", "GPUS", "SEEDS", "ARGS")
    if text := mistake(verb, {name: os.environ.get(name, "").strip() for name in names}):
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
