"""Images with captions, and image regions with phrases: COCO's annotation files, and webdataset shards.

A COCO folder holds ``annotations/captions_NAME.json`` and ``annotations/instances_NAME.json`` beside the image folder
``NAME/``, where NAME begins with the split: train2017, val. A file ``annotations/caption_split.csv`` (columns folder,
file, split) overrides that, for sets whose division cuts across the folders.
"""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from common.data.coco import Coco, read_coco
from common.data.index import index_shards, read_part
from common.data.picture import Unreadable, read_picture
from common.data.text import inside, printable, read_text
from common.run import UserError

EXPECTED = """expected
  {root}/annotations/captions_train2017.json  and  {root}/annotations/captions_val2017.json   (names without 2017 too)
  {root}/train2017/*.jpg                      and  {root}/val2017/*.jpg"""
SPLIT_ALIASES = {"val": ("val", "test"), "test": ("test", "val"), "train": ("train",)}


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
        return read_picture(self.rows[index].image), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """All of them; `Unreadable` if there is none."""
        return _some(self.rows[index].captions, self.name(index))

    def name(self, index: int) -> str:
        return printable(self.rows[index].image)


class CaptionShards(Dataset):
    """Samples (PIL RGB image, captions) of webdataset shards: ``KEY.jpg`` beside ``KEY.txt``, a caption in each line.

    Read at random through an index that all processes share.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = [str(shard.resolve()) for shard in shards]
        self.index = index_shards(self.shards, "txt")

    def __len__(self) -> int:
        return len(self.index["rows"])

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        shard, offset, size, *_ = self.index["rows"][index].tolist()
        return read_picture(io.BytesIO(read_part(self.shards[shard], offset, size))), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """All of them; `Unreadable` if there is none."""
        shard, *_, offset, size = self.index["rows"][index].tolist()
        try:
            lines = read_part(self.shards[shard], offset, size).decode().splitlines()
        except ValueError:
            raise Unreadable(f"the caption of {self.name(index)} is not in UTF-8") from None
        return _some(tuple(line.strip() for line in lines if line.strip()), self.name(index))

    def name(self, index: int) -> str:
        shard, offset, *_ = self.index["rows"][index].tolist()
        return f"{printable(Path(self.shards[shard]))}@{offset}"


def _some(captions: tuple[str, ...], name: str) -> tuple[str, ...]:
    if not captions:
        raise Unreadable(f"{name} has an empty caption")
    return captions


def read_captions(root: str | Path, split: str) -> list[Captioned]:
    """The captioned images of a split ("train", "val"; "test" is another name of "val"), by image file.

    Blank captions do not count. Raises `UserError` for a missing folder or a file that is no annotation file, `NoSplit`
    for a split without captions.
    """
    rows = []
    for folder, content in _annotations(Path(root), "captions", split, ("caption",)):
        texts = defaultdict(list)
        for annotation in content.annotations:
            texts[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        rows += [
            Captioned(folder / image["file_name"], tuple(filter(None, texts[number])), number)
            for number, image in content.images.items() if number in texts
        ]
    return _nonempty(sorted(rows, key=lambda row: row.image), root, split, "captions")


def read_regions(root: str | Path, split: str) -> list[Region]:
    """The boxes of a split, each with its annotation's ``phrase``, or the name of its category where it has none."""
    rows = []
    for folder, content in _annotations(Path(root), "instances", split, ("bbox", "category_id"), sizes=True):
        for box in content.annotations:
            image = content.images.get(box["image_id"])  # the split table may have taken it out
            if image and not box.get("iscrowd"):
                phrase = str(box.get("phrase", content.categories[box["category_id"]]))
                size = image["width"], image["height"]
                rows.append(Region(folder / image["file_name"], tuple(box["bbox"]), phrase, box["image_id"], size))
    return _nonempty(sorted(rows, key=lambda row: row.image), root, split, "boxes")


def _annotations(
    root: Path, kind: str, split: str, fields: Sequence[str], *, sizes: bool = False
) -> list[tuple[Path, Coco]]:
    """(image folder, content of the annotation file, its images confined to the split) of every file that counts."""
    if split not in SPLIT_ALIASES:
        raise UserError(f"no split {split!r}; there are {', '.join(SPLIT_ALIASES)}")
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
    home, table = root / "annotations", root / "annotations" / "caption_split.csv"
    names = sorted(path.stem.removeprefix(f"{kind}_") for path in home.glob(f"{kind}_*.json"))
    if not table.exists():  # of the split's two names the first that is there
        named = ([name for name in names if name.startswith(word)] for word in SPLIT_ALIASES[split])
        names = next((some for some in named if some), [])
    found = [(root / name, read_coco(home / f"{kind}_{name}.json", fields, sizes=sizes)) for name in names]
    for folder, content in found:
        for number, image in content.images.items():
            try:
                inside(root, os.path.join(folder.name, image["file_name"]))
            except ValueError as error:
                raise UserError(f"{home}/{kind}_{folder.name}.json: image {number!r}: {error}") from None
    if not table.exists():
        return found
    try:
        rows = csv.DictReader(io.StringIO(read_text(table), newline=""))
        chosen = {(row["folder"], row["file"]) for row in rows if row["split"] in SPLIT_ALIASES[split]}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{table} is no table with the columns folder, file, split: {error}") from None
    return [
        (folder, replace(content, images={
            number: image for number, image in content.images.items() if (folder.name, image["file_name"]) in chosen
        }))
        for folder, content in found
    ]


def _nonempty(rows: list, root: str | Path, split: str, what: str) -> list:
    if not rows:
        raise NoSplit(f"{root} has no {what} for {split!r}: {EXPECTED.format(root=root)}")
    return rows
