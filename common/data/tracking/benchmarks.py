"""Benchmarks beyond the first five: UAV123 and UAV20L, NFS, TNL2K, AVisT, and ImageNet VID for training; and which
sequences make a benchmark whole (benchmarks.json: names and ranges of frames, as its toolkits list them)."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data.index import Index, kept, stamp
from common.data.text import read_text
from common.data.tracking.files import (
    as_boxes,
    frames_in,
    make_sequence,
    natural,
    numbered_frames,
    read_flags,
    read_table,
    suffix_of,
)
from common.data.tracking.sequence import MAX_SIDE_PX, Frames, Sequence
from common.run import UserError

EXPECTED = """  UAV123       {root}/data_seq/UAV123/bike1/000001.jpg ... and {root}/anno/UAV123/bike1.txt, or UAV20L
  NFS          {root}/airboard_1/30/airboard_1/*.jpg and {root}/airboard_1/30/airboard_1.txt, 240 likewise; or,
               prepared for 30 frames/s, {root}/sequences/airboard_1/00001.jpg ... and {root}/anno/nfs_airboard_1.txt
  TNL2K        {root}/NAME/imgs/ with the frames, {root}/NAME/groundtruth.txt
  AVisT        {root}/sequences/NAME/img_00001.jpg ..., {root}/anno/NAME.txt,
               {root}/full_occlusion/NAME_full_occlusion.txt and {root}/out_of_view/NAME_out_of_view.txt
  ImageNet VID {root}/Data/VID/train/*/SNIPPET/000000.JPEG ... and as many .xml in {root}/Annotations/VID/..."""

LISTS: dict[str, Any] = json.loads(Path(__file__).with_name("benchmarks.json").read_text(encoding="utf-8"))
"""By data set the names of all its test sequences; for UAV123 and UAV20L with [folder, first, last frame]."""
COUNTS = {"nfs240": 100, "tnl2k": 700}  # whose names are not listed here; NFS has the same at both rates

Jobs = list[Callable[..., Sequence]]
Splits = dict[str | None, Jobs]


def is_whole(dataset: str, names: Iterable[str]) -> bool:
    """Whether these are the test sequences of a benchmark that needs no server, all of them and no others."""
    names = list(names)
    if dataset in COUNTS:
        return len(names) == COUNTS[dataset]
    return dataset in LISTS and sorted(names) == sorted(LISTS[dataset])


def layout_of(root: Path) -> tuple[str, Splits] | None:
    """(data set, its splits), as `layouts.layout_of`; None for none of these benchmarks."""
    uav = {name: root / "anno" / folder for name, folder in (("uav123", "UAV123"), ("uav20l", "UAV20L"))}
    if uav := {name: folder for name, folder in uav.items() if folder.is_dir()}:
        jobs = {name: [partial(_uav, root, name, f) for f in _texts(folder)] for name, folder in uav.items()}
        first = next(iter(jobs))
        return first, {None: jobs.pop(first)} | jobs
    if (root / "sequences").is_dir() and (root / "anno").is_dir():
        if (root / "full_occlusion").is_dir():
            return "avist", {None: [partial(_avist, root, file.stem) for file in _texts(root / "anno")]}
        return "nfs", {"30": [partial(_nfs_prepared, root, file) for file in _texts(root / "anno")]}
    rates = {rate: sorted(root.glob(f"*/{rate}/*.txt"), key=natural) for rate in ("30", "240")}
    if any(rates.values()):
        return "nfs", {rate: [partial(_nfs, file, rate) for file in files] for rate, files in rates.items() if files}
    folders = sorted((file.parent for file in root.glob("*/groundtruth.txt")), key=natural)
    if any((folder / "imgs").is_dir() for folder in folders):
        return "tnl2k", {None: [partial(_tnl2k, folder) for folder in folders]}
    if (root / "Annotations" / "VID").is_dir():
        splits = [name for name in ("train", "val") if (root / "Annotations" / "VID" / name).is_dir()]
        return "vid", {name: _vid_jobs(root, name) for name in splits}
    return None


def _texts(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.txt"), key=natural) if file.name[0] != "."]


def _uav(root: Path, dataset: str, file: Path, check: bool) -> Sequence:
    """A range of a folder's frames; NaN where the target is absent. Counted from one, as OTB's."""
    boxes, where = read_table(file, 4), root / "data_seq" / "UAV123"
    folder, first, last = LISTS[dataset].get(file.stem, (file.stem, 1, len(boxes)))
    suffix = suffix_of(where / folder, f"{first:06d}")
    frames = Frames(where / folder, "{:06d}" + suffix, range(first, last + 1))
    if check and not (frames[0].is_file() and frames[-1].is_file()):
        raise ValueError(f"{file.stem} is frames {first} to {last} of {where / folder}, which are not all there")
    return make_sequence(file.stem, dataset, frames, boxes, offset=1)


def _nfs(file: Path, rate: str, check: bool) -> Sequence:
    """As released: number, left, top, right, bottom and more in a line, one for every frame at 240 a second."""
    rows = [line.split()[1:5] for line in read_text(file).splitlines() if line.strip()]
    if not rows or any(len(row) != 4 for row in rows):
        raise ValueError(f"{file}: expected lines of a number, then left, top, right and bottom")
    corners, frames = as_boxes(rows, file)[:: 8 if rate == "30" else 1], frames_in(file.with_suffix(""))
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    if abs(len(frames) - len(boxes)) == 1:  # the last line, or the last frame, has no partner at the lower rate
        frames, boxes = frames[: len(boxes)], boxes[: len(frames)]
    return make_sequence(file.stem, "nfs" if rate == "30" else "nfs240", frames, boxes)


def _nfs_prepared(root: Path, file: Path, check: bool) -> Sequence:
    name = file.stem.removeprefix("nfs_")
    frames, boxes = numbered_frames(root / "sequences" / name, "{:05d}", 1, read_table(file, 4), check)
    return make_sequence(name, "nfs", frames, boxes)


def _tnl2k(folder: Path, check: bool) -> Sequence:
    return make_sequence(folder.name, "tnl2k", frames_in(folder / "imgs"), read_table(folder / "groundtruth.txt", 4))


def _avist(root: Path, name: str, check: bool) -> Sequence:
    boxes = read_table(root / "anno" / f"{name}.txt", 4)
    frames, boxes = numbered_frames(root / "sequences" / name, "img_{:05d}", 1, boxes, check)
    hidden, outside = (
        read_flags(root / kind / f"{name}_{kind}.txt", len(boxes)) for kind in ("full_occlusion", "out_of_view")
    )
    return make_sequence(name, "avist", frames, boxes, (hidden > 0) | (outside > 0))


# ImageNet VID ---------------------------------------------------------------------------------------------
# A file of annotations for each of a million frames: read once, then kept in the cache's index.


def _vid_jobs(root: Path, split: str) -> Jobs:
    """A job for each object of each snippet."""
    annotations = root / "Annotations" / "VID" / split
    index = kept(f"vid {os.path.abspath(annotations)}", lambda: _vid_index(annotations))
    return [partial(_vid, root / "Data" / "VID" / split, index, number) for number in range(len(index.about["tracks"]))]


def _vid(data: Path, index: Index, number: int, check: bool) -> Sequence:
    snippet, track, start, end = index.about["tracks"][number]
    folder = data / snippet
    frames = Frames(folder, "{:06d}" + suffix_of(folder, "000000"), range(end - start))
    if check and not frames[-1].is_file():
        raise ValueError(f"{snippet} has annotations of {end - start} frames, but not {frames[-1]}")
    hidden = index["occluded"][start:end] > 0
    return make_sequence(f"{Path(snippet).name}-{track}", "vid", frames, np.array(index["boxes"][start:end]), hidden)


def _vid_index(annotations: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Boxes x, y, w, h and flags of occlusion, frame by frame of one object after another; about["tracks"] says whose:
    [snippet, number of the object, first row, last row + 1]."""
    tracks, boxes, occluded, stamps = [], [], [], {}
    folders = sorted({file.parent for file in annotations.rglob("000000.xml")})
    for folder in tqdm(folders, f"reading {annotations}", disable=None if len(folders) > 100 else True, leave=False):
        stamps[str(folder)] = stamp(os.stat(folder))
        files = sorted(folder.glob("*.xml"))
        its: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, file in enumerate(files):
            for track, box, hidden in _vid_objects(file):
                empty = np.full((len(files), 4), np.nan), np.ones(len(files), np.int64)
                rows, flags = its.setdefault(track, empty)
                rows[number], flags[number] = box, hidden
        for track, (rows, flags) in its.items():
            at = sum(map(len, boxes))
            tracks.append([folder.relative_to(annotations).as_posix(), track, at, at + len(rows)])
            boxes.append(rows)
            occluded.append(flags)
    if not tracks:
        raise UserError(f"{annotations} holds no objects: expected SNIPPET/000000.xml ... in its folders")
    return {"stamp": stamps, "tracks": tracks}, {"boxes": np.concatenate(boxes), "occluded": np.concatenate(occluded)}


def _vid_objects(file: Path) -> Iterable[tuple[str, list[float], int]]:
    """(number of the object, x, y, w, h, whether it is occluded) of each object in a frame; `UserError` names a file
    that is damaged."""
    try:
        for entry in ElementTree.fromstring(read_text(file)).iter("object"):
            left, top, right, bottom = (float(entry.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            if not max(map(abs, (left, top, right, bottom))) <= MAX_SIDE_PX:
                raise ValueError(f"a box beyond {MAX_SIDE_PX} px")
            track = entry.findtext("trackid") or "0"
            yield track, [left, top, right - left, bottom - top], int(entry.findtext("occluded") or 0)
    except (OSError, ValueError, TypeError, ElementTree.ParseError) as error:
        raise UserError(f"cannot use {file}: {error}") from None
