"""Which videos there are and what they show, in the layouts people have on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data.video.files import VideoFile, open_video
from common.data.video.frames import FrameFolder
from common.data.video.layouts import EXPECTED, LAYOUTS
from common.run import UserError

BAD = 0.01  # share of a training list whose lines or files may be missing


class Videos:
    """Where videos are, and their classes: ``paths``, ``labels`` (class indices from 0), ``classes`` (names).

    ``skipped`` counts, by kind, what stands in the folder or its lists and is not among them; `notes` says it.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str],
        skipped: dict[str, int] | None = None,
    ):
        outside = [label for label in labels if not 0 <= label < len(classes)]  # may not fit into 64 bits
        if outside:
            raise UserError(
                f"labels run from {min(labels)} to {max(labels)}, expected 0 to {len(classes) - 1}: "
                f"{len(classes)} classes, counted from 0"
            )
        self.paths, self.labels, self.classes = list(paths), np.asarray(labels, dtype=np.int64), list(classes)
        self.skipped = dict(skipped or {})

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def notes(self) -> str:
        """What is passed over, in a line for a log or a report; empty if nothing is."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.skipped.items()))


class Clips(Dataset):
    """``sample(video, rng)`` of every video, with its label: what common/data/loader.py loads.

    In training the generator follows from numpy's, which the loader seeds for each sample; with a `seed` it follows
    from that and the video's index, so that every evaluation sees the same clips.
    """

    def __init__(self, videos: Videos, sample: Callable[[VideoFile | FrameFolder, np.random.Generator], Any], *,
                 seed: int | None = None):
        self.videos, self.sample, self.seed = videos, sample, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int):
        key = np.random.randint(2**32) if self.seed is None else (self.seed, index)
        with open_video(self.videos.paths[index]) as video:
            return self.sample(video, np.random.default_rng(key)), int(self.videos.labels[index])

    def name(self, index: int) -> str:
        return self.videos.name(index)


def open_videos(root: str | Path, split: str, *, fold: int = 1, missing: float | None = None) -> Videos:
    """Opens split 'train' or 'val' of a folder in a layout of layouts.py; `fold` chooses UCF101's and HMDB51's.

    Classes are numbered by the training split, whichever is opened. Lines that cannot be read and files that are
    missing are counted and named. Up to `missing`, a share of the list, is passed over: by default 1 % in training and
    none in evaluation. More is a `UserError`.
    """
    root = Path(root)
    expected = EXPECTED.format(root=root)
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {expected}")
    for layout in LAYOUTS:
        found = layout(root, split, fold)
        if found:
            break
    else:
        raise UserError(f"{root} has no {split} split: {expected}")
    lost = {path for path, _ in tqdm(found.rows, desc=f"looking for {split} videos", disable=len(found.rows) < 20_000)
            if not _is_there(path)}
    bad = found.bad + [f"no file {path}" for path in sorted(lost)]
    total = len(found.rows) + len(found.bad)
    if missing is None:
        missing = BAD if split == "train" else 0
    if len(bad) > missing * total:
        raise UserError(
            f"{len(bad)} of {total} {split} videos listed in {root} cannot be used, first: {bad[0]}; "
            f"{missing:.4g} of them may be missing (--missing; {BAD} in training, none in evaluation). "
            f"`python -m common.data.video lists {root} OUT` writes lists of those that can"
        )
    if bad:
        print(f"{len(bad)} of {total} {split} videos listed in {root} are passed over, first: {bad[0]}")
        found.skipped["listed videos that cannot be used"] = len(bad)
    rows = [(path, label) for path, label in found.rows if path not in lost]
    if not rows:
        raise UserError(f"{root} lists no {split} videos: {expected}")
    paths, labels = [path for path, _ in rows], [label for _, label in rows]
    return Videos(paths, labels, found.classes, found.skipped)


def _is_there(path: Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)  # no pipes, which would be waited for


def write_list(folder: Path, split: str, rows: Iterable[tuple[Path, int, int]], classes: Sequence[str]) -> None:
    """{split}.txt with (path, frames, label) of every video, and classes.txt: a folder that `open_videos` opens."""
    with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
        for path, frames, label in rows:
            file.write(f"{os.fsencode(path).decode()} {frames} {label}\n")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
