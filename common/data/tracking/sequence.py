"""A sequence: frames on disk, and a target's box in each."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.picture import Unreadable, read_picture
from common.data.text import printable

MAX_SIDE_PX = 100_000
"""No image is wider: a larger number in an annotation is an error, and would ask for as much memory."""


class Frames(collections.abc.Sequence):
    """Paths of numbered files, made when asked for: the frames of a training set go into the millions."""

    def __init__(self, folder: Path, pattern: str, numbers: range):
        self.folder, self.pattern, self.numbers = folder, pattern, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Frames(self.folder, self.pattern, self.numbers[index])
        return self.folder / self.pattern.format(self.numbers[index])


@dataclass(frozen=True, eq=False)
class Sequence:
    """One target in one video (or still image). Opening reads text files alone; pixels come from `read_frame`.

    Boxes are zero-based here whatever the files hold: a pixel covers [i, i + 1) and the image [0, W) x [0, H). The
    files of OTB and LaSOT count from one; `offset` is then 1, and boxes + (offset, offset, 0, 0) are the files' own
    coordinates, in which the benchmarks' toolkits compare and result files are written.
    """

    name: str
    """The benchmark's name for it, which result files bear; unique within its data set."""
    dataset: str
    """"otb", "got10k", "lasot", "trackingnet", "vot" or "coco"."""
    frames: collections.abc.Sequence[Path]
    """Image files in order (N), a tuple or like one."""
    boxes: np.ndarray
    """(N, 4) float64 x, y, w, h in pixels, zero-based; NaN where a frame is not annotated."""
    visible: np.ndarray
    """(N,) bool: annotated, w and h > 0, and by the benchmark's labels neither absent nor covered."""
    offset: int = 0
    absent: np.ndarray | None = None
    """(N,) bool, LaSOT and GOT-10k: by the benchmark's labels alone, whatever the box."""
    cover: np.ndarray | None = None
    """(N,) int, GOT-10k: eighths of the target that are visible; frames with 0 are not scored."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels where a text file tells (GOT-10k, COCO)."""

    def __len__(self) -> int:
        return len(self.boxes)

    def middle(self) -> int:
        """Of the frames with a visible target, the one in the middle."""
        seen = np.flatnonzero(self.visible)
        return int(seen[len(seen) // 2])


def read_frame(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB pixels as stored (an EXIF rotation is not applied: boxes do not know of it).

    Raises `Unreadable`, an OSError that names the file, when it is missing, no image, or damaged.
    """
    # Pillow, not OpenCV: as fast, the same pixels, and OpenCV fills the missing half of a truncated JPEG with gray.
    try:
        return np.array(read_picture(path))
    except Unreadable as error:
        raise Unreadable(f"cannot read {printable(path)}: {error}") from None
