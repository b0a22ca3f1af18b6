"""Top-1, top-5 and loss, and their rows in results.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import run
from common.data import images, loader
from common.data.tiny.digits import digits
from common.run import World

UNITS = {"loss": "nats", "gap": "points"}  # of scores; all others are percentages


class Accuracy:
    """Sums over the samples each rank has seen; `compute` adds the ranks up and divides once."""

    def __init__(self, device: torch.device | str = "cpu"):
        # float64 counts integers exactly up to 2**53
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """logits (N, classes), target (N) class indices."""
        logits = logits.float()
        right = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        right &= logits.isfinite().all(1, keepdim=True)  # topk ranks NaN first
        loss = F.cross_entropy(logits, target, reduction="sum")
        self.sums += torch.stack([right[:, 0].sum(), right.sum(), loss, loss.new_tensor(len(target))]).double()

    def compute(self, expected: int) -> dict[str, float]:
        """{'top1', 'top5'} in percent, 'loss' in nats. Raises if not exactly `expected` samples were seen."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        top1, top5, loss, seen = sums.tolist()
        if seen != expected:
            raise RuntimeError(f"accuracy over {seen:.0f} samples, but the data hold {expected}")
        return {"top1": 100 * top1 / seen, "top5": 100 * top5 / seen, "loss": loss / seen}


def accuracy(
    model: torch.nn.Module, data: images.Images, recipe: Any, world: World, *, workers: int = 0, batch: int = 128,
    tolerant: bool = False,
) -> dict[str, float]:
    """Scores (see `Accuracy.compute`) over all of `data`, prepared as the recipe says, each image once.

    One that cannot be read is an error; with `tolerant`, for training images, it is left out, and rank 0 says how many.
    """
    scores, left_out = Accuracy(world.device), torch.zeros((), dtype=torch.long, device=world.device)
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    samples = loader.Plain(data, transform, tolerant=tolerant)
    batches = loader.eval_loader(samples, batch, rank=world.rank, world=world.size, workers=workers)
    model.eval()
    with torch.inference_mode():
        for pixels, labels, _ in loader.progress(batches, "evaluating", active=world.is_main):
            pixels = pixels.to(world.device, memory_format=torch.channels_last)
            with world.autocast():
                logits = model(pixels)
            readable = labels != loader.LEFT_OUT
            left_out += len(labels) - readable.sum()
            scores.update(logits[readable], labels[readable].to(world.device))
    missing = run.add_up(left_out).item()
    if missing and world.is_main:
        print(f"{missing} of {len(data)} images cannot be read, and are left out of the scores", file=sys.stderr)
    return scores.compute(expected=len(data) - missing)


def data_folder(recipe: Any, data: Path | None) -> Path:
    """Where a recipe's data are: as given, or the built-in digits for a recipe meant for them."""
    return run.data_folder(recipe, data, {"digits": digits})


def describe(recipe: Any, folder: Path | None, train: images.Images, val: images.Images) -> str:
    """What a result was measured on; data given in place of the built-in digits go by their folder's name."""
    name = folder.resolve().name if folder and recipe.dataset == "digits" else recipe.dataset
    return f"{name}: {len(train):,} training, {len(val):,} validation images"


def metrics(scores: Mapping[str, float], recipe: Any, comparable: bool) -> list[dict[str, Any]]:
    """Rows of results.json; the first score is the one the paper reports."""
    rows = [run.metric(key, value, UNITS.get(key, "%")) for key, value in scores.items()]
    rows[0] |= {"paper_value": recipe.paper_top1, "paper_source": recipe.paper_source, "comparable": comparable}
    return rows
