"""Loading that is a function of (seed, step): the same samples with the same augmentation whatever the number
of workers or ranks, and after a resume as without one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from common.data.picture import Unreadable
from common.data.text import printable
from common.run import UserError


def steps_per_epoch(samples: int, batch: int) -> int:
    """Whole global batches in the data; `UserError` if there is not one."""
    if batch > samples:
        raise UserError(f"the global batch of {batch} is larger than the {samples} training samples")
    return samples // batch


class StepSampler(Sampler):
    """Batches of (sample index, augmentation seed) for the steps ``start .. steps - 1`` of a whole training.

    Every epoch is a fresh permutation of the data cut into global batches, the last incomplete one dropped. Rank r
    of R takes every R-th sample of each batch, so the global batch does not depend on R. With ``repeats`` > 1 each
    image comes that many times in a row, augmented anew each time, and an epoch is as long as before: repeated
    augmentation (Hoffer et al. 2020, as in DeiT).
    """

    def __init__(
        self, length: int, batch: int, steps: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1,
        repeats: int = 1,
    ):
        self.length, self.batch, self.steps, self.start = length, batch, steps, start
        self.seed, self.rank, self.world, self.repeats = seed, rank, world, repeats
        self.per_epoch = steps_per_epoch(length, batch)

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = -1
        for step in range(self.start, self.steps):
            if epoch != step // self.per_epoch:
                epoch = step // self.per_epoch
                rng = np.random.default_rng((self.seed, epoch))
                order = rng.permutation(self.length).repeat(self.repeats)[: self.length]
                seeds = rng.integers(2**32, size=self.length)
            first = step % self.per_epoch * self.batch
            rows = range(first + self.rank, first + self.batch, self.world)
            yield [(int(order[row]), int(seeds[row])) for row in rows]


class Augmented(Dataset):
    """Training samples addressed by (index, seed): all randomness of the transform follows from the seed.

    A sample that cannot be read (`Unreadable`) is written to `report`, a line of name, tab and reason, and its neighbor
    taken instead, until more than `limit` (a share of the data) have failed; then training ends with a `UserError`.
    What `transform` raises is no fault of a file's, and ends the training as it is.
    """

    def __init__(self, data: Dataset, transform: Callable, *, report: Path | None = None, limit: float = 0.01):
        self.data, self.transform, self.report = data, transform, report
        self.limit = max(1, int(limit * len(data)))
        self.failed = torch.zeros(len(data), dtype=torch.bool).share_memory_()  # one view for all workers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for CUDA in a worker
        while True:
            try:
                image, label = self.data[index]
                break
            except Unreadable as error:
                self._record(index, error)
                index = (index + 1) % len(self.data)
        return self.transform(image), label

    def _record(self, index: int, error: Exception) -> None:
        if not self.failed[index]:
            self.failed[index] = True
            if self.report:
                with open(self.report, "a", encoding="utf-8") as file:
                    file.write(f"{printable(self.data.name(index))}\t{printable(str(error))}\n")
        if (count := int(self.failed.sum())) > self.limit:
            raise UserError(
                f"{count} of {len(self.data)} samples cannot be read, the last {self.data.name(index)} ({error}); "
                + (f"see {self.report}" if self.report else f"the limit is {self.limit}")
            )


LEFT_OUT = -1  # the label of a picture that cannot be read, where such are tolerated


class Plain(Dataset):
    """Evaluation samples: (transformed image, label, index). Unreadable ones are an error, never left out.

    Training pictures are another matter: some of them may be unreadable. With `tolerant` a gray picture of label
    `LEFT_OUT` stands for each, and whoever evaluates leaves those out and says how many they were.
    """

    def __init__(self, data: Dataset, transform: Callable, *, tolerant: bool = False):
        self.data, self.transform, self.tolerant = data, transform, tolerant

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        try:
            image, label = self.data[index]
        except Unreadable as error:
            if not self.tolerant:
                raise UserError(f"cannot evaluate: {self.data.name(index)} is unreadable ({error})") from None
            image, label = Image.new("RGB", (64, 64), "gray"), LEFT_OUT
        return self.transform(image), label, index


def train_loader(
    data: Dataset, transform: Callable, batch: int, steps: int, *, seed: int, start: int = 0, rank: int = 0,
    world: int = 1, repeats: int = 1, workers: int = 0, report: Path | None = None,
) -> DataLoader:
    """This rank's share of the global batches of steps ``start .. steps - 1``: `StepSampler` over `Augmented`."""
    sampler = StepSampler(len(data), batch, steps, seed=seed, start=start, rank=rank, world=world, repeats=repeats)
    return DataLoader(
        Augmented(data, transform, report=report), batch_sampler=sampler, num_workers=workers,
        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0, worker_init_fn=_one_thread,
    )


def eval_loader(dataset: Plain, batch: int, *, rank: int = 0, world: int = 1, workers: int = 0) -> DataLoader:
    """Each sample once over all ranks: nothing is padded, so sums over ranks are exact."""
    mine = range(rank, len(dataset), world)
    return DataLoader(
        dataset, batch_size=batch, sampler=mine, num_workers=workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def identity(sample: Any) -> Any:
    """The transform of samples that are made already."""
    return sample


def progress(loader, what: str, active: bool = True):
    """`loader` with a progress bar that goes away when done; none where there is no terminal."""
    return tqdm(loader, desc=what, leave=False, disable=None if active else True, dynamic_ncols=True)
