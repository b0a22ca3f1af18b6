"""What benchmarks' folders hold: tables of boxes, flags, lists, numbered frames, and VOT's regions.

Whatever is wrong with a file is a ValueError (an OSError where it cannot be read) that names it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np

from common.data.text import read_text
from common.data.tracking.sequence import MAX_SIDE_PX, Frames, Sequence
from common.run import UserError

SUFFIXES = (".jpg", ".png", ".jpeg")


def frames_in(folder: Path) -> list[Path]:
    """Pictures in a folder, those with a dot before their name aside, in the order of their numbers."""
    paths = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    return sorted(paths, key=natural)


def suffix_of(folder: Path, stem: str) -> str:
    """Of the picture that is called so in a folder, such as .JPG; .jpg where there is none."""
    known = (*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
    return next((suffix for suffix in known if (folder / f"{stem}{suffix}").is_file()), SUFFIXES[0])


def box_around(line: str) -> list[float]:
    """x, y, w, h of the upright box around one of VOT's regions: polygon, mask or box. As VOT's toolkit draws them, the
    pixels at a polygon's corners belong to it."""
    if line.startswith("m"):  # x, y, width, height of a part of the image, then run lengths in it, row by row, 0s first
        x, y, width, height, *runs = (int(v) for v in line[1:].split(","))
        beyond = max(abs(x), abs(y), width, height) > MAX_SIDE_PX
        if beyond or min(width, height, *runs) < 0 or sum(runs) > width * height:
            raise ValueError(f"a mask of {width} x {height} px at {x}, {y} with runs of {sum(runs)} px in all")
        pixels = [(end - run, end - 1) for end, run in zip(accumulate(runs), runs)]  # first and last of each run
        drawn = [ends for ends, run in list(zip(pixels, runs))[1::2] if run]
        if not drawn:
            return [np.nan] * 4
        top, bottom = drawn[0][0] // width, drawn[-1][1] // width
        left, right = min(first % width for first, _ in drawn), max(last % width for _, last in drawn)
        if any(first // width < last // width for first, last in drawn):  # goes on at the start of the next row
            left, right = 0, width - 1
        return [x + left, y + top, right - left + 1, bottom - top + 1]
    values = np.array(line.split(","), dtype=np.float64)
    if (np.abs(values) > MAX_SIDE_PX).any():
        raise ValueError(f"{line!r} has a number beyond {MAX_SIDE_PX} px")
    if len(values) == 4:
        return values.tolist()
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{line!r} is no box, polygon or mask")
    corners = values.reshape(-1, 2)
    return [*corners.min(0), *(np.ptp(corners, axis=0) + 1)]


def make_sequence(
    name: str, dataset: str, frames, boxes: np.ndarray, absent: np.ndarray | None = None, *, offset: int = 0, **more
) -> Sequence:
    """Checks frames against boxes as the file has them, and takes off the file's `offset`."""
    if len(frames) != len(boxes):
        raise ValueError(f"{name}: {len(frames)} frames, but {len(boxes)} boxes")
    seen = np.isfinite(boxes).all(1) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    if absent is not None:
        seen &= ~absent
    return Sequence(name, dataset, frames, boxes - (offset, offset, 0, 0), seen, offset, absent, **more)


def numbered_frames(
    folder: Path, pattern: str, first: int, boxes: np.ndarray, check: bool, first_only: bool = False
) -> tuple[Frames, np.ndarray]:
    """Frames numbered from `first`, as many as boxes; with `first_only` the missing boxes are filled in with NaN.
    `pattern` is their name without the suffix, which is the first one's."""
    count, pattern = len(boxes), pattern + suffix_of(folder, pattern.format(first))
    if check or first_only:
        suffix = pattern.rpartition(".")[2]
        count = sum(entry.name.endswith(f".{suffix}") and entry.name[0] != "." for entry in os.scandir(folder))
    frames = Frames(folder, pattern, range(first, first + count))
    if check and not (count and frames[-1].is_file()):
        raise ValueError(f"{folder} has {count} frames, but not {pattern.format(first + max(count, 1) - 1)}")
    if first_only and len(boxes) == 1 and count > 1:
        boxes = np.concatenate([boxes, np.full((count - 1, 4), np.nan)])
    return frames, boxes


def read_table(path: Path, columns: int) -> np.ndarray:
    """(rows, columns) float64, pixels, of a text file whose numbers stand between commas, tabs or blanks."""
    rows = [line.replace(",", " ").split() for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise ValueError(f"{path}, line {number} has {len(row)} numbers, not {columns}")
    return as_boxes(rows, path)


def as_boxes(rows: list[list[str]], path: Path) -> np.ndarray:
    """Lines of a file as float64 numbers; ValueError names one that is no number, or wider than any image."""
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if (beyond := np.flatnonzero((np.abs(values) > MAX_SIDE_PX).any(1))).size:
        raise ValueError(f"{path}, line {beyond[0] + 1} has a number beyond {MAX_SIDE_PX} px")
    return values


def read_flags(path: Path, count: int) -> np.ndarray:
    """(count,) int labels, one a line or all in one line."""
    try:
        flags = np.array(" ".join(read_lines(path)).replace(",", " ").split(), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(flags) != count:
        raise ValueError(f"{path} has {len(flags)} labels for {count} boxes")
    return flags


def read_lines(path: Path) -> list[str]:
    """Lines of a text file; raises ValueError if there are none."""
    text = read_text(path).strip()
    if not text:
        raise ValueError(f"{path} is empty")
    if "_" in text:  # Python reads 1_000 as a thousand
        raise ValueError(f"{path} has an underscore, expected numbers")
    return text.splitlines()


def read_names(path: Path) -> list[str]:
    """The sequences that a list names; `UserError` if it names one twice, which would count twice."""
    try:
        names = read_text(path).split()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} lists {twice[0]} more than once")
    return names


def natural(path: Path) -> list:
    """Sorts img/2.jpg before img/10.jpg, airplane-2 before airplane-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
