"""Two views of a picture, a region that both show, and the arithmetic that leads from one view to the other.

Coordinates are continuous: a picture of width W spans 0 to W, pixel i covers i to i + 1. Boxes are (x1, y1, x2, y2) of
edges, as arrays (..., 4), in pixels of the picture or of a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.ops import box_iou
from torchvision.transforms import ColorJitter, Normalize, RandomResizedCrop
from torchvision.transforms.functional import to_tensor

from common import run
from common.data import images
from common.data.coco import read_coco
from common.data.index import Files, index_folder
from common.data.picture import read_picture
from common.run import UserError
from papers.maskco.recipes import Recipe


@dataclass(frozen=True)
class View:
    """A crop (x0, y0, w, h) of a picture, resized to `side` x `side`, and flipped left to right or not."""

    x0: float
    y0: float
    w: float
    h: float
    side: int
    flip: bool

    @property
    def crop(self) -> np.ndarray:
        return np.array([self.x0, self.y0, self.x0 + self.w, self.y0 + self.h])

    @property
    def scale(self) -> np.ndarray:
        """View pixels in a pixel of the picture, horizontally and vertically."""
        return self.side / np.array([self.w, self.h])

    def from_picture(self, boxes: np.ndarray) -> np.ndarray:
        corners = np.array([self.x0, self.y0] * 2)
        return self._flipped((boxes - corners) * np.tile(self.scale, 2))

    def to_picture(self, boxes: np.ndarray) -> np.ndarray:
        corners = np.array([self.x0, self.y0] * 2)
        return self._flipped(boxes) / np.tile(self.scale, 2) + corners

    def _flipped(self, boxes: np.ndarray) -> np.ndarray:
        if not self.flip:
            return boxes
        x1, y1, x2, y2 = np.moveaxis(np.asarray(boxes, dtype=float), -1, 0)
        return np.stack([self.side - x2, y1, self.side - x1, y2], -1)  # the edges change places

    def of(self, picture: Image.Image) -> Image.Image:
        """The view's pixels."""
        box = (self.x0, self.y0, self.x0 + self.w, self.y0 + self.h)
        pixels = picture.crop(box).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else pixels


def draw_view(picture: Image.Image, recipe: Recipe) -> View:
    """A random crop as MoCo v2 takes it."""
    y0, x0, h, w = RandomResizedCrop.get_params(picture, recipe.crop_scale, recipe.crop_aspect)
    return View(x0, y0, w, h, recipe.input_size_px, bool(torch.rand(()) < recipe.flip))


def overlap(a: View, b: View) -> np.ndarray:
    """Where two crops meet, in pixels of the picture; x2 <= x1 or y2 <= y1 if nowhere."""
    return np.concatenate([np.maximum(a.crop[:2], b.crop[:2]), np.minimum(a.crop[2:], b.crop[2:])])


def draw_pair(picture: Image.Image, recipe: Recipe) -> tuple[View, View, bool]:
    """(query view, key view, whether the crops would not meet and the key's is the query's).

    The key's crop is drawn anew until what both show is `overlap_px` wide and high in either view.
    """
    query = draw_view(picture, recipe)
    for _ in range(recipe.overlap_tries):
        key = draw_view(picture, recipe)
        shared = overlap(query, key)
        sides = shared[2:] - shared[:2]
        if min(*(sides * query.scale), *(sides * key.scale)) >= recipe.overlap_px:
            return query, key, False
    return query, View(query.x0, query.y0, query.w, query.h, query.side, bool(torch.rand(()) < recipe.flip)), True


def draw_regions(query: View, key: View, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) of regions in whole pixels of the query view, and of the same regions in the key view."""
    shared = query.from_picture(overlap(query, key))
    low, high = np.ceil(shared[:2] - 1e-6).astype(int), np.floor(shared[2:] + 1e-6).astype(int)
    boxes = []
    for _ in range(recipe.regions):
        sides = [_integer(recipe.region_px[0], min(recipe.region_px[1], room)) for room in high - low]
        corner = [_integer(a, b - side) for a, b, side in zip(low, high, sides)]
        boxes.append([*corner, *(c + side for c, side in zip(corner, sides))])
    in_query = np.array(boxes, dtype=float)
    in_key = key.from_picture(query.to_picture(in_query))
    if not ((in_key > -1e-3) & (in_key < key.side + 1e-3)).all():
        raise ValueError(f"regions {in_query.tolist()} of {query} are {in_key.tolist()} in {key}: expected inside it")
    return in_query, in_key.clip(0, key.side)


def draw_negatives(box: np.ndarray, recipe: Recipe, tries: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (J, 4) of the size of `box` elsewhere in the key view, overlapping it by an IoU of at most `negative_iou`;
    and which of them (J) there are: where none fits, `box` stands in."""
    J = recipe.same_image_negatives
    size = box[2:] - box[:2]
    corners = torch.rand(tries, 2, dtype=torch.float64).numpy() * (recipe.input_size_px - size)
    drawn = np.concatenate([corners, corners + size], 1)
    apart = box_iou(torch.from_numpy(box[None]), torch.from_numpy(drawn))[0].numpy() <= recipe.negative_iou
    found = drawn[apart][:J]
    return np.concatenate([found, np.tile(box, (J - len(found), 1))]), np.arange(J) < len(found)


def _integer(low: int, high: int) -> int:
    """Uniform, both ends included."""
    return int(torch.randint(low, high + 1, ()))


class Views:
    """A picture -> two views and their regions, a dict of tensors; all randomness is torch's.

    ``query, key`` (3, S, S), normalised and not masked; and for MaskCo ``query_boxes, key_boxes`` (N, 4), ``negatives``
    (N, J, 4), ``present`` (N, J), ``fallback`` (); where noise stands in a mask, ``noise`` (3, S, S).
    """

    def __init__(self, recipe: Recipe):
        if recipe.region_px[0] > recipe.overlap_px - 2:  # what is shared loses up to two pixels to whole ones
            raise UserError(
                f"--region-px from {recipe.region_px[0]} does not fit into --overlap-px {recipe.overlap_px}: "
                f"regions may start at {recipe.overlap_px - 2}"
            )
        self.recipe = recipe
        self.jitter = ColorJitter(*recipe.jitter)
        self.normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def __call__(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        recipe = self.recipe
        if recipe.method == "moco_v2":
            return {name: self.pixels(picture, draw_view(picture, recipe)) for name in ("query", "key")}
        query, key, fallback = draw_pair(picture, recipe)
        in_query, in_key = draw_regions(query, key, recipe)
        negatives, present = zip(*(draw_negatives(box, recipe) for box in in_key))
        sample = {
            "query": self.pixels(picture, query), "key": self.pixels(picture, key),
            "query_boxes": _float(in_query), "key_boxes": _float(in_key), "negatives": _float(np.stack(negatives)),
            "present": torch.from_numpy(np.stack(present)), "fallback": torch.tensor(float(fallback)),
        }
        if recipe.mask == "noise":
            sample["noise"] = torch.randn_like(sample["query"])
        return sample

    def pixels(self, picture: Image.Image, view: View) -> torch.Tensor:
        """MoCo v2's colours and blur."""
        recipe, pixels = self.recipe, view.of(picture)
        if torch.rand(()) < recipe.jitter_probability:
            pixels = self.jitter(pixels)
        if torch.rand(()) < recipe.gray:
            pixels = pixels.convert("L").convert("RGB")
        if torch.rand(()) < recipe.blur:
            low, high = recipe.blur_px
            pixels = pixels.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))
        return self.normalize(to_tensor(pixels))


def _float(boxes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(boxes).float()


# Pictures on disk -----------------------------------------------------------------------------------------


class Pictures(images.Images):
    """All pictures under a folder, without classes."""

    def __init__(self, root: Path):
        index = index_folder(root, classes=False)
        files = Files(root, index)
        super().__init__(files, np.zeros(len(files), np.int64), ["any"])
        self.left_out = index.about["left_out"]

    def read(self, index: int) -> Image.Image:
        return read_picture(self.sources[index])


def open_pictures(root: str | Path, split: str) -> images.Images:
    """Pictures to learn from: ``train2017/`` or ``train/`` (``val...``) with or without folders in it, CIFAR's batches,
    or webdataset shards; labels are there and not used."""
    root = Path(root)
    for name in (f"{split}2017", split):
        if (root / name).is_dir():
            return Pictures(root / name)
    return images.open_images(root, split)


class Present(images.Images):
    """Pictures of COCO's layout, each labelled by its row of ``categories`` (images, categories by their id): which it
    shows."""

    def __init__(self, root: Path, split: str):
        both = [root / "annotations" / f"instances_{name}.json" for name in (f"{split}2017", split)]
        names = next((path for path in both if path.is_file()), None)
        if not names:
            raise UserError(f"no {both[0]}, and no {both[1].name} beside it: both splits must be annotated")
        folder = root / names.stem.removeprefix("instances_")
        annotated = read_coco(names, ("category_id",))
        column = {number: i for i, number in enumerate(sorted(annotated.categories))}
        row = {number: i for i, number in enumerate(annotated.images)}
        self.categories = np.zeros((len(row), len(column)), dtype=bool)
        for box in annotated.annotations:
            self.categories[row[box["image_id"]], column[box["category_id"]]] = True
        paths = [folder / image["file_name"] for image in annotated.images.values()]
        super().__init__(paths, range(len(row)), [annotated.categories[number] for number in column])

    def read(self, index: int) -> Image.Image:
        return read_picture(self.sources[index])


def open_labelled(root: str | Path) -> tuple[images.Images, images.Images]:
    """Training and validation pictures to judge features by: COCO's layout, or any of `images.open_images`."""
    coco = list((Path(root) / "annotations").glob("instances_*.json"))
    train, val = (
        Present(Path(root), split) if coco else images.open_images(root, split) for split in ("train", "val")
    )
    if coco and train.classes != val.classes:
        differ = sorted({*train.classes} ^ {*val.classes}) or "their order"
        raise UserError(f"the classes of {root} differ between training and validation: {differ}")
    return train, val if coco else images.same_classes(train.classes, val)


def main(folder: Path, /) -> None:
    """Prints what a data folder holds; says what is expected where it holds nothing usable."""
    for split in ("train", "val"):
        pictures = open_pictures(folder, split)
        print(f"{split}: {len(pictures):,} pictures; the first is {pictures.name(0)}")
    try:
        train, val = open_labelled(folder)
        print(f"linear probe: {len(train):,} training, {len(val):,} validation pictures, {len(val.classes)} classes")
    except UserError as error:
        print(f"no linear probe: {error}")


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
