"""Folders opened: all sequences of a benchmark, or COCO's objects."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.data.coco import read_coco
from common.data.text import printable
from common.data.tracking.layouts import EXPECTED, layout_of
from common.data.tracking.sequence import MAX_SIDE_PX, Sequence
from common.run import UserError

EXPECTED_COCO = "expected COCO 2017: {root}/annotations/instances_{split}2017.json and {root}/{split}2017/*.jpg"


def open_sequences(
    root: str | Path, split: str | None = None, *, limit: float = 0.0, damaged: list[str] | None = None
) -> list[Sequence]:
    """The sequences of a folder in one of the layouts of `EXPECTED`, in the benchmark's order.

    `split` is "train", "val" or "test" where the layout has splits (GOT-10k: all three; TrackingNet: train and test;
    LaSOT: train and test if the benchmark's testing_set.txt lies in the folder), "otb50" or "otb2013" for those parts
    of OTB, "uav20l" for UAV123's long sequences, "30" or "240" for NFS as it was released. None takes all there is, and
    suits OTB, UAV123, VOT, any LaSOT folder and a folder with a single split.

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
    dataset, splits = layout_of(root)
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
    return split if split in layout_of(Path(root))[1] else None


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
