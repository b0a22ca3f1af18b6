"""Whose layout a folder has, and how its sequences are opened: OTB, VOT, GOT-10k, LaSOT and its extension, TrackingNet.

A job opens one sequence: job(check) -> Sequence; with `check` the frames are counted. Raises OSError or ValueError.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from common.data.text import read_text
from common.data.tracking import benchmarks
from common.data.tracking.benchmarks import LISTS, Jobs, Splits
from common.data.tracking.files import (
    box_around,
    frames_in,
    make_sequence,
    natural,
    numbered_frames,
    read_flags,
    read_lines,
    read_names,
    read_table,
)
from common.data.tracking.sequence import Sequence
from common.run import UserError

# The part of a folder that belongs to the OTB sequence, by frame number. Tiger1 is whole; PyTracking leaves out its
# first five frames.
OTB_RANGES = {
    "David": (300, 770), "Football1": (1, 74), "Freeman3": (1, 460), "Freeman4": (1, 283), "Diving": (1, 215),
    "BlurCar1": (247, None), "BlurCar3": (3, None), "BlurCar4": (18, None),
}


EXPECTED = """expected one of
  GOT-10k      {root}/train/list.txt and {root}/train/GOT-10k_Train_000001/ with 00000001.jpg ..., groundtruth.txt,
               absence.label, cover.label; also val and test, or one of the three itself
  LaSOT        {root}/airplane/airplane-1/ with img/00000001.jpg ..., groundtruth.txt, full_occlusion.txt and
               out_of_view.txt; LaSOT_ext likewise, {root}/atv/atv-1/
  TrackingNet  {root}/TRAIN_0 ... TRAIN_11, TEST, each with frames/NAME/0.jpg ... and anno/NAME.txt
  OTB          {root}/Basketball/ with img/0001.jpg ... and groundtruth_rect.txt
  VOT          {root}/list.txt and {root}/bag/ with groundtruth.txt and frames, 00000001.jpg ..., there or in color/
""" + benchmarks.EXPECTED


def layout_of(root: Path) -> tuple[str, Splits]:
    """(data set, its splits); the split None is all there is."""
    got10k = {name: root / name for name in ("train", "val", "test") if (root / name / "list.txt").is_file()}
    names = read_names(root / "list.txt") if (root / "list.txt").is_file() else []
    if names and names[0].startswith("GOT-10k"):
        got10k = {root.name if root.name in ("train", "val", "test") else None: root}
    elif names:
        return "vot", {None: [partial(_vot, root / name) for name in names]}
    if got10k:
        return "got10k", {
            split: [partial(_got10k, folder / name) for name in read_names(folder / "list.txt")]
            for split, folder in got10k.items()
        }
    if chunks := sorted((file.parent for file in root.glob("T*/anno")), key=natural):
        splits = {name: [c for c in chunks if c.name.startswith(name.upper())] for name in ("train", "test")}
        return "trackingnet", {
            name: [partial(_trackingnet, chunk, file) for chunk in found for file in sorted(chunk.glob("anno/*.txt"))]
            for name, found in splits.items() if found
        }
    if videos := sorted({file.parent for file in root.glob("*/groundtruth_rect*.txt")}):
        return "otb", _otb_splits(videos)
    files = sorted(root.glob("*/*/groundtruth.txt"), key=natural)
    if any((file.parent / "img").is_dir() for file in files):
        extension = all(file.parent.name in LISTS["lasot_ext"] for file in files)
        dataset = "lasot_ext" if extension else "lasot"
        jobs = {file.parent.name: partial(_lasot, file.parent, dataset) for file in files}
        splits = {None: list(jobs.values())}
        if (root / "testing_set.txt").is_file():
            test = read_names(root / "testing_set.txt")
            splits["train"] = [job for name, job in jobs.items() if name not in test]
            splits["test"] = [partial(_lasot, root / name.rpartition("-")[0] / name, dataset) for name in test]
        return dataset, splits
    if found := benchmarks.layout_of(root):
        return found
    raise UserError(f"no tracking sequences in {root}: {EXPECTED.format(root=root)}")


def _got10k(folder: Path, check: bool) -> Sequence:
    boxes, cover, absent = read_table(folder / "groundtruth.txt", 4), None, None
    first_only = "_Test_" in folder.name  # the rest of its boxes is on the server
    frames, boxes = numbered_frames(folder, "{:08d}", 1, boxes, check, first_only)
    if not first_only:
        cover, absent = (read_flags(folder / f"{name}.label", len(boxes)) for name in ("cover", "absence"))
        absent = (absent > 0) | (cover == 0)
    size = None
    if (folder / "meta_info.ini").is_file():
        found = re.search(r"resolution:\s*\((\d+),\s*(\d+)\)", read_text(folder / "meta_info.ini"))
        size = (int(found[1]), int(found[2])) if found else None
    return make_sequence(folder.name, "got10k", frames, boxes, absent, cover=cover, size=size)


def _lasot(folder: Path, dataset: str, check: bool) -> Sequence:
    boxes = read_table(folder / "groundtruth.txt", 4)
    flags = [read_flags(folder / f"{name}.txt", len(boxes)) for name in ("full_occlusion", "out_of_view")]
    # monkey-17 is known to have more frames than boxes; the toolkit cuts the prediction.
    frames, boxes = numbered_frames(folder / "img", "{:08d}", 1, boxes, check and folder.name != "monkey-17")
    return make_sequence(folder.name, dataset, frames, boxes, (flags[0] > 0) | (flags[1] > 0), offset=1)


def _trackingnet(chunk: Path, file: Path, check: bool) -> Sequence:
    boxes, folder = read_table(file, 4), chunk / "frames" / file.stem
    frames, boxes = numbered_frames(folder, "{}", 0, boxes, check, first_only=chunk.name == "TEST")
    return make_sequence(file.stem, "trackingnet", frames, boxes)


def _otb_splits(folders: list[Path]) -> Splits:
    """All there is, and of OTB-50 and OTB-2013 what is there."""
    splits: Splits = {None: [job for folder in folders for job in _otb_targets(folder, "otb")]}
    for part in ("otb50", "otb2013"):
        known = {name.partition("-")[0] for name in LISTS[part]}
        its = [folder for folder in folders if folder.name in known]
        if jobs := [job for folder in its for job in _otb_targets(folder, part)]:
            splits[part] = jobs
    return splits


def _otb_targets(folder: Path, dataset: str) -> Jobs:
    """One, or two: Jogging-1, Jogging-2. Human4 has one, in its second file; the first is empty."""
    files = [file for file in sorted(folder.glob("groundtruth_rect*.txt")) if file.stat().st_size]
    return [
        partial(_otb, folder, file, folder.name if len(files) == 1 else f"{folder.name}-{i}", dataset)
        for i, file in enumerate(files, 1)
    ]


def _otb(folder: Path, file: Path, name: str, dataset: str, check: bool) -> Sequence:
    where = next((folder / part for part in ("img", "jpg") if (folder / part).is_dir()), folder / "img")
    return make_sequence(name, dataset, otb_part(folder.name, frames_in(where)), read_table(file, 4), offset=1)


def otb_part(folder: str, frames: list[Path]) -> list[Path]:
    """Of the frames in an OTB folder of that name, those that belong to its sequence. ValueError names a file that is
    not called by a number."""
    first, last = OTB_RANGES.get(folder, (0, None))
    if wrong := [path for path in frames if not path.stem.isdecimal()]:
        raise ValueError(f"{wrong[0]} is not called by the number of its frame")
    return [path for path in frames if first <= int(path.stem) <= (last or int(path.stem))]


def _vot(folder: Path, check: bool) -> Sequence:
    lines = read_lines(folder / "groundtruth.txt")
    where = folder / "color" if (folder / "color").is_dir() else folder
    frames = frames_in(where)
    try:
        boxes = np.array([box_around(line) for line in lines])
    except ValueError as error:
        raise ValueError(f"{folder / 'groundtruth.txt'}: {error}") from None
    return make_sequence(folder.name, "vot", frames, boxes)
