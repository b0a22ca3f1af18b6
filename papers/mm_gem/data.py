"""Images and regions with their texts as training rows, and the order they come in.

A row is (PIL image, box or None for the whole image, text); or, of kept features, (feature map, None, text).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from common import run
from common.data import captions
from common.data.captions import NoSplit, Region, read_regions
from common.data.loader import Augmented, StepSampler, steps_per_epoch
from common.data.picture import Unreadable, read_picture
from common.data.text import printable
from common.data.tiny.scenes import scenes
from common.run import UserError
from papers.mm_gem.processing import Box, MMGEMProcessor, wrong_box
from papers.mm_gem.recipes import BUILT_IN, Recipe

Captioned = captions.Captions | captions.CaptionShards
EXPECTED = """expected one of
  captions  {root}/annotations/captions_train*.json beside image folders                (COCO's format)
  shards    {root}/train-000000.tar ..., val-000000.tar ...   (webdataset: KEY.jpg and KEY.txt)
and for regions
  boxes     {root}/annotations/instances_train*.json, each box with a "phrase" or its category"""


class Rows(Dataset):
    """Captioned images, one of the captions at random, then regions."""

    def __init__(self, images: Captioned | Dataset, regions: list[Region]):
        """`images`: or a `features.Kept`, whose samples are feature maps with captions."""
        self.images, self.regions = images, regions

    def __len__(self) -> int:
        return len(self.images) + len(self.regions)

    def __getitem__(self, index: int) -> tuple[tuple[Image.Image, Box | None, str], None]:
        if index < len(self.images):
            image, texts = self.images[index]
            return (image, None, random.choice(texts)), None
        region = self.regions[index - len(self.images)]
        image, box = read_picture(region.image), corners(region)
        if wrong := wrong_box(box, image) or (not region.phrase.strip() and "an empty phrase"):
            raise Unreadable(wrong)
        return (image, box, region.phrase), None

    def name(self, index: int) -> str:
        if index < len(self.images):
            return self.images.name(index)
        region = self.regions[index - len(self.images)]
        return f"{printable(region.image)} (box {list(region.box_xywh_px)})"


class Mixture(Sampler):
    """One rank's batches of (row, seed): images alone for `image_steps`, then with a fraction of regions.

    A function of the seed; neither the number of ranks nor a resume changes the global batches.
    """

    def __init__(
        self, images: int, regions: int, recipe: Recipe, steps: int, *, seed: int, rank: int = 0, world: int = 1
    ):
        self.images, self.steps, self.seed, self.ranks = images, steps, seed, {"rank": rank, "world": world}
        self.regions, self.batch = regions, recipe.batch
        self.pure = recipe.image_steps if recipe.region_fraction else steps
        self.boxes = round(recipe.batch * recipe.region_fraction / world) * world  # regions of a batch
        steps_per_epoch(images, self.batch - self.boxes if self.pure < steps else self.batch)
        if self.pure < steps and regions < self.boxes:
            raise UserError(f"a batch takes {self.boxes} regions, but there are {regions} training regions")

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.pure:
            yield from StepSampler(self.images, self.batch, min(self.pure, self.steps), seed=self.seed, **self.ranks)
        if (left := self.steps - self.pure) > 0:
            own = StepSampler(self.images, self.batch - self.boxes, left, seed=self.seed + 1, **self.ranks)
            boxes = StepSampler(self.regions, self.boxes, left, seed=self.seed + 2, **self.ranks)
            for first, second in zip(own, boxes):
                yield first + [(self.images + row, seed) for row, seed in second]


def data_folder(recipe: Recipe, data: Path | None) -> Path:
    """Where a recipe's data are: as given, or the built-in scenes for a recipe meant for them."""
    return run.data_folder(recipe, data, {"scenes": scenes})


def describe(recipe: Recipe, data: Path | None, train: int, val: int) -> str:
    """What a result was measured on: the recipe's data set if what was given is of its size, else the folder's name."""
    own = data is None or (recipe.dataset not in BUILT_IN and train == recipe.samples)
    name = recipe.dataset if own else data.resolve().name
    return f"{name}: {train:,} training, {val:,} validation images"


def open_captions(root: Path, split: str) -> Captioned:
    """The captioned images of a split, from COCO's files or shards."""
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
    if shards := sorted(root.glob(f"{split}-*.tar")):
        return captions.CaptionShards(shards)
    return captions.Captions(captions.read_captions(root, split))


def open_regions(root: Path, split: str) -> list[Region]:
    """The regions of a split; of those too small to be seen, under 1/32 of the image's sides, none."""
    return [
        region for region in read_regions(root, split)
        if region.box_xywh_px[2] * 32 >= region.size_px[0] and region.box_xywh_px[3] * 32 >= region.size_px[1]
    ]


def regions_if_there(root: Path, split: str) -> list[Region]:
    try:
        return open_regions(root, split)
    except NoSplit:
        return []


def corners(region: Region) -> Box:
    x, y, w, h = region.box_xywh_px
    return (x, y, x + w, y + h)


def train_loader(
    rows: Rows, processor: MMGEMProcessor, recipe: Recipe, steps: int, *, seed: int, rank: int = 0, world: int = 1,
    workers: int = 0, report: Path | None = None,
) -> DataLoader:
    """`Mixture` of a recipe, collated. Unreadable images are counted, reported and passed over."""
    batches = Mixture(len(rows.images), len(rows.regions), recipe, steps, seed=seed, rank=rank, world=world)
    samples = Augmented(rows, _same, report=report)
    return DataLoader(
        samples, batch_sampler=batches, collate_fn=_Collate(processor), num_workers=workers,
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
    )


def _same(row):
    return row


class _Collate:
    def __init__(self, processor: MMGEMProcessor):
        self.processor = processor

    def __call__(self, samples):
        rows = [row for row, _ in samples]
        if isinstance(rows[0][0], torch.Tensor):
            features, _, texts = zip(*rows)
            return {"features": torch.stack(features), **self.processor.texts(texts)}
        return self.processor.collate(rows)


def main(folder: Path, /) -> None:
    """Counts the captioned images and the regions of a data folder; or says what is expected."""
    for split in ("train", "val"):
        print(f"{split}: {len(open_captions(folder, split)):,} captioned images, "
              f"{len(regions_if_there(folder, split)):,} regions")


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
