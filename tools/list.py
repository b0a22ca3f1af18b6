"""Papers, their recipes, and what each needs. Standard library only: it runs before anything is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PAPERS = Path(__file__).resolve().parent.parent / "papers"


def papers() -> list[str]:
    """Folders that hold a paper, in alphabetical order."""
    return sorted(path.parent.name for path in PAPERS.glob("*/recipes.py"))


def recipes(paper: str) -> ModuleType:
    """A paper's recipes.py, loaded alone: without its package, hence without torch."""
    spec = importlib.util.spec_from_file_location(f"_{paper}_recipes", PAPERS / paper / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Data that are at hand, or that a CPU trains on in minutes; all others are those of papers.
SMALL = {
    "CIFAR-10", "Imagenette", "Tiny-ImageNet-100", "Flickr8k", "COCO captions", "pictures", "real videos",
    "pictures of many objects or of one", "46 real sequences and COCO",
    "OTB, VOT, GOT-10k, LaSOT and coco side by side",
}


def full_scale(paper: str) -> list[str]:
    """The recipes on a paper's own data."""
    module = recipes(paper)
    return [name for name, r in module.RECIPES.items() if r.dataset not in {*module.BUILT_IN, *SMALL}]


def main() -> None:
    if sys.argv[1:] == ["--full-scale"]:
        print("\n".join(f"{paper} {name}" for paper in papers() for name in full_scale(paper)))
        return
    if sys.argv[1:]:
        sys.exit(f"error: tools.list knows --full-scale, not {' '.join(sys.argv[1:])}")
    for paper in papers():
        module = recipes(paper)
        print(f"{paper}: {module.TITLE}\n    {module.CLAIM}")
        requirements = (PAPERS / paper / "requirements.txt").read_text(encoding="utf-8").split("\n")
        if needs := [line for line in requirements if line and not line.startswith("#")]:
            print(f"    installs besides: {', '.join(needs)}")
        for name, recipe in module.RECIPES.items():
            needs = "" if recipe.dataset in module.BUILT_IN else f"; needs {recipe.dataset}"
            print(f"    {name:<28}{recipe.about}{needs}")
        print()
    print("make reproduce PAPER=... [RECIPE=...] [DATA=folder]")


if __name__ == "__main__":
    main()
