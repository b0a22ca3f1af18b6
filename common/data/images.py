"""Image classification from the three layouts people have on disk.

`open_images` looks at a folder and returns a map-style dataset of (PIL RGB image, class index) with
``classes`` (names in index order) and ``name(i)`` (where sample i came from).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from torch.utils.data import Dataset

from common.data import cifar
from common.data.index import SUFFIXES as SUFFIXES  # others find it here
from common.data.index import Files, Index, find_shards, index_folder, index_shards, read_part
from common.data.picture import read_picture
from common.data.text import printable, read_text
from common.run import UserError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
EXPECTED = """expected one of
  image folders      {root}/train/<class>/*.jpg  and  {root}/val/<class>/*.jpg  (test/ also serves as val/)
  CIFAR batches      {root}/data_batch_1 ... test_batch, batches.meta  (as in cifar-10-batches-py)
  webdataset shards  {root}/train-000000.tar ...  and  {root}/val-000000.tar ...  (members KEY.jpg and KEY.cls;
                     also {root}/imagenet1k-train-0000.tar ...  or  {root}/train/000000.tar ...)"""


class Images(Dataset):
    """Samples as (source, class index); subclasses say how a source becomes an image."""

    left_out: dict[str, int] = {}
    """What lies among the images and was passed over, counted by kind."""

    def __init__(self, sources: Sequence, labels: Sequence[int], classes: Sequence[str]):
        self.sources, self.labels, self.classes = sources, np.asarray(labels, dtype=np.int64), list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int) -> Image.Image:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where a sample comes from, in characters that can be shown."""
        return printable(self.sources[index])


class Indexed(Images):
    """Images whose sources and labels are memory-mapped: they lie in memory once for all processes."""

    def __init__(self, index: Index, classes: list[str]):
        self.index, self.classes = index, classes

    @property
    def labels(self) -> np.ndarray:
        return self.index["labels"]


class ImageFolder(Indexed):
    """``root/<class>/**/*.jpg``; class indices follow the sorted folder names."""

    def __init__(self, root: Path):
        index = index_folder(root, classes=True, expected=f": {EXPECTED.format(root=root.parent)}")
        super().__init__(index, index.about["classes"])
        self.sources, self.left_out = Files(root, index), index.about["left_out"]

    def read(self, index: int) -> Image.Image:
        return read_picture(self.sources[index])


class CifarBatches(Images):
    """``data_batch_*``/``test_batch`` of CIFAR-10, or ``train``/``test`` of CIFAR-100, in their pickled form."""

    def __init__(self, root: Path, split: str):
        self.pixels, labels, where, classes = cifar.read(root, split)
        super().__init__(where, labels, classes)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class WebDataset(Indexed):
    """Tar shards of ``KEY.jpg`` + ``KEY.cls`` (class index as text), read at random through an index, so that order,
    resumption and evaluation are as exact as with files.

    ``classes.txt`` beside the shards, or beside their folder, names the classes; without it they are called by their
    numbers.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = [str(shard.resolve()) for shard in shards]
        index = index_shards(self.shards, "cls")
        places = (folder / "classes.txt" for folder in (shards[0].parent, shards[0].parent.parent))
        names = next((path for path in places if path.is_file()), None)
        samples, highest = len(index["labels"]), int(index["labels"].max())
        if names is None and highest >= samples:  # an id rather than a class: a name for each could fill the memory
            raise UserError(
                f"{shards[0]} and its neighbours have {samples} samples and label {highest}; if that is a class, name "
                f"all classes in {shards[0].with_name('classes.txt')}, one in each line"
            )
        super().__init__(index, class_names(names) if names else [str(i) for i in range(highest + 1)])
        if highest >= len(self.classes):
            raise UserError(f"{names} names {len(self.classes)} classes, but the shards have label {highest}")

    @property
    def sources(self) -> np.ndarray:
        """(N, 3): shard, offset and length in bytes."""
        return self.index["rows"][:, :3]

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self.sources[index].tolist()
        return read_picture(io.BytesIO(read_part(self.shards[shard], offset, size)))

    def name(self, index: int) -> str:
        shard, offset, _ = self.sources[index].tolist()
        return f"{printable(Path(self.shards[shard]))}@{offset}"


def class_names(path: Path) -> list[str]:
    """The lines of a classes.txt; `UserError` for a blank one, which would shift the names after it."""
    try:
        names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read class names: {error}") from None
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is blank; expected the name of a class in each line")
    return names


def open_images(root: str | Path, split: str) -> Images:
    """Opens split 'train' or 'val' of a folder in any of the layouts above.

    Raises `UserError` with the expected trees when the folder is missing or holds none of them.
    """
    root = Path(root)
    try:
        if not root.is_dir():
            raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
        if cifar.is_there(root):
            return CifarBatches(root, split)
        for name in SPLITS[split]:
            if shards := find_shards(root, name):
                return WebDataset(shards)
            if (root / name).is_dir():
                return ImageFolder(root / name)
    except OSError as error:
        raise UserError(f"cannot look into {root}: {error}") from None
    raise UserError(f"{root} has no {split} split: {EXPECTED.format(root=root)}")


class Renumbered(Images):
    """Other images whose classes are some of `classes`, numbered by these."""

    def __init__(self, data: Images, classes: Sequence[str]):
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[name] for name in data.classes])[data.labels]
        super().__init__(data.sources, labels, classes)
        self.data, self.left_out = data, data.left_out

    def read(self, index: int) -> Image.Image:
        return self.data.read(index)

    def name(self, index: int) -> str:
        return self.data.name(index)


def same_classes(train: Sequence[str], val: Images, *, subset: bool = False) -> Images:
    """`val` numbered by the classes of training, which are the network's outputs.

    `UserError` names the classes that one of them has and the other lacks; with `subset` validation may lack some.
    """
    if list(train) == val.classes:
        return val
    unknown, missing = sorted({*val.classes} - {*train}), sorted({*train} - {*val.classes})
    twice = len({*train}) < len(train) or len({*val.classes}) < len(val.classes)
    if unknown or (missing and not subset) or twice:
        found = [f"validation has {_few(unknown)}, which training lacks"] if unknown else []
        found += [f"validation lacks {_few(missing)}"] if missing else []
        found += ["names that stand for several classes"] if twice else []
        raise UserError(f"the classes of training and validation differ: {'; '.join(found)}; expected the same in both")
    return Renumbered(val, train)


def open_both(root: str | Path, *, subset: bool = False) -> tuple[Images, Images]:
    """Training and validation images, numbered by training's classes; see `same_classes`."""
    train = open_images(root, "train")
    return train, same_classes(train.classes, open_images(root, "val"), subset=subset)


def _few(names: list[str]) -> str:
    return ", ".join(map(printable, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def train_transform(
    size: int, *, crop_scale: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, policy: str | None = None,
    erase: float = 0.0,
):
    """DeiT's augmentation: PIL image -> (3, size, size), normalised with ImageNet's statistics.

    Random resized crop of an area share in `crop_scale`, horizontal flip, an automatic `policy` in timm's notation
    ("rand-m9-mstd0.5-inc1"), random erasing with noise of probability `erase`.
    """
    transform = create_transform(
        size, is_training=True, scale=crop_scale, hflip=flip, color_jitter=0.0, auto_augment=policy,
        interpolation="bicubic", re_prob=erase, re_mode="pixel",
    )
    for op in _policy_ops(transform.transforms):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return transform


def _policy_ops(transforms: Sequence) -> Iterator[AugmentOp]:
    """The single operations of timm's automatic policies."""
    for transform in transforms:
        if isinstance(transform, RandAugment | AugMixAugment):
            yield from transform.ops
        elif isinstance(transform, AutoAugment):
            yield from itertools.chain(*transform.policy)


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's. Of 0 bits, the policy's highest magnitude, Pillow made black until it refused them: so the authors
    trained."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(size: int, crop_pct: float = 224 / 256):
    """Shorter side to size / crop_pct (bicubic), centre crop, normalise: PIL image -> (3, size, size)."""
    return create_transform(size, interpolation="bicubic", crop_pct=crop_pct)


def make_mixup(mixup: float, cutmix: float, *, smoothing: float, classes: int, per_rank: int) -> Mixup | None:
    """timm's Mixup of these strengths, which smooths its targets; None if both are 0."""
    if not (mixup or cutmix):
        return None
    if per_rank % 2:
        raise UserError(f"mixup pairs images: each process needs an even part of the batch, not {per_rank}")
    return Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)


def main(folder: Path, /) -> None:
    """Prints what a data folder holds; says what is expected where it holds nothing usable."""
    for split in ("train", "val"):
        data = open_images(folder, split)
        counts = np.bincount(data.labels, minlength=len(data.classes))
        print(
            f"{split}: {len(data):,} images of {len(data.classes)} classes ({type(data).__name__}), "
            f"{counts.min()} to {counts.max()} a class; the first is {data.name(0)}"
            + "".join(f"; left out: {count} {kind}" for kind, count in data.left_out.items())
        )


if __name__ == "__main__":
    import tyro

    from common import run

    run.main(lambda: tyro.cli(main))
