"""A folder of numbered pictures, or a zip of one, as a video."""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.data.index import SUFFIXES as PICTURE_SUFFIXES
from common.data.picture import Unreadable, read_picture

MOST_BYTES = 2**32  # of the frames that are read at once
MOST_MEMBER_BYTES = 2**26  # of a picture in a zip, unpacked
FLOW = re.compile(r".*flow.*|[xyuv][-_]?#")  # optical flow beside the pictures, as mmaction and TSN write it
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found", "system volume information", "$recycle.bin"}


def hidden(name: str) -> bool:
    """Whether a name is the operating system's or a program's own (.ipynb_checkpoints, ._00001.jpg), not data."""
    return name.startswith(".") or name.lower() in SYSTEM


class FrameFolder:
    """A folder of numbered pictures, or a zip of one, as a video, in the order of the numbers in their names.

    ``len`` is its number of frames. Optical flow and hidden files beside the frames are left out, and a frame that is
    there in two formats counts once. `Unreadable` if frames are missing between others, or there are two series.
    """

    rate, codec, rotation = 0.0, "pictures", 0  # as of a `VideoFile`

    def __init__(self, path: str | Path):
        self.path, self.zip = Path(path), None
        try:
            if self.path.is_dir():
                names = [entry.name for entry in os.scandir(self.path) if entry.is_file()]  # a pipe would be waited for
            else:
                self.zip = zipfile.ZipFile(self.path)
                names = [info.filename for info in self.zip.infolist() if not info.is_dir()]
            self.names = in_order(names)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            self.close()
            raise Unreadable(f"{path} cannot be read: {error}") from None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """As `VideoFile.read`. Pillow, unlike OpenCV, raises on a file that is cut off."""
        frames = []
        for i in indices:
            frames.append(self._frame(self.names[i]))
            check_bytes(self.path, len(indices), frames[0].shape[1::-1])
        return stack(self.path, frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._frame, self.names)

    def _frame(self, name: str) -> np.ndarray:
        if not self.zip:
            return np.asarray(read_picture(self.path / name))
        try:
            if self.zip.getinfo(name).file_size > MOST_MEMBER_BYTES:
                raise ValueError(f"it unpacks to more than {MOST_MEMBER_BYTES} bytes")
            return np.asarray(read_picture(io.BytesIO(self.zip.read(name))))
        # A method of compression that is not there, a password, and what damage leads to.
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise Unreadable(f"{self.path}: {name}: {error}") from None

    def close(self) -> None:
        if self.zip:
            self.zip.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def in_order(names: Sequence[str]) -> list[str]:
    """The frames among the names of files, in order. `ValueError` if they are no whole series."""
    series: dict[str, list[str]] = {}
    for name in names:
        if Path(name).suffix.lower() in PICTURE_SUFFIXES and not any(hidden(part) for part in Path(name).parts):
            series.setdefault(re.sub(r"\d+", "#", Path(name).stem.lower()), []).append(name)
    if not series:
        raise ValueError("it holds no frames")
    series = {kind: names for kind, names in series.items() if not FLOW.fullmatch(kind)} or series
    numbered = {kind: names for kind, names in series.items() if "#" in kind}  # the rest are posters and the like
    if not numbered:
        return sorted(name for names in series.values() for name in names)
    if len(numbered) > 1:
        raise ValueError(f"it holds several series of frames: {', '.join(sorted(numbered))}")
    frames: dict[tuple[int, ...], str] = {}
    for name in sorted(*numbered.values(), key=lambda name: (Path(name).suffix.lower() in (".jpg", ".jpeg"), name)):
        numbers = tuple(int(digits) for digits in re.findall(r"\d+", Path(name).stem))
        other = frames.setdefault(numbers, name)  # of two formats the one without loss
        if other != name and Path(other).suffix.lower() == Path(name).suffix.lower():
            raise ValueError(f"{other} and {name} are the same frame")
    order = sorted(frames)
    columns = [column for column in zip(*order) if len(set(column)) > 1]
    if len(columns) == 1:  # dates and times are not counted through
        steps = np.diff(np.array(columns[0], dtype=object))
        missing = int(sum(steps) // min(steps)) - len(steps)
        if missing or max(steps) != min(steps):
            after = frames[order[int(np.argmax(steps != min(steps)))]]
            raise ValueError(f"{missing} of {missing + len(order)} frames are missing, the first after {after}")
    return [frames[numbers] for numbers in order]


def check_bytes(path: str | Path, frames: int, size: tuple[int, int]) -> None:
    """`Unreadable` if so many frames of this width and height would fill the memory."""
    if frames * size[0] * size[1] * 3 > MOST_BYTES:
        raise Unreadable(f"{path}: {frames} frames of {size[0]} x {size[1]} are more than {MOST_BYTES >> 30} GiB")


def stack(path: str | Path, frames: Sequence[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames})
        raise Unreadable(f"{path} holds frames of several sizes: {', '.join(sizes)}")
    return np.stack(frames)
