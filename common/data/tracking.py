"""Tracking sequences from the folders people have on disk: OTB, GOT-10k, LaSOT, TrackingNet, VOT, and COCO's objects.

``python -m common.data.tracking FOLDER`` prints what a folder holds.
"""

from __future__ import annotations

import collections.abc
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.data.coco import read_coco
from common.data.picture import Unreadable, read_picture
from common.data.text import printable, read_text
from common.run import UserError

EXPECTED = """expected one of
  GOT-10k      {root}/train/list.txt and {root}/train/GOT-10k_Train_000001/ with 00000001.jpg ..., groundtruth.txt,
               absence.label, cover.label; also val and test, or one of the three itself
  LaSOT        {root}/airplane/airplane-1/ with img/00000001.jpg ..., groundtruth.txt, full_occlusion.txt and
               out_of_view.txt
  TrackingNet  {root}/TRAIN_0 ... TRAIN_11, TEST, each with frames/NAME/0.jpg ... and anno/NAME.txt
  OTB          {root}/Basketball/ with img/0001.jpg ... and groundtruth_rect.txt
  VOT          {root}/list.txt and {root}/bag/ with groundtruth.txt and frames, 00000001.jpg ..., there or in color/"""
EXPECTED_COCO = "expected COCO 2017: {root}/annotations/instances_{split}2017.json and {root}/{split}2017/*.jpg"

# The part of a folder that belongs to the OTB sequence, by frame number. Tiger1 is whole; PyTracking leaves out its
# first five frames.
OTB_RANGES = {
    "David": (300, 770), "Football1": (1, 74), "Freeman3": (1, 460), "Freeman4": (1, 283), "Diving": (1, 215),
    "BlurCar1": (247, None), "BlurCar3": (3, None), "BlurCar4": (18, None),
}


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


def open_sequences(
    root: str | Path, split: str | None = None, *, limit: float = 0.0, damaged: list[str] | None = None
) -> list[Sequence]:
    """The sequences of a folder in one of the layouts of `EXPECTED`, in the benchmark's order.

    `split` is "train", "val" or "test" where the layout has splits (GOT-10k: all three; TrackingNet: train and test;
    LaSOT: train and test if the benchmark's testing_set.txt lies in the folder); None takes all there is, and suits
    OTB, VOT, any LaSOT folder and a folder with a single split.

    An annotation that is damaged or does not fit its frames is an error. For training a share `limit` of the sequences
    (at least one) may be so: what is wrong with each goes to `damaged`, they are left out, and the frames are not
    looked for until read.

    Raises `UserError`, with the expected trees when the folder is missing or holds none of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"cannot look into {root}: you have no permission to")
    dataset, splits = _layout(root)
    if split is None and None not in splits and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        there = "no splits" if splits.keys() == {None} else f"the splits {sorted(splits)}"
        hint = "; LaSOT's train and test need the benchmark's testing_set.txt in that folder"
        raise UserError(
            f"{root} ({dataset}) has {there}, and the split asked for is {split!r}{hint if dataset == 'lasot' else ''}"
        )
    jobs = splits[split]
    if not jobs:
        raise UserError(f"no sequences of split {split!r} in {root}: {EXPECTED.format(root=root)}")
    sequences, bad = [], []
    for job in tqdm(jobs, desc=f"opening {root}", disable=None if len(jobs) > 500 else True, leave=False):
        try:
            sequences.append(job(check=not limit))
        except (OSError, ValueError) as error:
            if not limit:
                raise UserError(f"cannot use {root}: {error}") from None
            bad.append(printable(str(error)))
    if len(bad) > max(1, int(limit * len(jobs))) or not sequences:
        raise UserError(f"{len(bad)} of {len(jobs)} sequences in {root} are unusable, the last: {bad[-1]}")
    if bad:
        tqdm.write(f"{root}: left out {len(bad)} of {len(jobs)} sequences, the first: {bad[0]}")
    if damaged is not None:
        damaged += bad
    return sequences


def split_in(root: str | Path, split: str) -> str | None:
    """`split` where the folder has it, else None, which is all there is; `UserError` where it holds no sequences."""
    return split if split in _layout(Path(root))[1] else None


def folders(root: str | Path) -> dict[str, Path]:
    """Subfolders by the name of their data set, case and punctuation aside: {"got10k": root/GOT-10k, ...}."""
    children = sorted(Path(root).iterdir()) if Path(root).is_dir() else []
    return {re.sub(r"\W|_", "", path.name.lower()): path for path in children if path.is_dir()}


def open_coco(root: str | Path, split: str, min_side_px: float = 50.0) -> list[Sequence]:
    """Each object of COCO's ``annotations/instances_{split}2017.json`` as a one-frame sequence, for still-image pairs.

    Crowds are left out, and objects that are not wider and higher than `min_side_px`. `split` is "train" or "val".
    """
    root = Path(root)
    file, folder = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
    if not file.is_file() or not folder.is_dir():
        raise UserError(f"no COCO {split} split in {root}: {EXPECTED_COCO.format(root=root, split=split)}")
    content = read_coco(file, ("id", "bbox"), sizes=True)
    seen, sequences = np.ones(1, dtype=bool), []
    for entry in content.annotations:
        if entry.get("iscrowd") or min(entry["bbox"][2:]) <= min_side_px:
            continue
        number, image = entry["image_id"], content.images[entry["image_id"]]
        if max(map(abs, entry["bbox"])) > MAX_SIDE_PX:
            raise UserError(f"{file}: annotation {entry['id']} has a box beyond {MAX_SIDE_PX} px: {entry['bbox']}")
        name = f"{number:012d}-{entry['id']}" if isinstance(number, int) else f"{number}-{entry['id']}"
        box, size = np.array([entry["bbox"]], dtype=np.float64), (image["width"], image["height"])
        sequences.append(Sequence(name, "coco", (folder / image["file_name"],), box, seen, size=size))
    return sequences


# Layouts --------------------------------------------------------------------------------------------------
# A job opens one sequence: job(check) -> Sequence; with `check` the frames are counted. Raises OSError or ValueError.

Jobs = list[Callable[..., Sequence]]


def _layout(root: Path) -> tuple[str, dict[str | None, Jobs]]:
    """(data set, its splits); the split None is all there is."""
    got10k = {name: root / name for name in ("train", "val", "test") if (root / name / "list.txt").is_file()}
    names = _names(root / "list.txt") if (root / "list.txt").is_file() else []
    if names and names[0].startswith("GOT-10k"):
        got10k = {root.name if root.name in ("train", "val", "test") else None: root}
    elif names:
        return "vot", {None: [partial(_vot, root / name) for name in names]}
    if got10k:
        return "got10k", {
            split: [partial(_got10k, folder / name) for name in _names(folder / "list.txt")]
            for split, folder in got10k.items()
        }
    if chunks := sorted((file.parent for file in root.glob("T*/anno")), key=_natural):
        splits = {name: [c for c in chunks if c.name.startswith(name.upper())] for name in ("train", "test")}
        return "trackingnet", {
            name: [partial(_trackingnet, chunk, file) for chunk in found for file in sorted(chunk.glob("anno/*.txt"))]
            for name, found in splits.items() if found
        }
    if videos := sorted({file.parent for file in root.glob("*/groundtruth_rect*.txt")}):
        return "otb", {None: [job for folder in videos for job in _otb_targets(folder)]}
    files = sorted(root.glob("*/*/groundtruth.txt"), key=_natural)
    if any((file.parent / "img").is_dir() for file in files):
        jobs = {file.parent.name: partial(_lasot, file.parent) for file in files}
        splits = {None: list(jobs.values())}
        if (root / "testing_set.txt").is_file():
            test = _names(root / "testing_set.txt")
            splits["train"] = [job for name, job in jobs.items() if name not in test]
            splits["test"] = [partial(_lasot, root / name.rpartition("-")[0] / name) for name in test]
        return "lasot", splits
    raise UserError(f"no tracking sequences in {root}: {EXPECTED.format(root=root)}")


def _got10k(folder: Path, check: bool) -> Sequence:
    boxes, cover, absent = _table(folder / "groundtruth.txt", 4), None, None
    first_only = "_Test_" in folder.name  # the rest of its boxes is on the server
    frames, boxes = _numbered(folder, "{:08d}.jpg", 1, boxes, check, first_only)
    if not first_only:
        cover, absent = (_flags(folder / f"{name}.label", len(boxes)) for name in ("cover", "absence"))
        absent = (absent > 0) | (cover == 0)
    size = None
    if (folder / "meta_info.ini").is_file():
        found = re.search(r"resolution:\s*\((\d+),\s*(\d+)\)", read_text(folder / "meta_info.ini"))
        size = (int(found[1]), int(found[2])) if found else None
    return _sequence(folder.name, "got10k", frames, boxes, absent, cover=cover, size=size)


def _lasot(folder: Path, check: bool) -> Sequence:
    boxes = _table(folder / "groundtruth.txt", 4)
    flags = [_flags(folder / f"{name}.txt", len(boxes)) for name in ("full_occlusion", "out_of_view")]
    # monkey-17 is known to have more frames than boxes; the toolkit cuts the prediction.
    frames, boxes = _numbered(folder / "img", "{:08d}.jpg", 1, boxes, check and folder.name != "monkey-17")
    return _sequence(folder.name, "lasot", frames, boxes, (flags[0] > 0) | (flags[1] > 0), offset=1)


def _trackingnet(chunk: Path, file: Path, check: bool) -> Sequence:
    boxes, folder = _table(file, 4), chunk / "frames" / file.stem
    frames, boxes = _numbered(folder, "{}.jpg", 0, boxes, check, first_only=chunk.name == "TEST")
    return _sequence(file.stem, "trackingnet", frames, boxes)


def _otb_targets(folder: Path) -> Jobs:
    """One, or two: Jogging-1, Jogging-2. Human4 has one, in its second file; the first is empty."""
    files = [file for file in sorted(folder.glob("groundtruth_rect*.txt")) if file.stat().st_size]
    return [
        partial(_otb, folder, file, folder.name if len(files) == 1 else f"{folder.name}-{i}")
        for i, file in enumerate(files, 1)
    ]


def _otb(folder: Path, file: Path, name: str, check: bool) -> Sequence:
    boxes, frames = _table(file, 4), _frames_in(folder / "img")
    return _sequence(name, "otb", otb_part(folder.name, frames), boxes, offset=1)


def otb_part(folder: str, frames: list[Path]) -> list[Path]:
    """Of the frames in an OTB folder of that name, those that belong to its sequence. ValueError names a file that is
    not called by a number."""
    first, last = OTB_RANGES.get(folder, (0, None))
    if wrong := [path for path in frames if not path.stem.isdecimal()]:
        raise ValueError(f"{wrong[0]} is not called by the number of its frame")
    return [path for path in frames if first <= int(path.stem) <= (last or int(path.stem))]


def _vot(folder: Path, check: bool) -> Sequence:
    lines = _lines(folder / "groundtruth.txt")
    where = folder / "color" if (folder / "color").is_dir() else folder
    frames = _frames_in(where)
    try:
        boxes = np.array([box_around(line) for line in lines])
    except ValueError as error:
        raise ValueError(f"{folder / 'groundtruth.txt'}: {error}") from None
    return _sequence(folder.name, "vot", frames, boxes)


def _frames_in(folder: Path) -> list[Path]:
    """Pictures in a folder, those with a dot before their name aside, in the order of their numbers."""
    paths = (path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png") and path.name[0] != ".")
    return sorted(paths, key=_natural)


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


# Text files -----------------------------------------------------------------------------------------------


def _sequence(
    name: str, dataset: str, frames, boxes: np.ndarray, absent: np.ndarray | None = None, *, offset: int = 0, **more
) -> Sequence:
    """Checks frames against boxes as the file has them, and takes off the file's `offset`."""
    if len(frames) != len(boxes):
        raise ValueError(f"{name}: {len(frames)} frames, but {len(boxes)} boxes")
    seen = np.isfinite(boxes).all(1) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    if absent is not None:
        seen &= ~absent
    return Sequence(name, dataset, frames, boxes - (offset, offset, 0, 0), seen, offset, absent, **more)


def _numbered(
    folder: Path, pattern: str, first: int, boxes: np.ndarray, check: bool, first_only: bool = False
) -> tuple[Frames, np.ndarray]:
    """Frames numbered from `first`, as many as boxes; with `first_only` the missing boxes are filled in with NaN."""
    count = len(boxes)
    if check or first_only:
        count = sum(entry.name.endswith(".jpg") and entry.name[0] != "." for entry in os.scandir(folder))
    frames = Frames(folder, pattern, range(first, first + count))
    if check and not (count and frames[-1].is_file()):
        raise ValueError(f"{folder} has {count} frames, but not {pattern.format(first + max(count, 1) - 1)}")
    if first_only and len(boxes) == 1 and count > 1:
        boxes = np.concatenate([boxes, np.full((count - 1, 4), np.nan)])
    return frames, boxes


def _table(path: Path, columns: int) -> np.ndarray:
    """(rows, columns) float64, pixels, of a text file whose numbers stand between commas, tabs or blanks."""
    rows = [line.replace(",", " ").split() for line in _lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise ValueError(f"{path}, line {number} has {len(row)} numbers, not {columns}")
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if (beyond := np.flatnonzero((np.abs(values) > MAX_SIDE_PX).any(1))).size:
        raise ValueError(f"{path}, line {beyond[0] + 1} has a number beyond {MAX_SIDE_PX} px")
    return values


def _flags(path: Path, count: int) -> np.ndarray:
    """(count,) int labels, one a line or all in one line."""
    try:
        flags = np.array(" ".join(_lines(path)).replace(",", " ").split(), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(flags) != count:
        raise ValueError(f"{path} has {len(flags)} labels for {count} boxes")
    return flags


def _lines(path: Path) -> list[str]:
    """Lines of a text file; raises ValueError if there are none."""
    text = read_text(path).strip()
    if not text:
        raise ValueError(f"{path} is empty")
    if "_" in text:  # Python reads 1_000 as a thousand
        raise ValueError(f"{path} has an underscore, expected numbers")
    return text.splitlines()


def _names(path: Path) -> list[str]:
    """The sequences that a list names; `UserError` if it names one twice, which would count twice."""
    try:
        names = read_text(path).split()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} lists {twice[0]} more than once")
    return names


def _natural(path: Path) -> list:
    """Sorts img/2.jpg before img/10.jpg, airplane-2 before airplane-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def main(folder: Path, /) -> None:
    """Prints what a data folder holds, or each of several that lie side by side in it; says what is expected where it
    holds nothing usable."""
    if _is_data_set(folder):
        _look(folder)
    elif beside := [path for path in folders(folder).values() if _is_data_set(path)]:
        for path in beside:
            print(f"{printable(path)}:")
            _look(path)
    else:
        try:
            open_sequences(folder)
        except UserError as error:
            raise UserError(f"{error}\n  several    {folder}/OTB, {folder}/VOT and the like, each as above") from None


def _is_data_set(folder: Path) -> bool:
    try:
        return (folder / "annotations").is_dir() or bool(_layout(folder))
    except UserError:
        return False


def _look(folder: Path) -> None:
    if (folder / "annotations").is_dir():
        splits = [s for s in ("train", "val") if (folder / "annotations" / f"instances_{s}2017.json").is_file()]
        found = {split: open_coco(folder, split) for split in splits or ["train"]}
    else:
        found = {split: open_sequences(folder, split) for split in _layout(folder)[1]}
    for split, sequences in found.items():
        frames, shown = sum(len(s) for s in sequences), sum(int(s.visible.sum()) for s in sequences)
        print(
            f"{split or 'all'}: {len(sequences):,} sequences ({sequences[0].dataset}), {frames:,} frames, the target "
            f"is annotated and visible in {shown:,}; the first is {printable(sequences[0].name)}"
        )


if __name__ == "__main__":
    import tyro

    from common import run

    run.main(lambda: tyro.cli(main))
