"""What training a recipe will cost: ``python -m tools.plan PAPER RECIPE``. Nothing is trained or allocated.

The model comes from ``papers.<name>.cases.training_cost``. Memory is an estimate, counted as follows.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode

import papers
from common.run import ROOT, UserError, World, accumulation, multiply_adds
from common.run import main as run_main
from common.run.cases import TrainingCost
from tools.tables import figure, read_record

# Dense peak of the vendors' data sheets, TFLOP/s, by autocast type; fp32 runs in TF32.
PEAK_TFLOPS = {
    "A100": {"bf16": 312, "fp32": 156},
    "H100 or H200": {"bf16": 989, "fp32": 495},
    "RTX 4090": {"bf16": 165, "fp32": 83},
}
UTILISATIONS = (0.2, 0.4)
"""Assumed shares of the peak that training reaches."""
CARDS_GB = (24, 40, 80, 141)
USABLE = 0.9
"""Share of a card's memory that the counted tensors may fill."""


@dataclass
class Arguments:
    paper: Annotated[str, tyro.conf.Positional]
    """Folder under papers/."""
    recipe: Annotated[str, tyro.conf.Positional]
    gpus: int = 1
    batch_per_gpu: int = 0
    """Most samples a GPU takes at once; the global batch is reached by accumulation. 0: no limit."""
    samples_per_s: float = 0.0
    """Training throughput of all GPUs together, samples per second; 0: unknown."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type the forward pass runs in."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m tools.plan", description=__doc__)
    recipe, training_cost = load(args.paper, args.recipe)
    print(plan(args, recipe, training_cost))


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
    if args.gpus < 1 or args.batch_per_gpu < 0 or args.samples_per_s < 0:
        raise UserError("--gpus must be at least 1, --batch-per-gpu and --images-per-s not negative")
    if work.batch > work.samples:
        raise UserError(f"the global batch {work.batch} exceeds the {work.samples} samples of an epoch")
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
    for rate, hardware, path in measured(args.paper, args.recipe):
        lines.append(f"time, measured: {_hours(samples / rate)} at {figure(rate)} samples/s on {hardware} ({path})")
    return lines


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
