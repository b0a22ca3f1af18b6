"""Images with captions, and image regions with phrases: COCO's annotation files, and webdataset shards.

A COCO folder holds ``annotations/captions_NAME.json`` and ``annotations/instances_NAME.json`` beside the image folder
``NAME/``, where NAME begins with the split: train2017, val. A file ``annotations/caption_split.csv`` (columns folder,
file, split) overrides that, for sets whose division cuts across the folders.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data.images import SUFFIXES, webdataset_key
from common.data.picture import read_picture
from common.run import UserError
from common.run.files import cache_dir

EXPECTED = """expected
  {root}/annotations/captions_train2017.json  and  {root}/annotations/captions_val2017.json   (names without 2017 too)
  {root}/train2017/*.jpg                      and  {root}/val2017/*.jpg"""
SAME = {"val": ("val", "test"), "test": ("test", "val"), "train": ("train",)}


class NoSplit(UserError):
    """The folder is right, but has nothing of this split."""


@dataclass(frozen=True)
class Captioned:
    """An image and all its captions."""

    image: Path
    captions: tuple[str, ...]
    image_id: int


@dataclass(frozen=True)
class Region:
    """A box in an image and what is in it."""

    image: Path
    box_xywh_px: tuple[float, float, float, float]
    """Left, top, width and height in pixels of the image file."""
    phrase: str
    image_id: int
    size_px: tuple[int, int]
    """Width and height of the image."""


class Captions(Dataset):
    """Samples (PIL RGB image, captions) of `rows`."""

    def __init__(self, rows: list[Captioned]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        return read_picture(self.rows[index].image), self.rows[index].captions

    def captions(self, index: int) -> tuple[str, ...]:
        return self.rows[index].captions

    def name(self, index: int) -> str:
        return str(self.rows[index].image)


class CaptionShards(Dataset):
    """Samples (PIL RGB image, captions) of webdataset shards: ``KEY.jpg`` beside ``KEY.txt``, a caption in each line.

    Read at random through an index, built once per set of shards and kept in the cache as a memory-mapped array.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = [str(shard.resolve()) for shard in shards]
        stamp = [(s, Path(s).stat().st_size, Path(s).stat().st_mtime_ns) for s in self.shards]
        name = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16]
        self.index = cache_dir("webdataset") / f"captions-{name}.npy"
        if not self.index.exists():
            part = self.index.with_suffix(f".{os.getpid()}.part.npy")  # every process may be at it
            np.save(part, self._scan())
            part.replace(self.index)
        self.rows = np.load(self.index, mmap_mode="r")

    def _scan(self) -> np.ndarray:
        """(samples, 5): shard, offset and length of the image, offset and length of the text."""
        rows = []
        for number, shard in enumerate(tqdm(self.shards, desc="indexing shards", disable=len(self.shards) < 4)):
            images, texts = {}, {}
            try:
                with tarfile.open(shard) as tar:
                    for member in tar:
                        key, suffix = webdataset_key(member.name)
                        kind = texts if suffix == "txt" else images if f".{suffix.lower()}" in SUFFIXES else {}
                        kind[key] = (member.offset_data, member.size)
            except tarfile.TarError as error:
                raise UserError(f"{shard} is no readable webdataset shard: {error}") from None
            unpaired = sorted(images.keys() ^ texts.keys())
            if unpaired:
                raise UserError(f"{shard}: {len(unpaired)} samples lack image or .txt, such as {unpaired[0]}")
            rows += [(number, *images[key], *texts[key]) for key in images]
        if not rows:
            raise UserError(f"no captioned images in {self.shards[0]} and its {len(self.shards) - 1} neighbours")
        return np.array(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        image = read_picture(io.BytesIO(self._read(self.rows[index, :3])))
        return image, self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        text = self._read(self.rows[index, [0, 3, 4]]).decode()
        texts = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not texts:
            raise ValueError(f"{self.name(index)} has an empty caption")
        return texts

    def _read(self, place: np.ndarray) -> bytes:
        shard, offset, size = place.tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        return f"{self.shards[self.rows[index][0]]}@{self.rows[index][1]}"


def read_captions(root: str | Path, split: str) -> list[Captioned]:
    """The captioned images of a split ("train", "val"; "test" is another name of "val"), by image file.

    Raises `UserError` for a missing folder or no annotation file, `NoSplit` for a split without captions.
    """
    rows = []
    for folder, content in _annotations(Path(root), "captions", split):
        texts = defaultdict(list)
        for annotation in content["annotations"]:
            texts[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        rows += [
            Captioned(folder / image["file_name"], tuple(texts[image["id"]]), image["id"])
            for image in content["images"] if image["id"] in texts
        ]
    return _nonempty(sorted(rows, key=lambda row: row.image), root, split, "captions")


def read_regions(root: str | Path, split: str) -> list[Region]:
    """The boxes of a split, each with its annotation's ``phrase``, or the name of its category where it has none."""
    rows = []
    for folder, content in _annotations(Path(root), "instances", split):
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        rows += [
            Region(
                folder / images[a["image_id"]]["file_name"], tuple(a["bbox"]), a.get("phrase", names[a["category_id"]]),
                a["image_id"], (images[a["image_id"]]["width"], images[a["image_id"]]["height"]),
            )
            for a in content["annotations"] if a["image_id"] in images and not a.get("iscrowd")
        ]
    return _nonempty(sorted(rows, key=lambda row: row.image), root, split, "boxes")


def _annotations(root: Path, kind: str, split: str) -> list[tuple[Path, dict[str, Any]]]:
    """(image folder, content of the annotation file, its images confined to the split) of every file that counts."""
    if split not in SAME:
        raise UserError(f"no split {split!r}; there are {', '.join(SAME)}")
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
    home, table = root / "annotations", root / "annotations" / "caption_split.csv"
    names = sorted(path.stem.removeprefix(f"{kind}_") for path in home.glob(f"{kind}_*.json"))
    if not table.exists():  # of the split's two names the first that is there
        named = ([name for name in names if name.startswith(word)] for word in SAME[split])
        names = next((some for some in named if some), [])
    found = [(root / name, _read(home / f"{kind}_{name}.json")) for name in names]
    if table.exists():
        with open(table, newline="") as file:
            chosen = {(row["folder"], row["file"]) for row in csv.DictReader(file) if row["split"] in SAME[split]}
        found = [
            (folder, content | {"images": [x for x in content["images"] if (folder.name, x["file_name"]) in chosen]})
            for folder, content in found
        ]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        content["images"], content["annotations"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no COCO annotation file: {type(error).__name__} {error}") from None
    return content


def _nonempty(rows: list, root: str | Path, split: str, what: str) -> list:
    if not rows:
        raise NoSplit(f"{root} has no {what} for {split!r}: {EXPECTED.format(root=root)}")
    return rows
