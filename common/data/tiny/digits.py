"""Handwritten digits as a classification set."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from common.data.tiny import written_once


def digits(layout: Literal["folder", "cifar", "webdataset"] = "folder", root: Path | None = None) -> Path:
    """Handwritten digits (UCI, shipped with scikit-learn): 1,437 training and 360 validation images, 32x32 RGB.

    The scans are 8x8 with 17 grey levels, enlarged bicubically. Written once, to the cache unless `root` says
    otherwise; the split is fixed and stratified. Returns the data folder.
    """

    def write(folder: Path) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans, labels = load_digits(return_X_y=True)
        images = [
            Image.fromarray((scan.reshape(8, 8) * 255 / 16).astype(np.uint8))
            .resize((32, 32), Image.BICUBIC)
            .convert("RGB")
            for scan in scans
        ]
        train, val = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
        split_writer = {"folder": _write_folder, "cifar": _write_cifar, "webdataset": _write_webdataset}[layout]
        for split, rows in (("train", train), ("val", val)):
            split_writer(folder, split, [(images[i], int(labels[i])) for i in rows])

    about = "Optical recognition of handwritten digits, UCI, by way of scikit-learn."
    return written_once(f"digits-{layout}", write, about, root)


def _write_folder(root: Path, split: str, samples: list[tuple[Image.Image, int]]) -> None:
    for i, (image, label) in enumerate(samples):
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:05d}.png")


def _write_cifar(root: Path, split: str, samples: list[tuple[Image.Image, int]]) -> None:
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1).reshape(-1) for image, _ in samples])
    labels = [label for _, label in samples]
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=2))
    halves = {"data_batch_1": slice(0, None, 2), "data_batch_2": slice(1, None, 2)}
    for name, rows in halves.items() if split == "train" else [("test_batch", slice(None))]:
        (root / name).write_bytes(pickle.dumps({"data": pixels[rows], "labels": labels[rows]}, protocol=2))


def _write_webdataset(root: Path, split: str, samples: list[tuple[Image.Image, int]]) -> None:
    (root / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)), encoding="utf-8")
    for shard, first in enumerate(range(0, len(samples), 500)):
        with tarfile.open(root / f"{split}-{shard:06d}.tar", "w") as tar:
            for i, (image, label) in enumerate(samples[first : first + 500], first):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                for name, content in ((f"{i:06d}.png", buffer.getvalue()), (f"{i:06d}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
