"""Command line of a trainer: options, recipes with overrides, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from common.run import leaving
from common.run.files import UserError
from common.run.sources import source

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class Options:
    """How to run a recipe: nothing here changes what the paper prescribes."""

    data: Path | None = None
    """Data folder. Without one, the recipe's small built-in set is written to the cache and used."""
    out: Path = Path("runs")
    """Where run folders are made."""
    resume: str | None = None
    """A run folder, or 'auto' for the newest unfinished run of this recipe (a fresh one if there is none)."""
    seed: int = 0
    """Seed of the initial weights, the data order, the augmentation and the dropout of every step."""
    seeds: tuple[int, ...] = ()
    """Several seeds: a run each, reported as mean and spread. None: --seed, in a comparison with the two after it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of the forward pass; 'auto' is bf16 on a GPU, fp32 on a CPU. A GPU's fp32 products are TF32."""
    workers: int = 0
    """Data loading processes per rank; the data do not depend on it. Not given, a GPU has its share of the cores."""
    threads: int = 1
    """Threads of a CPU's computations, which end elsewhere with another number; 0: torch's own choice."""
    val_classes: Literal["all", "subset"] = "all"
    """'subset': validation may lack classes that training has."""
    missing: float = 0.01
    """Share of a listed training set that may be absent or damaged; of what is measured on, nothing may."""
    micro_batch: int = 0
    """Most samples a device takes at once; the global batch is reached by accumulation. 0: no limit."""
    compile: bool = False
    """Run the model through torch.compile."""
    deterministic: bool = False
    """Refuse operations that are not bit-reproducible (slower on a GPU)."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one per epoch. The two newest are kept."""
    log_every: int = 10
    """Steps between rows of the log."""
    wandb: bool = False
    """Send the log to Weights & Biases as well as to TensorBoard; needs the package wandb."""
    stop_at: int = 0
    """Write a checkpoint and leave after this step, as if the machine had been taken away; 0: never."""


# What recipes' fields were called before they were called the same in all papers.
RENAMED = {
    "base_lr": "lr", "backbone_lr": "backbone_lr_scale", "weights": "init", "start": "init", "connection": "init",
    "pretrained": "compare_init", "drop_epoch": "milestones", "drop_epochs": "milestones",
    "decay_epochs": "milestones", "contenders": "compare", "mixings": "compare", "crop_area": "crop_scale",
    "published": "authors_errors", "grey": "gray", "centre_jitter": "center_jitter", "colours_move": "colors_move",
    "jitter_chance": "jitter_probability", "warmup": "warmup_ratio", "region_share": "region_fraction",
}
# Options that may differ between a run and its resumption without changing the result.
FREE_ON_RESUME = {"data", "out", "resume", "workers", "checkpoint_every", "log_every", "wandb", "stop_at"}


def parse(recipes: Mapping[str, Recipe], prog: str, argv: Sequence[str] | None = None) -> tuple[str, Recipe, Options]:
    """Reads ``RECIPE [--field value ...]``: a recipe's name, then overrides of its fields and of `Options`.

    Leaves with status 2 and one message on an unknown recipe or field, or a value of the wrong type.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<20} {recipe.about.partition(chr(10))[0]}" for name, recipe in recipes.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m {prog} RECIPE [--field value ...]\n\nrecipes:\n{listing}\n")
        print(f"python -m {prog} RECIPE --help explains every field.")
        sys.exit(0 if argv else 2)
    name, rest = argv[0], argv[1:]
    if name not in recipes:
        sys.exit(_usage(f"{prog}: unknown recipe {name!r}; the recipes are\n{listing}"))
    kind = type(recipes[name])
    fields = {field.name for each in (kind, Options) for field in dataclasses.fields(each)}
    for word in rest:
        old = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and old in RENAMED.keys() - fields and RENAMED[old] in fields:
            sys.exit(_usage(f"{prog}: --{old.replace('_', '-')} is now called --{RENAMED[old].replace('_', '-')}"))
    both = dataclasses.make_dataclass("Run", [("recipe", kind), ("options", Options)], frozen=True)
    both.__doc__ = f"Recipe {name}: {recipes[name].about}"
    chosen = tyro.cli(
        tyro.conf.OmitArgPrefixes[both],
        default=both(recipe=recipes[name], options=Options()),
        args=rest,
        prog=f"python -m {prog} {name}",
    )
    return name, chosen.recipe, chosen.options


def _usage(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(function: Callable[[], object]) -> None:
    """Runs a command: what a person can mend becomes one line and status 2, a signal status 130 or 143, anything else a
    traceback and status 1. A process that fails ends the others."""
    before = leaving.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character has lost nothing else
    try:
        function()
    except Exception as error:
        leaving.training(False)
        if int(os.environ.get("RANK") or 0):
            time.sleep(3)  # what all processes see is rank 0's to report, and ends them all
        text = mendable(error)
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # or what follows would stand behind it
        if text is None:
            traceback.print_exc()
        else:
            shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)  # names hold anything
            print(f"error: {shown}", file=sys.stderr, flush=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            os._exit(1 if text is None else 2)  # the others may be waiting for this process: so would closing the group
        sys.exit(1 if text is None else 2)
    finally:
        leaving.listen(before)
    if dist.is_initialized():
        dist.destroy_process_group()
    if (status := leaving.status()) is not None:
        sys.exit(status)


def mendable(error: BaseException) -> str | None:
    """One line on what a person can mend: a `UserError`, a full disk, a folder that is closed; else None."""
    if isinstance(error, UserError) or getattr(error, "mendable", False):  # of files that stand without this module
        text = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1]  # a loader's worker puts its traceback before it
        return text.strip()
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return f"{error.strerror}: {error.filename or 'a file of the run folder, or of the cache'}"
    if re.search("No space left on device|unexpected pos|file write failed", str(error)):  # safetensors', torch's own
        return f"no space left on the device: {error}"
    if "File too large" in str(error):  # safetensors' own
        return f"a file may not become so large here (ulimit -f): {error}"
    if isinstance(error, RuntimeError) and "bus error" in str(error).lower():
        return "the loader's processes ran out of shared memory (/dev/shm): make it larger, or --workers 0"
    return None


def data_folder(recipe: Any, data: Path | None, built_in: Mapping[str, Callable[[], Path]]) -> Path:
    """Where a recipe's data are: as given, or the set that `built_in` writes for a recipe meant for it."""
    if data:
        return data
    if recipe.dataset in built_in:
        return built_in[recipe.dataset]()
    whence = f" ({text})" if (text := source(recipe.dataset)) else ""
    raise UserError(f"this recipe is meant for {recipe.dataset}: give its folder with --data{whence}")
