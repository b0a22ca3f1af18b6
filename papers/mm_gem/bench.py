"""What the chunked contrastive step costs and saves: ``python -m papers.mm_gem.bench``.

One training step (loss and gradients) over a batch of pairs, whole and in chunks of several sizes, taking turns; memory
is what a step takes beside the weights. Nothing is timed before losses and gradients have been found equal. Writes
results/bench/mm_gem_<recipe>_<hardware>.{json,md}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from common import run
from common.run import UserError
from common.run.bench import Case, check_parity, measure, peak_bytes, prepare, table, write_record
from papers.mm_gem import build
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.recipes import RECIPES

TEXT_TOKENS = 16  # [EMB] included


@dataclass
class Arguments:
    recipe: str = "tiny"
    """Whose model is measured, with random weights; float32 on a CPU, bf16 autocast on a GPU."""
    batch: int = 256
    chunks: tuple[int, ...] = (128, 64, 32, 16)
    """Pairs at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = torch.get_num_threads()
    seconds: float = 0.5
    """Spent on each chunk size at least."""
    out: Path = Path(__file__).parent / "results" / "bench"
    """Folder of the record."""


def study(args: Arguments, world: run.World) -> dict[str, Any]:
    """The record of a step over the whole batch, and in chunks of each size."""
    torch.manual_seed(0)
    recipe = RECIPES[args.recipe]
    with world.device:
        model = MMGEMModel(build.blueprint(recipe)).train()
        side = getattr(model.config.vision_config, "image_size", 224)
        pixels = torch.randn(args.batch, 3, side, side)
        ids = torch.randint(4, model.config.emb_token_id, (args.batch, TEXT_TOKENS))
        ids[:, -1] = model.config.emb_token_id
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(chunk: int) -> Tensor:
        model.zero_grad()
        with world.autocast():
            loss = model(ids, pixels, chunk=chunk).loss
        loss.backward()
        return loss

    def loss_and_gradient(chunk: int) -> tuple[Tensor, Tensor]:
        return step(chunk), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    chunks = {"whole batch": 0} | {f"{chunk} at a time": chunk for chunk in args.chunks}
    results = {name: partial(loss_and_gradient, chunk) for name, chunk in chunks.items()}
    steps = {name: partial(step, chunk) for name, chunk in chunks.items()}
    title = f"step of {args.batch} pairs"
    check_parity(Case(title, results, tolerance=1e-4 if world.amp is None else 3e-2))
    memory = {name: peak_bytes(step, world.device) for name, step in steps.items()}
    return measure(Case(title, steps, about={"peak_bytes": memory}), args.seconds)


def page(record: Mapping[str, Any], batch: int) -> str:
    """Markdown: the times, and what the README shows of them."""
    lines = ["| pairs at a time | peak memory, MB | pairs/s | time of the whole batch |", "|---|---|---|---|"]
    for name, seconds in record["seconds"].items():
        memory, longer = record["peak_bytes"][name] / 1e6, 1 / record["times_faster"][name][1]
        lines.append(f"| {name} | {memory:.0f} | {batch / seconds:.0f} | {longer:.2f} |")
    return "\n".join([table([record]), *lines, ""])


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.bench", description=__doc__)
    if args.recipe not in RECIPES:
        raise UserError(f"no recipe {args.recipe!r}; there are {', '.join(RECIPES)}")
    world = run.start_world(run.Options(device=args.device))
    prepare(args.threads)
    record = study(args, world)
    text = page(record, args.batch)
    stamp = f"{args.recipe}, {TEXT_TOKENS} tokens a text, random weights, {args.threads} thread(s)"
    write_record(args.out, f"mm_gem_{args.recipe}", world.device.type, [record], text, stamp=stamp)
    print(text)


if __name__ == "__main__":
    run.main(main)
