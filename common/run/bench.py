"""Times ways of computing the same thing beside each other.

The ways of a case take turns, and ratios are formed within a turn, so that a machine that slows down slows all of
them; what is printed is the median and the quartiles of the ratios. A case is timed only after every way has given
the first one's result: one that does not stops the run.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch._dynamo
import torch._inductor.config
import tyro
from torch import Tensor

from common.run.files import UserError, write_json, write_text
from common.run.folder import environment, hardware

TURNS = 9
FARTHER = 4
"""How much farther than the first way a way may be from the exact result: rounding, not a mistake."""
COPY = "copy"


@dataclass
class Case:
    name: str
    ways: Mapping[str, Callable[..., object]]
    """Each does the whole of what is timed and returns what must agree, a tensor or several. The first is what the
    others are compared with."""
    inputs: tuple[Any, ...] = ()
    """Arguments of every way."""
    exact: Callable[..., object] | None = None
    """The first way's result in a wider type. Without it nothing is rounded, and all bits must agree."""
    tolerance: float | None = None
    """In place of `exact`: the largest difference from the first way, over its largest value."""
    copied: Tensor | None = None
    """A plain copy of this is timed too, and bytes per second are given over those of the copy."""
    bytes: int = 0
    """That any implementation has to move."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further figures for the record."""


# Parity -----------------------------------------------------------------------------------------------------


def check_parity(case: Case) -> dict[str, float]:
    """Largest difference of each way from the first, over its largest value. `UserError` where a way disagrees: beyond
    the case's `tolerance`; or, with `exact`, where a tensor is `FARTHER` times as far from it as the first way's is;
    with neither, in any bit."""
    names = list(case.ways)
    first = _tensors(case.ways[names[0]](*case.inputs))
    exact = first if case.exact is None else _tensors(case.exact(*case.inputs))
    whole = sum(t.float().norm() ** 2 for t in exact) ** 0.5  # some gradients are sums that cancel to nothing
    off = {}
    for name in names:
        off[name] = 0.0
        ours = _tensors(case.ways[name](*case.inputs))
        for i, (got, want, theirs) in enumerate(zip(ours, exact, first, strict=True)):
            want = want.to(torch.promote_types(want.dtype, torch.float32))
            difference = (got - want).abs().max().item() / max(theirs.abs().max().item(), 1e-30) if got.numel() else 0.0
            off[name] = max(off[name], difference)
            if case.tolerance is not None:
                right = difference <= case.tolerance
            elif case.exact is None:
                right = torch.equal(got, theirs)
            else:
                # a whole network's gradients differ by 4e-5 in float32, sums being taken in another order
                rounding = max(torch.finfo(got.dtype).eps, 1e-4)
                right = (got - want).norm() <= FARTHER * (theirs - want).norm() + rounding * want.norm() + 1e-6 * whole
            if not right:
                raise UserError(f"{case.name}: {name}, tensor {i} is off by {difference:.2g} of its largest; not timed")
    return off


def _tensors(result: object) -> list[Tensor]:
    """Detached copies: the next way may overwrite the gradients of a shared leaf."""
    return [t.detach().clone() for t in (result if isinstance(result, tuple | list) else (result,))]


# Times ------------------------------------------------------------------------------------------------------


def measure(case: Case, seconds: float, turns: int = TURNS, graphs: bool = False) -> dict[str, Any]:
    """Times the ways, `seconds` each in all; at least one execution a turn. `graphs`: each as a CUDA graph."""
    calls = {name: partial(way, *case.inputs) for name, way in case.ways.items()}
    if case.copied is not None:
        calls[COPY] = case.copied.clone
    if graphs:
        calls = {name: in_cuda_graph(call) for name, call in calls.items()}
    names, clock = list(calls), _clock()

    def timed(name: str, repeats: int) -> float:
        _synchronize()
        began = clock()
        for _ in range(repeats):
            calls[name]()
        _synchronize()
        return (clock() - began) / repeats

    repeats = {name: max(1, round(seconds / turns / max(timed(name, 1), 1e-9))) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(timed(name, repeats[name]))

    baseline = taken[names[0]]
    record = {
        "case": case.name,
        "seconds": {name: statistics.median(taken[name]) for name in case.ways},
        "times_faster": {name: quartiles(baseline, taken[name]) for name in case.ways},
        **case.about,
    }
    if case.copied is not None:
        scale = case.bytes / (2 * case.copied.numel() * case.copied.element_size())
        record |= {
            "bytes": case.bytes,
            "copy_seconds": statistics.median(taken[COPY]),
            "bytes_per_s_over_copy": {n: quartiles([scale * t for t in taken[COPY]], taken[n]) for n in case.ways},
        }
    return record


def in_cuda_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call's launches without Python between them: small maps take the GPU less time than Python the calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compilation, cuDNN's choices, the allocator: none of it may happen while recording
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clock() -> Callable[[], float]:
    """Process time for one thread on a CPU, because other processes do not lengthen it; else the wall clock."""
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if one_thread else time.perf_counter


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles(longer: Sequence[float], shorter: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios turn by turn."""
    return statistics.quantiles((a / b for a, b in zip(longer, shorter, strict=True)), n=4, method="inclusive")


def peak_bytes(function: Callable[[], object], device: torch.device | str) -> int:
    """Most memory that tensors take while `function` runs, beyond what they take before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # allocations and releases, in their order
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# Records ----------------------------------------------------------------------------------------------------


EXPLANATION = """Milliseconds ({clock}), median of {turns} turns; in brackets how many times faster than the first
column, median and quartiles of the ratios turn by turn. Over copy, where it
stands: bytes per second of ours over those of a plain copy of the same tensor, counting the bytes that the operation
cannot avoid."""

def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each case, a column for each way."""
    names = list(dict.fromkeys(name for r in records for name in r["seconds"]))
    copies = "bytes_per_s_over_copy" in records[0]
    columns = ["case", *names, *(["over copy"] if copies else [])]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for r in records:
        cells = [_cell(r, name) for name in names]
        if copies:
            cells.append(f"{r['bytes_per_s_over_copy']['ours'][1]:.2f}")
        lines.append(f"| {r['case']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(record: Mapping[str, Any], name: str) -> str:
    if name not in record["seconds"]:
        return "–"
    milliseconds = f"{record['seconds'][name] * 1e3:.4g}"
    if name == next(iter(record["seconds"])):
        return milliseconds
    low, middle, high = record["times_faster"][name]
    return f"{milliseconds} ({middle:.2f}, {low:.2f} to {high:.2f})"


@dataclass
class Arguments:
    subject: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """What to time; nothing: all of it."""
    only: str = ""
    """Cases with these words in their name; writes no record."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch: int = 0
    """0: what the subject is made for."""
    threads: int = torch.get_num_threads()
    graphs: bool = False
    """Time CUDA graphs: the GPU's time without Python's."""
    seconds: float = 0.5
    """Spent on each way at least."""


def main(
    prog: str, subjects: Mapping[str, Callable[..., Iterator[Case]]], folder: Path | Mapping[str, Path],
    batch: Mapping[str, int],
) -> None:
    """Command line of a benchmark. A subject yields ``cases(device, dtype, batch)``: bf16 and 128 samples on a GPU,
    float32 and `batch` on a CPU. Its record goes to `folder`, one for all or one for each."""
    args = tyro.cli(Arguments, prog=f"python -m {prog}", description=__doc__)
    if unknown := set(args.subject) - set(subjects):
        raise UserError(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(subjects)}")
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    device = "cuda" if cuda else "cpu"
    prepare(args.threads)
    dtype = torch.bfloat16 if cuda else torch.float32
    for subject in args.subject or list(subjects):
        torch.manual_seed(0)
        load, records = os.getloadavg()[0], []
        for case in subjects[subject](device, dtype, args.batch or (128 if cuda else batch[subject])):
            if args.only in case.name:
                check_parity(case)
                records.append(measure(case, args.seconds, graphs=args.graphs))
                print(table(records[-1:]).splitlines()[-1], flush=True)
        if records and not args.only:
            home = folder if isinstance(folder, Path) else folder[subject]
            stamp = f"{dtype}, {args.threads} thread{'s' * (args.threads > 1)}{', CUDA graphs' * args.graphs}"
            write_record(home, subject, device, records, table(records), stamp=stamp, load=load)


def prepare(threads: int) -> None:
    """The process as all benchmarks want it."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # exact results are float32 where the rows are bfloat16
    torch._dynamo.config.recompile_limit = 64  # one compilation per shape and layout
    torch._inductor.config.cpp.threads = threads


def write_record(
    folder: Path, subject: str, device: str, records: Any, text: str, *, stamp: str = "", load: float | None = None,
    explanation: str | None = None,
) -> Path:
    """Writes FOLDER/<subject>_<hardware>.json and .md: what was measured, under what it was measured with, and
    `explanation`, by default that of `table`."""
    about, machine = environment() | {"hardware": hardware(device)}, hardware(device)
    loads = "" if load is None else f", load average {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end"
    stamp = (
        f"{machine}, {device}, {stamp}, torch {torch.__version__}, revision {about['git']}, {about['time']}{loads} on "
        f"{os.cpu_count()} cores"
    )
    path = folder / slug(f"{subject} {machine}")
    write_json(path.with_suffix(".json"), {"environment": about, "stamp": stamp, "records": records})
    if explanation is None:
        explanation = EXPLANATION.format(clock=_clock().__name__, turns=TURNS)
    write_text(path.with_suffix(".md"), f"`{about['command']}`\n\n{stamp}\n\n{explanation}\n\n{text}")
    print(f"written: {path}.json and .md")
    return path.with_suffix(".json")


def slug(text: str) -> str:
    """Lower-case letters, digits and single underscores: for names of files."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
