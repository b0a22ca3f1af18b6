"""Top-k accuracy and cross-entropy, exact over any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.data import loader
from common.data.images import Images
from common.run import World


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
    model: torch.nn.Module, data: Images, transform: Callable, world: World, *, workers: int = 0, batch: int = 128
) -> dict[str, float]:
    """Scores (see `Accuracy.compute`) of a classifier over all of `data`, each image once over all ranks."""
    scores = Accuracy(world.device)
    batches = loader.eval_loader(
        loader.Plain(data, transform), batch, rank=world.rank, world=world.size, workers=workers
    )
    model.eval()
    with torch.inference_mode():
        for pixels, labels, _ in loader.progress(batches, "evaluating", active=world.main):
            pixels = pixels.to(world.device, memory_format=torch.channels_last)
            with world.autocast():
                logits = model(pixels)
            scores.update(logits, labels.to(world.device))
    return scores.compute(expected=len(data))
