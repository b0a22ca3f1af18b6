"""What training a recipe will cost: ``python -m tools.plan PAPER RECIPE``. Nothing is trained or allocated.

A full-scale recipe is rehearsed (tools/rehearse): the first step of its own training, on as many GPUs as the paper has
unless --gpus says otherwise, gives the memory, DeepSpeed's stage and checkpointing included; the hours are those of the
device or of the loader, whichever is slower. Of other recipes an estimate is told, of the model that
``papers.<name>.cases.training_cost`` gives. Memory is an estimate, counted as follows.

- Weights (with buffers), gradients and optimizer states in the parameters' own type: two moments for Adam, one for a
  recipe whose `optimizer` is SGD; a second copy of the gradients in DDP's buckets on several GPUs; one copy of the
  weights for a recipe with `ema_decay`.
- Activations: the forward pass in training mode runs on CUDA tensors without storage (PyTorch's FakeTensorMode, which
  unlike the plain meta device goes through CUDA's autocast), and every distinct storage that autograd keeps for the
  backward pass is counted, at two batch sizes; what does not grow with the batch is mostly autocast's copies of the
  weights. Not seen: temporary tensors, the loss, library workspaces, fragmentation, gradient checkpointing that a
  trainer switches on, and what torch.compile or a kernel saves or recomputes.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode

import papers
from common.run import ROOT, UserError, World, accumulation, multiply_adds
from common.run import main as run_main
from common.run.cases import TrainingCost
from tools.list import full_scale
from tools.rehearse.cost import CARDS_GB, PEAK_TFLOPS, PROCESSES, USABLE, UTILISATIONS, cost
from tools.rehearse.layouts import lay_out
from tools.rehearse.walk import judge
from tools.tables import figure, read_record


@dataclass
class Arguments:
    paper: Annotated[str, tyro.conf.Positional]
    """Folder under papers/."""
    recipe: Annotated[str, tyro.conf.Positional]
    gpus: int | None = None
    """None: the paper's number for a full-scale recipe, else one."""
    batch_per_gpu: int = 0
    """Most samples a GPU takes at once; the global batch is reached by accumulation. 0: no limit."""
    samples_per_s: float = 0.0
    """Training throughput of all GPUs together, samples per second; 0: unknown."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type the forward pass runs in."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m tools.plan", description=__doc__)
    recipe, training_cost = load(args.paper, args.recipe)
    if args.recipe in full_scale_if_any(args.paper):
        print(rehearsed(args, recipe, training_cost))
    else:
        print(plan(args, recipe, training_cost))


def full_scale_if_any(paper: str) -> list[str]:
    """Names of the recipes that are rehearsed; none of a paper whose cases.py does not say how."""
    cases = importlib.import_module(f"papers.{paper}.cases")
    return full_scale(paper) if hasattr(cases, "rehearsal") else []


def rehearsed(args: Arguments, recipe: Any, counted: TrainingCost) -> str:
    """What a rehearsal says of a full-scale recipe."""
    checked(args, counted)
    work = importlib.import_module(f"papers.{args.paper}.cases").rehearsal(recipe)
    work = replace(work, gpus=args.gpus or work.gpus, micro_batch=args.batch_per_gpu or work.micro_batch)
    with tempfile.TemporaryDirectory() as home:
        if work.train:
            lay_out(recipe.dataset, Path(home) / "data")
        row = judge(args.paper, args.recipe, work, counted, Path(home) / "data", precision=args.precision)
    shown, found = row.shown, row.cost
    lines = [f"{args.paper} {args.recipe}: {recipe.about}", ""]
    lines += [f"not ready: {row.why_not}" if row.why_not else "ready"]
    if found is None:
        return "\n".join([*lines, "no plan of a training whose first step fails"])
    samples, cards = shown.steps * counted.batch, [f"{card} GB" for card in CARDS_GB if found.fits(card)]
    lines += [
        f"training  {shown.steps:,} steps of {counted.batch:,} samples on {work.gpus} GPUs, {found.flops:.3g} FLOPs",
        f"rates     {row.rates}",
        f"memory of one GPU at {shown.batch} samples, {args.precision}",
        *(f"  {name:<26}{size / 1e9:9.3f} GB" for name, size in shown.memory.items()),
        f"  {'in all':<26}{found.memory_gb:9.3f} GB; fits into {', '.join(cards) or 'no card'}",
    ]
    if args.samples_per_s:
        return "\n".join([*lines, *times(args, samples, 0)])
    low, high = UTILISATIONS
    lines.append(f"time, estimated from {low:.0%} to {high:.0%} of peak FLOP/s, or the loader's (not measured)")
    for card in PEAK_TFLOPS:
        hours = cost(args.paper, args.recipe, work, counted, shown, card=card, precision=args.precision).hours
        lines.append(f"  {work.gpus} x {card:<13} {hours[0]:,.1f} to {hours[1]:,.1f} h")
    if found.loader_hours:
        need = "{} to {}".format(*found.processes)
        lines.append(f"loader    {found.loader_hours:,.1f} h with {PROCESSES} processes a GPU; an A100 needs {need}")
    else:
        lines.append("loader    not measured: make rehearse ARGS='--views -1'")
    return "\n".join([*lines, *measured_times(args, samples)])


def checked(args: Arguments, work: TrainingCost) -> None:
    """`UserError` for what cannot be asked."""
    if (args.gpus is not None and args.gpus < 1) or args.batch_per_gpu < 0 or args.samples_per_s < 0:
        raise UserError("--gpus must be at least 1, --batch-per-gpu and --samples-per-s not negative")
    if work.batch > work.samples:
        raise UserError(f"the global batch {work.batch} exceeds the {work.samples} samples of an epoch")


def load(paper: str, name: str) -> tuple[Any, TrainingCost]:
    """A recipe and what training it amounts to."""
    known = sorted(p.parent.name for folder in papers.__path__ for p in Path(folder).glob("*/cases.py"))
    if paper not in known:
        raise UserError(f"unknown paper {paper!r}; the papers are {', '.join(known)}")
    recipes = importlib.import_module(f"papers.{paper}.recipes").RECIPES
    if name not in recipes:
        raise UserError(f"unknown recipe {name!r} of {paper}; its recipes are {', '.join(recipes)}")
    return recipes[name], importlib.import_module(f"papers.{paper}.cases").training_cost(recipes[name])


def plan(args: Arguments, recipe: Any, work: TrainingCost) -> str:
    """The whole answer as text."""
    checked(args, work)
    args = replace(args, gpus=args.gpus or 1)
    chunks = accumulation(work.batch, World(0, args.gpus, torch.device("meta"), None), args.batch_per_gpu)
    at_once = -(-work.batch // (args.gpus * chunks))
    macs = multiply_adds(work.model, *work.inputs)
    steps = work.epochs * (work.samples // work.batch)
    samples = steps * work.batch
    flops = 6 * macs * samples

    params = sum(p.numel() for p in work.model.parameters())
    trainable = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
    memory = states_bytes(work.model, recipe, args.gpus)
    fixed, per_sample = activation_bytes(work, args.precision)
    memory["activations"] = fixed + per_sample * at_once
    tensors = sum(memory.values()) - per_sample * at_once
    fits = (f"{max(0, int((USABLE * card * 1e9 - tensors) // per_sample)):,} in {card} GB" for card in CARDS_GB)

    return "\n".join([
        f"{args.paper} {args.recipe}: {recipe.about}",
        "",
        f"model     {params:,} parameters" + (f", {trainable:,} of them trained" if trainable < params else ""),
        f"          {macs:,} multiply-adds per sample, forward",
        f"training  {work.epochs} epochs of {work.samples // work.batch:,} steps: {steps:,} steps, {samples:,} samples",
        f"          {flops:.3g} FLOPs in all: backward counted as two forwards, 2 FLOPs per multiply-add",
        f"batch     {work.batch:,} = {args.gpus} GPUs x {work.batch // args.gpus:,} samples"
        + (f", accumulated over {chunks} chunks of at most {at_once:,}" if chunks > 1 else ""),
        "",
        f"memory of one GPU at {at_once:,} samples, {args.precision} (estimate; how it is counted: --help)",
        *(f"  {name:<16}{size / 1e9:9.3f} GB" for name, size in memory.items()),
        f"  {'in all':<16}{sum(memory.values()) / 1e9:9.3f} GB",
        f"  activations grow by {per_sample / 1e6:,.2f} MB per sample; largest batch in {USABLE:.0%} of the memory:",
        f"  {', '.join(fits)}",
        "",
        *times(args, samples, flops),
    ])


def states_bytes(model: torch.nn.Module, recipe: Any, gpus: int) -> dict[str, int]:
    """Bytes of one GPU that do not depend on the batch, by name."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    moments = 1 if "sgd" in getattr(recipe, "optimizer", "adamw").lower() else 2
    return (
        {"weights": weights, "gradients": trained, "optimizer states": moments * trained}
        | ({"DDP buckets": trained} if gpus > 1 else {})
        | ({"EMA": weights} if getattr(recipe, "ema_decay", 0) else {})
    )


def activation_bytes(work: TrainingCost, precision: str) -> tuple[int, int]:
    """What autograd keeps for the backward pass on a CUDA device: (bytes whatever the batch, bytes per sample)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty_like(t, device="cuda", requires_grad=t.requires_grad)
            for name, t in (*work.model.named_parameters(), *work.model.named_buffers())
        }
        # Two and three samples: batch normalisation refuses one.
        two, three = (_saved_bytes(work, state, samples, precision) for samples in (2, 3))
    return two - 2 * (three - two), three - two


def _saved_bytes(work: TrainingCost, state: dict[str, torch.Tensor], samples: int, precision: str) -> int:
    own = {t.untyped_storage()._cdata for t in state.values()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    batch = tuple(torch.empty(samples * len(x), *x.shape[1:], dtype=x.dtype, device="cuda") for x in work.inputs)
    was_training, before = work.model.training, torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", precision == "bf16")  # torch.autocast itself refuses where there is no GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.func.functional_call(work.model.train(), state, batch)
    finally:
        torch.set_autocast_enabled("cuda", before)
        torch.clear_autocast_cache()
        work.model.train(was_training)
    return sum(storage.nbytes() for storage in saved.values())


def times(args: Arguments, samples: int, flops: int) -> list[str]:
    """Hours at the throughput given; else as assumed from peak figures, and as measured where there is a record."""
    if rate := args.samples_per_s:
        return [f"time      {_hours(samples / rate)} at the {figure(rate)} samples/s given"]
    lines = ["time, estimated from peak FLOP/s x assumed utilisation (not measured)"]
    for gpu, peaks in PEAK_TFLOPS.items():
        peak = peaks[args.precision]
        cells = (f"{_hours(flops / (args.gpus * peak * 1e12 * share))} at {share:.0%}" for share in UTILISATIONS)
        lines.append(f"  {args.gpus} x {gpu:<13} {peak:>4} TFLOP/s each: {', '.join(cells)}")
    return lines + measured_times(args, samples)


def measured_times(args: Arguments, samples: int) -> list[str]:
    """Hours at the throughput of the newest records."""
    return [
        f"time, measured: {_hours(samples / rate)} at {figure(rate)} samples/s on {hardware} ({path})"
        for rate, hardware, path in measured(args.paper, args.recipe)
    ]


def _hours(seconds: float) -> str:
    return "under 0.1 h" if seconds < 360 else f"{seconds / 3600:,.1f} h"


def measured(paper: str, recipe: str) -> list[tuple[float, str, Path]]:
    """(samples/s, hardware, record) of the newest record of this recipe on each hardware, kept or under runs/."""
    kept = (ROOT / "papers" / paper / "results").glob("*.json")
    newest = {}
    for path in (*kept, *Path("runs").glob(f"{paper}/{recipe}/*/results.json")):
        try:
            record = read_record(path)
        except UserError as error:
            print(f"passing over {error}", file=sys.stderr)
            continue
        if record["recipe"] == recipe and record["throughput"]:
            found = (record["time"], record["throughput"], path)
            newest[record["hardware"]] = max(newest.get(record["hardware"], found), found)
    return [(rate, hardware, path) for hardware, (_, rate, path) in sorted(newest.items())]


if __name__ == "__main__":
    run_main(main)
