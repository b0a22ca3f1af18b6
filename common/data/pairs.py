"""Training samples for trackers: frames of one sequence, drawn by data-set weight and frame gap, cut out and augmented.

::

    data = open_data(recipe, root)
    pairs = Pairs(data.train, PairTransform(template_px=128, search_px=256), length=recipe.pairs_per_epoch, report=...)
    for batch in pairs_loader(pairs, recipe.batch, steps, seed=seed, start=start, rank=rank, world=size):
        template, search = (crops.normalize(batch[name].to(device)) for name in ("template", "search"))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.data import crops, tracking
from common.data.loader import StepSampler
from common.data.text import printable
from common.data.tiny.sequences import sequences
from common.run import UserError


@dataclass(frozen=True)
class Sample:
    """A frame that was drawn. Not to be written into: a still image stands in all samples drawn from it.

    `image` is (H, W, 3) uint8 RGB, `box` (4,) float64 x, y, w, h in pixels, zero-based.
    """

    image: np.ndarray
    box: np.ndarray
    sequence: tracking.Sequence


@dataclass(frozen=True)
class Data:
    """Which sequences a tracker is trained on, and which it is measured on."""

    train: dict[str, list[tracking.Sequence]]
    val: list[tracking.Sequence]
    """For losses: GOT-10k's validation split, where its training split trains and it is there."""
    test: list[tracking.Sequence]
    """For tracking: the same, or the data sets that were held out."""
    damaged: list[str] = dataclasses.field(default_factory=list)
    """What is wrong with each annotation that is left out of `train`."""

    def name_damaged(self, report: Path) -> None:
        """Writes those into `report`, a line each, where a run that is resumed has not done so already."""
        known = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        with open(report, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self.damaged if line not in known)

    def describe(self, name: str) -> str:
        videos = sum(len(s) > 1 for found in self.train.values() for s in found)
        stills = sum(len(s) == 1 for found in self.train.values() for s in found)
        stills = f" and {stills:,} still objects" if stills else ""
        return f"{name}: {videos:,} training sequences{stills}, {len(self.test)} test sequences"


def open_data(recipe: Any, root: str | Path, missing: float = 0.01, coco_side_px: float = 50.0) -> Data:
    """The data sets that `recipe.datasets` and `recipe.held_out` name: subfolders of `root` (`tracking.folders`), or,
    where one is asked for, `root` itself.

    Of training splits a share `missing` of the annotations may be such as cannot be used, and is left out. Where data
    sets are held out, they are tested on and train nothing, and `datasets`, among them the built-in "sequences", are
    taken whole where they have no splits. One that is in both gives its training split to the one and its validation
    split to the other. Of COCO's objects those count whose sides are above `coco_side_px`.
    """
    folders = tracking.folders(root)
    if not recipe.held_out and len(recipe.datasets) == 1:
        folders = {recipe.datasets[0]: Path(root)} | folders
    built_in = {"sequences"}
    if absent := ({*recipe.datasets} - built_in | {*recipe.held_out}) - {*folders}:
        raise UserError(f"{root} has no folder for {', '.join(sorted(absent))}; it has {', '.join(folders) or 'none'}")
    train, damaged = {}, []
    for name in recipe.datasets:
        if name == "sequences":
            train[name] = tracking.open_sequences(sequences(), "train")
        elif name == "coco":
            splits = ("train", "val") if recipe.held_out else ("train",)
            train[name] = [s for split in splits for s in tracking.open_coco(folders[name], split, coco_side_px)]
        elif recipe.held_out:
            train[name] = tracking.open_sequences(folders[name], tracking.split_in(folders[name], "train"))
        else:
            train[name] = tracking.open_sequences(folders[name], "train", limit=missing, damaged=damaged)
    if recipe.held_out:
        test = []
        for name in recipe.held_out:
            test += tracking.open_sequences(folders[name], "val" if name in recipe.datasets else None)
        if unknown := [s.name for s in test if len(s) > 1 and not np.isfinite(s.boxes[1:]).all(1).any()]:
            raise UserError(f"held out for tests, but without boxes beyond the first frame: {', '.join(unknown[:3])}")
        return Data(train, [], test)
    has_val = "got10k" in train and (folders["got10k"] / "val" / "list.txt").is_file()
    val = tracking.open_sequences(folders["got10k"], "val") if has_val else []
    return Data(train, val, val, damaged)


def draw_frames(sequence: tracking.Sequence, n: int, max_gap: int, rng: np.random.Generator) -> list[int]:
    """n visible frames: any one but the last, then others after it at most `max_gap` frames later, in random order.

    Where no frame lies that near, the limit grows by 5 until one does. A still image serves n times.
    """
    visible = np.flatnonzero(sequence.visible)
    if len(sequence) == 1:
        return [0] * n
    place = int(rng.integers(len(visible) - 1))
    first, later = visible[place], visible[place + 1 :]
    limit = first + max_gap + 5 * max(0, math.ceil((later[0] - first - max_gap) / 5))
    near = later[later <= limit]
    return [int(first), *rng.choice(near, n - 1, replace=len(near) < n - 1).tolist()]


class Pairs(Dataset):
    """Samples addressed by (position, seed) as `StepSampler` gives them: everything follows from the seed.

    A sample is `n` frames of one sequence, given as list[Sample] to `transform(samples, rng)`, which returns a dict of
    tensors, or None to have others drawn. With probability `negatives` the last frame comes from another sequence.
    Data sets are drawn by `weights` (default: equally), their sequences uniformly; a video needs `min_frames` frames,
    of them `min_visible` visible.

    A frame that cannot be read is named in `report`, once a sequence, and other frames are drawn, until more than
    `limit` (a fraction of the sequences, at least one; 0: none) have such frames: then training ends with a
    `UserError`.
    """

    def __init__(
        self, sets: Mapping[str, list[tracking.Sequence]],
        transform: Callable[[list[Sample], np.random.Generator], dict[str, torch.Tensor] | None],
        *, length: int, n: int = 2, max_gap: int = 200, negatives: float = 0.0,
        weights: Mapping[str, float] | None = None, min_frames: int = 20, min_visible: int = 5,
        report: Path | None = None, limit: float = 0.01,
    ):
        weights = weights or dict.fromkeys(sets, 1.0)
        if weights.keys() != sets.keys():
            raise UserError(f"weights are given for {sorted(weights)}, the data sets are {sorted(sets)}")
        if min(weights.values()) <= 0:
            raise UserError(f"weights {weights}: expected numbers above 0; leave out data that are not to be drawn")
        if length < 1:
            raise UserError(f"{length} samples of {', '.join(sets)} are asked for: expected at least 1")
        self.transform, self.length, self.n, self.max_gap = transform, length, n, max_gap
        self.negatives, self.report = negatives, report
        self.sequences: list[tracking.Sequence] = []
        self.ranges = []
        for name, found in sets.items():
            first = len(self.sequences)
            self.sequences += [
                s for s in found
                if (s.visible[0] if len(s) == 1 else len(s) >= min_frames and s.visible.sum() >= max(min_visible, 2))
            ]
            self.ranges.append((first, len(self.sequences)))
            if first == len(self.sequences):
                raise UserError(
                    f"none of the {len(found)} sequences of {name} can be used: a video needs {min_frames} frames and "
                    f"its target visible in {min_visible}"
                )
        drawn = np.array([weights[name] for name in sets])
        self.probabilities = drawn / drawn.sum()
        self.limit = max(1, int(limit * len(self.sequences))) if limit else 0
        self.failed = torch.zeros(len(self.sequences), dtype=torch.bool).share_memory_()  # one view for all workers

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        rng, rejected = np.random.default_rng(key[1]), 0
        for _ in range(100):
            chosen = self._draw(rng)
            where = [(chosen, frame) for frame in draw_frames(self.sequences[chosen], self.n, self.max_gap, rng)]
            if rng.random() < self.negatives and len(self.sequences) > 1:
                while (other := self._draw(rng)) == chosen:
                    pass
                where[-1] = (other, draw_frames(self.sequences[other], 1, self.max_gap, rng)[0])
            samples = self._read(where)
            if samples is None:
                continue
            try:
                made = self.transform(samples, rng)
            except UserError as error:
                raise UserError(f"{self._names(where)}: {error}") from None
            if made is not None:
                return made
            rejected += 1
        raise UserError(
            f"100 samples in a row gave no usable crop, the last {self._names(where)}: {rejected} showed nothing of "
            f"their frames, {100 - rejected} could not be read; do the boxes lie in the frames?"
        )

    def _names(self, where: list[tuple[int, int]]) -> str:
        named = ((self.sequences[number], frame) for number, frame in where)
        return ", ".join(f"{sequence.dataset} {sequence.name} frame {frame + 1}" for sequence, frame in named)

    def _draw(self, rng: np.random.Generator) -> int:
        """Position of a sequence in `sequences`, by data-set weight."""
        return int(rng.integers(*self.ranges[rng.choice(len(self.probabilities), p=self.probabilities)]))

    def _read(self, where: list[tuple[int, int]]) -> list[Sample] | None:
        images = {}
        for number, frame in dict.fromkeys(where):
            try:
                images[number, frame] = tracking.read_frame(self.sequences[number].frames[frame])
            except OSError as error:
                self._record(number, error)
                return None
        return [Sample(images[i, f], self.sequences[i].boxes[f], self.sequences[i]) for i, f in where]

    def _record(self, number: int, error: OSError) -> None:
        if not self.failed[number]:
            self.failed[number] = True
            if self.report:
                with open(self.report, "a", encoding="utf-8") as file:
                    file.write(f"{printable(str(error))}\n")
        if (count := int(self.failed.sum())) > self.limit:
            raise UserError(
                f"{count} of {len(self.sequences)} sequences have frames that cannot be read, expected at most "
                f"{self.limit}; the last: {error}" + (f"; {self.report} names all of them" if self.report else "")
            )


@dataclass(frozen=True)
class PairTransform:
    """Template and search crops with the augmentation of SBT's code, and its settings as defaults."""

    template_px: int = 128
    search_px: int = 256
    template_factor: float = 2.0
    """Side of the template crop over the target's mean side sqrt(w h)."""
    search_factor: float = 5.0
    center_jitter: float = 4.5
    """The search crop's center is uniform over this many mean sides of the (jittered) target, per axis."""
    scale_jitter: float = 0.5
    """Standard deviation of the logarithm of each side before the search crop is taken around it."""
    gray: float = 0.05
    """Probability that both crops lose their color."""
    flip: float = 0.5
    """Probability that a crop is mirrored, each on its own. (Mirroring both together as well would change nothing.)"""
    brightness: float = 0.2
    """Each crop's own factor is uniform in 1 - this to 1 + this."""

    def __call__(self, samples: list[Sample], rng: np.random.Generator) -> dict[str, torch.Tensor] | None:
        """{"template": (3, T, T), "search": (3, S, S) uint8 RGB, "template_box", "search_box": (4,) float32}.

        Boxes are x, y, w, h divided by the crop's side, not clipped: a target may stick out of its search crop, or
        lie outside it. None when a crop would show nothing of its frame.
        """
        template, search = samples
        moved = crops.jitter(
            search.box, self.center_jitter, self.scale_jitter, rng.standard_normal(2), rng.random(2)
        )
        gray, made = rng.random() < self.gray, {}
        for name, sample, box, factor, size in (
            ("template", template, template.box, self.template_factor, self.template_px),
            ("search", search, moved, self.search_factor, self.search_px),
        ):
            height, width = sample.image.shape[:2]
            crop = self.around(box, factor, size)
            outside = crops.padding(crop, width, height)
            if outside[::16, ::16].all():  # the pixels a grid of stride 16 would look at
                return None
            pixels = crops.cut(sample.image, crop)
            pixels = brighten(to_gray(pixels) if gray else pixels, 1 + self.brightness * rng.uniform(-1, 1))
            target = crop.to_crop(sample.box) / size
            if rng.random() < self.flip:
                pixels, target = mirror(pixels, target)
            made |= {name: crops.to_tensor(pixels), f"{name}_box": torch.from_numpy(target).float()}
        return made

    def around(self, box, factor: float, size: int) -> crops.Crop:
        return crops.around(box, factor, size)


def mirror(pixels: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left-right mirrored crop (H, W, C), and its box x, y, w, h divided by the crop's side."""
    return pixels[:, ::-1], np.array([1 - box[0] - box[2], *box[1:]])


def brighten(pixels: np.ndarray, factor: float) -> np.ndarray:
    """uint8 pixels times a factor, clamped."""
    return cv2.convertScaleAbs(pixels, alpha=factor)


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB pixels without color, still in three channels."""
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)




def pairs_loader(
    pairs: Pairs, batch: int, steps: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader:
    """This rank's part of the global batches of steps ``start .. steps - 1``; an epoch is ``len(pairs)`` samples."""
    sampler = StepSampler(len(pairs), batch, steps, seed=seed, start=start, rank=rank, world=world)
    return DataLoader(
        pairs, batch_sampler=sampler, num_workers=workers, pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0, worker_init_fn=_one_thread,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
