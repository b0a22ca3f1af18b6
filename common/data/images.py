"""Image classification from the three layouts people have on disk.

`open_images` looks at a folder and returns a map-style dataset of (PIL RGB image, class index) with
``classes`` (names in index order) and ``name(i)`` (where sample i came from).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data.picture import read_picture
from common.run import UserError
from common.run.files import cache_dir

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
EXPECTED = """expected one of
  image folders      {root}/train/<class>/*.jpg  and  {root}/val/<class>/*.jpg  (test/ also serves as val/)
  CIFAR batches      {root}/data_batch_1 ... test_batch, batches.meta  (as in cifar-10-batches-py)
  webdataset shards  {root}/train-000000.tar ...  and  {root}/val-000000.tar ...  (members KEY.jpg and KEY.cls)"""


class Images(Dataset):
    """Samples as (source, class index); subclasses say how a source becomes an image."""

    def __init__(self, sources: Sequence, labels: Sequence[int], classes: Sequence[str]):
        self.sources, self.labels, self.classes = sources, np.asarray(labels, dtype=np.int64), list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int) -> Image.Image:
        raise NotImplementedError

    def name(self, index: int) -> str:
        return str(self.sources[index])


class ImageFolder(Images):
    """``root/<class>/**/*.jpg``; class indices follow the sorted folder names."""

    def __init__(self, root: Path):
        classes = sorted(p.name for p in root.iterdir() if p.is_dir())
        found = [
            (path, label)
            for label, name in enumerate(tqdm(classes, desc=f"listing {root}", disable=len(classes) < 100))
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise UserError(f"{root} holds no images: {EXPECTED.format(root=root.parent)}")
        empty = sorted(set(range(len(classes))) - {label for _, label in found})
        if empty:
            raise UserError(f"{root}: no images in class folders {[classes[i] for i in empty]}")
        super().__init__([path for path, _ in found], [label for _, label in found], classes)

    def read(self, index: int) -> Image.Image:
        return read_picture(self.sources[index])


class CifarBatches(Images):
    """``data_batch_*``/``test_batch`` of CIFAR-10, or ``train``/``test`` of CIFAR-100, in their pickled form."""

    def __init__(self, root: Path, split: str):
        if (root / "batches.meta").exists():
            files = sorted(root.glob("data_batch_*")) if split == "train" else [root / "test_batch"]
            meta, names, labels = "batches.meta", "label_names", "labels"
        else:
            files = [root / ("train" if split == "train" else "test")]
            meta, names, labels = "meta", "fine_label_names", "fine_labels"
        if not files:
            raise UserError(f"{root} has no data_batch_1 ...: {EXPECTED.format(root=root)}")
        batches = [_unpickle_arrays(file) for file in files]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        where = [f"{file}#{i}" for file, batch in zip(files, batches) for i in range(len(batch[labels]))]
        super().__init__(where, np.concatenate([b[labels] for b in batches]), _unpickle_arrays(root / meta)[names])
        self.pixels = pixels.transpose(0, 2, 3, 1)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's batches are pickles: admit the pieces of numpy arrays and nothing else."""

    allowed = {
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("ndarray", "dtype", "_reconstruct")
    } | {("_codecs", "encode")}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}")
        return super().find_class(module, name)


def _unpickle_arrays(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {EXPECTED.format(root=path.parent)}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused as a CIFAR batch: {error}") from None
    except (EOFError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is truncated or no CIFAR batch: {error}") from None


def webdataset_key(member: str) -> tuple[str, str]:
    """("v1.0/7", "jpg") of a shard's member v1.0/7.jpg: the key ends at the first dot of the file's own name."""
    folder, slash, name = member.rpartition("/")
    key, _, suffix = name.partition(".")
    return folder + slash + key, suffix


class WebDataset(Images):
    """Tar shards of ``KEY.jpg`` + ``KEY.cls`` (class index as text), read at random through an index.

    The index (shard, offset, length) is built once per set of shards and kept in the cache, so that order,
    resumption and evaluation are as exact as with files. ``classes.txt`` beside the shards names the classes.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = [str(shard.resolve()) for shard in shards]
        rows = self._index()
        labels = [row[3] for row in rows]
        names = shards[0].parent / "classes.txt"
        count = max(labels) + 1
        classes = names.read_text().split("\n")[:count] if names.exists() else [str(i) for i in range(count)]
        super().__init__(rows, labels, classes)

    def _index(self) -> list[list[int]]:
        stamp = [(s, Path(s).stat().st_size, Path(s).stat().st_mtime_ns) for s in self.shards]
        cached = cache_dir("webdataset") / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16]}.json"
        if cached.exists():
            return json.loads(cached.read_text())
        rows = []
        for number, shard in enumerate(tqdm(self.shards, desc="indexing shards")):
            images, labels = {}, {}
            try:
                with tarfile.open(shard) as tar:
                    for member in tar:
                        key, suffix = webdataset_key(member.name)
                        if f".{suffix.lower()}" in SUFFIXES:
                            images[key] = (member.offset_data, member.size)
                        elif suffix == "cls":
                            labels[key] = int(tar.extractfile(member).read())
            except (tarfile.TarError, ValueError) as error:
                raise UserError(f"{shard} is no readable webdataset shard: {error}") from None
            unpaired = sorted(images.keys() ^ labels.keys())
            if unpaired:
                raise UserError(f"{shard}: {len(unpaired)} samples lack image or .cls, such as {unpaired[0]}")
            rows += [[number, *images[key], labels[key]] for key in images]
        if not rows:
            raise UserError(f"no samples in {self.shards[0]} and its {len(self.shards) - 1} neighbours")
        part = cached.with_suffix(f".{os.getpid()}.part")  # every process may be at it
        part.write_text(json.dumps(rows))
        part.replace(cached)
        return rows

    def read(self, index: int) -> Image.Image:
        shard, offset, size, _ = self.sources[index]
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return read_picture(io.BytesIO(file.read(size)))

    def name(self, index: int) -> str:
        shard, offset, *_ = self.sources[index]
        return f"{self.shards[shard]}@{offset}"


def open_images(root: str | Path, split: str) -> Images:
    """Opens split 'train' or 'val' of a folder in any of the layouts above.

    Raises `UserError` with the expected trees when the folder is missing or holds none of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
    if (root / "batches.meta").exists() or (root / "meta").exists():
        return CifarBatches(root, split)
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return ImageFolder(root / name)
        if shards := sorted(root.glob(f"{name}-*.tar")):
            return WebDataset(shards)
    raise UserError(f"{root} has no {split} split: {EXPECTED.format(root=root)}")


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
        )


if __name__ == "__main__":
    import tyro

    from common import run

    run.main(lambda: tyro.cli(main))
