"""results.json and report.md."""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.run.files import UserError, write_json, write_text
from common.run.folder import command, computed_on, git_revision, hardware, now, release
from common.run.options import Options

SCHEMA = json.loads((Path(__file__).parent / "results.schema.json").read_text(encoding="utf-8"))


def metric(
    name: str, value: float, unit: str, *, paper_value: float | None = None, paper_source: str | None = None,
    comparable: bool = False,
) -> dict[str, Any]:
    """One row of ``results.json``. `comparable` only if data, protocol and variant equal the paper's."""
    return {
        "name": name, "value": value, "unit": unit,
        "paper_value": paper_value, "paper_source": paper_source, "comparable": comparable,
    }


def multiply_adds(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds in convolutions and matrix products of one forward pass in eval mode.

    Counted on the meta device, where nothing is computed: the counter does not know the attention kernels of CPUs.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).to("meta").eval()(*(x.to("meta") for x in inputs))
    return counter.get_total_flops() // 2


def peak_memory_bytes() -> int:
    """Most memory taken so far: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def spread(values: Sequence[float]) -> dict[str, float]:
    """{'value': mean, 'spread': sample standard deviation} of one figure over seeds; of a single one no spread."""
    mean = {"value": statistics.mean(values)}
    return mean | ({"spread": statistics.stdev(values)} if len(values) > 1 else {})


def write_results(folder: Path, results: Mapping[str, Any], table: str = "") -> None:
    """Completes `results` with revision, hardware and command, checks them against the schema and writes them.

    ``results.json`` is for tools; ``report.md``, which `table` ends, for people.
    """
    import jsonschema

    results = {
        **results,
        "threads": torch.get_num_threads() if computed_on() == "cpu" else None,
        "git": git_revision(), "hardware": hardware(computed_on()), "command": command(sys.orig_argv), "time": now(),
    }
    jsonschema.validate(results, SCHEMA)
    write_json(folder / "results.json", results)
    write_text(folder / "report.md", report(results, folder) + (f"\n{table}" if table else ""))


def finish(
    folder: Path, paper: str, recipe: str, options: Options, *, data: str, metrics: Sequence[Mapping[str, Any]],
    params: int, flops: float | None, wall_s: float, throughput: float | None, peak_mem_bytes: int | None = None,
    table: str = "", then: Mapping[str, Callable[[], object]] | None = None,
) -> None:
    """Ends a run on the main process: results.json, then report.md, then what else is to be made of it.

    `then` are pictures and exports, by name. One that fails is named with its traceback and takes nothing with it; one
    that a kill left undone is made when the run is resumed.
    """
    kept = [row for row in metrics if math.isfinite(row["value"])]
    for row in metrics:
        if row not in kept:
            print(f"{row['name']} is {row['value']}, and left out of the results of {folder}", file=sys.stderr)
    if not kept:
        raise UserError(f"no figure of this run is a number: {', '.join(row['name'] for row in metrics)}; see {folder}")
    results = {
        "paper": paper, "recipe": recipe, "data": data, "metrics": kept, "params": params, "flops": flops,
        "wall_s": wall_s, "throughput": throughput, "peak_mem_bytes": peak_mem_bytes or peak_memory_bytes(),
        "seed": options.seed,
    }
    pending = folder / "pending.json"
    write_json(pending, list(then or {}))
    write_results(folder, results, table)
    for name, make in (then or {}).items():
        try:
            make()
        except Exception:
            print(f"{name} could not be made; the results are in {folder}:\n{traceback.format_exc()}", file=sys.stderr)
    write_results(folder, results, table)  # the pictures are there now
    pending.unlink()
    release(folder)


def report(results: Mapping[str, Any], folder: Path) -> str:
    """The page that ends a run: paper's figures beside ours, and where everything is."""
    rows = [
        f"| {m['name']} | {_figure(m['paper_value'])} | {_figure(m['value'])} {m['unit']} "
        f"| {'yes' if m['comparable'] else 'no'} |" for m in results["metrics"]
    ]
    sources = sorted({f"{m['name']}: {m['paper_source']}" for m in results["metrics"] if m["paper_source"]})
    notes = [] if any(m["comparable"] for m in results["metrics"]) else [
        "Not comparable with the paper: other data, size or schedule than the paper's.", ""]
    return "\n".join([
        f"# {results['paper']} · {results['recipe']}", "",
        "| metric | paper | ours | comparable |", "|---|---|---|---|", *rows, "",
        *notes,
        *(f"Paper's figure, {s}" for s in sources),
        f"Data: {results['data']}. Parameters: {results['params']:,}. "
        f"Multiply-adds per sample: {_figure(results['flops'] / 1e9 if results['flops'] else None)} G. "
        f"Trained {results['wall_s']:.0f} s at {_figure(results['throughput'])} samples/s on {results['hardware']}"
        f"{_threads(results['threads'])}, "
        f"peak memory {results['peak_mem_bytes'] / 2**20:.0f} MiB, seed {results['seed']}.", "",
        f"Run folder: {folder}{_unreadable(folder)}", "",
        *(f"![{p.stem}]({p.name})" for p in sorted(folder.glob("*.png"))), "",
    ])


def _unreadable(folder: Path) -> str:
    """How many training samples could not be read, of those that the loader wrote down (common/data/loader.py)."""
    report = folder / "unreadable.txt"
    count = len(report.read_bytes().splitlines()) if report.is_file() else 0
    return f". {count:,} training sample{'s' * (count > 1)} could not be read: unreadable.txt" if count else ""


def _threads(count: int | None) -> str:
    return "" if count is None else f", {count} thread{'s' * (count > 1)}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
