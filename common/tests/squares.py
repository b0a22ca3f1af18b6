"""Sequences to test trackers on, and folders of classes for classifiers."""

import shutil

import numpy as np
from PIL import Image

from common.data import tracking as data


def make_sequences(folder, lengths=(5, 9, 7), dataset="got10k", **more):
    """A textured square moving 2, 1 px a frame over another texture."""
    rng, sequences = np.random.default_rng(0), []
    for k, count in enumerate(lengths):
        (folder / f"s{k}").mkdir(parents=True)
        ground, square = (rng.integers(0, 255, (n, m, 3), dtype=np.uint8) for n, m in ((60, 80), (16, 20)))
        boxes = np.array([[10 + 2 * i, 12 + i, 20, 16] for i in range(count)], float)
        frames = [folder / f"s{k}" / f"{i}.png" for i in range(count)]
        for path, (x, y, w, h) in zip(frames, boxes.astype(int)):
            picture = ground.copy()
            picture[y:y + h, x:x + w] = square
            Image.fromarray(picture).save(path)
        sequences.append(data.Sequence(f"s{k}", dataset, frames, boxes, np.ones(count, bool), **more))
    return sequences


def class_folders(root, names="abcd", train=8, val=3):
    """Noise of 32 px: root/train/a/0.png ..., root/val/a/0.png ...; returns `root`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


def break_classes(root, how):
    """One of the ways in which validation and training come to have other classes, in a folder of `class_folders`."""
    if how == "val lacks one":
        shutil.rmtree(root / "val" / "b")
    elif how == "val has one more":
        shutil.copytree(root / "val" / "b", root / "val" / "e")
    elif how == "hidden folder":  # no class at all
        (root / "train" / ".ipynb_checkpoints").mkdir()
        shutil.copy(root / "train" / "a" / "0.png", root / "train" / ".ipynb_checkpoints")


BROKEN = [("val lacks one", "validation lacks b;"), ("val has one more", "validation has e, which training lacks")]
