"""A recipe's data in their real layout and number: opened as the recipe opens them, and looked at."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from common import run
from common.run.cases import Rehearsal
from tools.rehearse.pretend import Pretend

VIEWS = {"policy": 20_000, "pictures": 5_000, "clips": 1_000}
"""Views drawn of the RandAugment policy, which errs once in seven hundred; of other pictures; of clips of videos."""
# Fields of a recipe that no view depends on.
ELSEWHERE = {
    "about", "model", "model_args", "backbone", "mph", "mph_width", "mph_depth", "lr", "epochs", "milestones", "batch",
    "dataset", "eval_every", "paper_scores", "paper_source", "paper_top1", "init", "weight_decay", "clip_norm", "head",
    "pairs_per_epoch", "datasets", "shares", "output_stride", "test_clips", "test_stride", "width",
}


class Opened(Exception):
    """The trainer has its data."""


@dataclass
class Opening:
    """What it took."""

    seconds: float
    cpu_seconds: float
    memory_mb: float
    error: str = ""


def opening(work: Rehearsal, data: Path) -> Opening:
    """Calls a recipe's trainer until it has opened its data: then it seeds the generators."""

    def opened(*_key: int) -> None:
        raise Opened

    before, start, cpu = _resident_mb(), time.perf_counter(), time.process_time()
    error = ""
    try:
        if work.opens:
            kept = work.opens(data)
        else:
            with patch.object(run, "seed_all", opened):
                work.train("rehearsal", work.recipe, run.Options(data=data), Pretend(0, 1, torch.device("cpu"), None))
    except Opened as done:
        kept = done.__traceback__  # and with it what was opened
    except run.UserError as problem:
        error, kept = str(problem), None
    memory = _resident_mb() - before
    del kept
    return Opening(time.perf_counter() - start, time.process_time() - cpu, memory, error)


def _resident_mb() -> float:
    """This process's own memory: pages that it shares with others, such as a mapped index, are not in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


def in_a_process(function: Callable, *args: Any) -> Any:
    """``function(*args)`` in a fresh one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def signature(samples: Any) -> str:
    """What views depend on, as text: two recipes with the same one need be looked at once."""

    def told(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return type(value).__name__, sorted((k, told(v)) for k, v in fields.items() if k not in ELSEWHERE)
        if isinstance(value, functools.partial):
            return value.func.__name__, [told(v) for v in (*value.args, *value.keywords.values())]
        if hasattr(value, "recipe"):
            return type(value).__name__, told(value.recipe)
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

    transform = getattr(samples, "transform", None)
    sample = getattr(getattr(samples, "data", None), "sample", None)
    return str((told(transform), told(sample)))


def kind(samples: Any) -> str:
    if hasattr(getattr(samples, "data", None), "videos"):
        return "clips"
    return "policy" if "RandAugment" in signature(samples) else "pictures"


def look(samples: Any, count: int) -> tuple[float, list[str]]:
    """(seconds of a core for a view, what went wrong) of so many views, each of its own seed."""
    wrong, start = [], time.process_time()
    for seed in range(count):
        try:
            samples[seed % len(samples), seed]
        except Exception as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {error}")
    return (time.process_time() - start) / count, wrong


def workers_memory_mb(samples: Any, workers: int, batches: int = 4, batch: int = 64) -> list[float]:
    """Anonymous memory of each of so many loader processes after some batches, MB."""
    order = np.random.default_rng(0).integers(len(samples), size=(batches * workers, batch))
    keys = [[(int(i), int(i)) for i in row] for row in order]
    loaded = torch.utils.data.DataLoader(samples, batch_sampler=keys, num_workers=workers, collate_fn=_nothing)
    batches_of = iter(loaded)
    for _ in range(batches * workers - 1):
        next(batches_of)
    return [_anonymous_mb(process.pid) for process in batches_of._workers]


def _anonymous_mb(pid: int) -> float:
    """Memory that is this process's alone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty:\s+(\d+)", text)[1]) / 1024


def _nothing(_samples: list) -> int:
    return 0


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
