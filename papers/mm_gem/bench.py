"""What the chunked contrastive step costs and saves: ``python -m papers.mm_gem.bench``.

One training step (loss and gradients) over a batch of pairs, whole and in chunks of several sizes, taking turns; memory
is what the step takes beside the weights. Nothing is timed before losses and gradients have been found equal. Writes
results/bench/mm_gem_<recipe>_<hardware>.{json,md}.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common import run
from common.run import ROOT, UserError
from papers.mm_gem import parts
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.recipes import RECIPES

TURNS = 5


@dataclass
class Arguments:
    recipe: str = "tiny"
    """Whose model is measured, with random weights; float32 on a CPU, bf16 autocast on a GPU."""
    batch: int = 256
    text: int = 16
    """Tokens of a text, [EMB] included."""
    chunks: tuple[int, ...] = (128, 64, 32, 16)
    device: str = "auto"
    out: Path = ROOT / "papers" / "mm_gem" / "results" / "bench"


def measure(args: Arguments, world: run.World) -> list[dict[str, float]]:
    """A row for the whole batch (chunk = batch) and for every chunk size."""
    torch.manual_seed(0)
    recipe = RECIPES[args.recipe]
    with world.device:
        model = MMGEMModel(parts.blueprint(recipe)).train()
        side = getattr(model.config.vision_config, "image_size", 224)
        pixels = torch.randn(args.batch, 3, side, side)
        ids = torch.randint(4, model.config.emb_token_id, (args.batch, args.text))
        ids[:, -1] = model.config.emb_token_id
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(chunk: int) -> torch.Tensor:
        model.zero_grad()
        with world.autocast():
            loss = model(ids, pixels, chunk=chunk).loss
        loss.backward()
        return loss.detach()

    def gradient() -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, expected = step(0), gradient()
    tolerance = 1e-4 if world.amp is None else 3e-2
    rows = []
    for chunk in (args.batch, *args.chunks):
        loss, found = step(chunk), gradient()
        off = (found - expected).norm().item() / expected.norm().item()
        if off > tolerance or abs(loss - whole) > tolerance:
            raise UserError(f"in chunks of {chunk} the gradient is off by {off:.2g}: not timed")
        rows.append({"chunk": chunk, "gradient off by": off, "mb": peak_bytes(lambda c=chunk: step(c), world) / 1e6})
    times: dict[int, list[float]] = {row["chunk"]: [] for row in rows}
    for _ in range(TURNS):
        for chunk, each in times.items():
            began = time.perf_counter()
            step(chunk).item()
            each.append(time.perf_counter() - began)
    for row in rows:
        each = times[row["chunk"]]
        row["pairs_per_s"] = args.batch / statistics.median(each)
        row["slower"] = statistics.median(a / b for a, b in zip(each, times[args.batch]))
    return rows


def peak_bytes(function: Callable[[], object], world: run.World) -> int:
    """Most memory a step takes beside the weights, gradients included."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def page(found: dict) -> str:
    rows = [
        f"| {row['chunk'] if i else 'whole batch'} | {row['mb']:.0f} | {row['pairs_per_s']:.0f} | {row['slower']:.2f} |"
        for i, row in enumerate(found["rows"])
    ]
    return "\n".join([
        f"`{found['command']}`", "", found["about"], "",
        "| pairs at a time | peak memory, MB | pairs/s | time of the whole batch |", "|---|---|---|---|", *rows, "",
    ])


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.bench", description=__doc__)
    if args.recipe not in RECIPES:
        raise UserError(f"no recipe {args.recipe!r}; there are {', '.join(RECIPES)}")
    world = run.start_world(run.Options(device=args.device))
    environment = run.environment()
    found = {
        "command": environment["command"],
        "about": f"{args.recipe}: {args.batch} pairs of an image and {args.text} tokens, random weights, "
                 f"{environment['hardware']}, {environment['threads']} thread(s), torch {torch.__version__}, revision "
                 f"{environment['git'][:7]}, {environment['time']}",
        "rows": measure(args, world),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / ("mm_gem_" + re.sub(r"\W+", "_", f"{args.recipe} {run.hardware()}").lower())
    run.write_json(stem.with_suffix(".json"), found)
    stem.with_suffix(".md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    run.main(main)
