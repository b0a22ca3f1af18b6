"""What a paper's ``__main__.py`` calls."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.run.log import expect_wandb
from common.run.options import main, parse
from common.run.sweep import Train, over_seeds
from common.run.world import start_world


def door(
    paper: str, recipes: Mapping[str, Any], train: Train, compare: Callable[..., Path] | None = None
) -> None:
    """The command line of ``python -m papers.<paper> RECIPE``.

    A recipe that lists what it compares goes to ``compare(name, recipe, options, world, train)``; with several --seeds
    there is a run for each; else it is one call of `train`. At the end stands the report.
    """

    def start() -> None:
        name, recipe, options = parse(recipes, f"papers.{paper}")
        if options.wandb:
            expect_wandb()
        world = start_world(options)
        if world.device.type == "cuda" and not any(word.split("=")[0] == "--workers" for word in sys.argv):
            options = replace(options, workers=cores_per_process())
        if getattr(recipe, "compare", ()):
            folder = compare(name, recipe, options, world, train)
        elif options.seeds:
            folder = over_seeds(paper, name, recipe, options, world, train)
        else:
            folder = train(name, recipe, options, world)
        if world.is_main and (folder / "report.md").exists():
            print((folder / "report.md").read_text(encoding="utf-8"))

    main(start)


def cores_per_process(most: int = 16) -> int:
    """Of this machine, for the loaders of each of its processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def through_the_door(package: str | None) -> None:
    """For ``python -m papers.<paper>.train``: as ``python -m papers.<paper>``, which knows the comparisons too."""
    runpy.run_module(f"{package}.__main__", run_name="__main__", alter_sys=True)
