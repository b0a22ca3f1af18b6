"""CIFAR's batches, as their authors pickled them, read without unpickling anything: of what a file would make, the
names, arguments and bytes are kept, and nothing is called."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from common.run import UserError

KEPT = {
    (module, name)
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("ndarray", "dtype", "_reconstruct")
} | {("_codecs", "encode")}


def is_there(root: Path) -> bool:
    """Whether a folder holds CIFAR-10's or CIFAR-100's batches."""
    if (root / "batches.meta").is_file():
        return True
    return (root / "meta").is_file() and any((root / name).is_file() for name in ("train", "test"))


def read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """(pixels (N, 32, 32, 3) uint8, labels (N,) int64, each picture's place, names of the classes) of "train" or "val".

    `UserError` names a file that is missing, damaged or something else.
    """
    if (root / "batches.meta").is_file():
        files = sorted(root.glob("data_batch_*")) if split == "train" else [root / "test_batch"]
        meta, names, labels = root / "batches.meta", "label_names", "labels"
    else:
        files = [root / ("train" if split == "train" else "test")]
        meta, names, labels = root / "meta", "fine_label_names", "fine_labels"
    if not files:
        raise UserError(f"{root} has no data_batch_1 ... beside its batches.meta")
    classes = _load(meta).get(names)
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{meta} is no CIFAR meta file: it holds no list {names!r}")
    pixels, numbers, where = [], [], []
    for file in files:
        batch = _load(file)
        try:
            pixels.append(_pixels(batch["data"]))
            numbers.append(_labels(batch[labels], len(pixels[-1]), len(classes)))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{file} is truncated or no CIFAR batch: {type(error).__name__} {error}") from None
        where += [f"{file}#{i}" for i in range(len(pixels[-1]))]
    return np.concatenate(pixels).transpose(0, 2, 3, 1), np.concatenate(numbers), where, classes


class _Kept:
    """Stands for whatever a pickle names, calls or fills."""

    def __init__(self, name: str, args: tuple = (), state: Any = None):
        self.name, self.args, self.state = name, args, state

    def __call__(self, *args: Any) -> _Kept:
        return _Kept(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Keeper(pickle._Unpickler):  # the one in Python: a number in the file makes it reserve no memory
    def find_class(self, module: str, name: str) -> _Kept:
        if (module, name) not in KEPT:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}")
        return _Kept(name)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = _Keeper(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; CIFAR's folder holds it") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused as a CIFAR batch: {error}") from None
    except Exception as error:  # pickle documents that a damaged file may raise anything; nothing of ours ran in there
        raise UserError(f"{path} is truncated or no CIFAR batch: {type(error).__name__} {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is truncated or no CIFAR batch: it holds a {type(content).__name__}, not a dict")
    return content


def _pixels(array: _Kept) -> np.ndarray:
    """(N, 3, 32, 32) of a pickled uint8 array (N, 3072): (version, shape, type, is Fortran's order, bytes)."""
    _, shape, kind, _, raw = array.state
    if kind.args[0] not in ("u1", "uint8") or len(shape) != 2 or shape[1] != 3072:
        raise ValueError(f"an array {shape} of {kind.args[0]}, not (N, 3072) of u1")
    if isinstance(raw, _Kept):  # _codecs.encode(text, "latin1"): how Python 3 writes bytes for Python 2
        raw = raw.args[0]
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, np.uint8).reshape(-1, 3, 32, 32)


def _labels(values: list, count: int, classes: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) != count or not all(type(value) is int for value in values):
        raise ValueError(f"its labels are no list of {count} numbers")
    if wrong := [value for value in values if not 0 <= value < classes]:
        raise ValueError(f"label {wrong[0]} is not below the number of classes, {classes}")
    return np.array(values, dtype=np.int64)
