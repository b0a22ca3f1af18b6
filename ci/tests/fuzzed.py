"""Readers of what people are given: a small folder for each, and the call that reads it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Write = Callable[[Path], list[Path]]


@dataclass(frozen=True)
class Reader:
    write: Write
    """Fills a folder; returns its files that are damaged, one at a time."""
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = ()
    """That its docstring names, besides `UserError` and `Unreadable`."""
    quick: bool = True


READERS: dict[str, Reader] = {}


def add(
    name: str, read: Callable[[Path], object], *errors: type[Exception], quick: bool = True
) -> Callable[[Write], Write]:
    """Decorates the function that writes the reader's files."""

    def keep(write: Write) -> Write:
        READERS[name] = Reader(write, read, errors, quick)
        return write

    return keep


def file(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_file(path: Path, value: object) -> Path:
    return file(path, json.dumps(value))


def picture(kind: str = "PNG") -> bytes:
    pixels = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    Image.fromarray(pixels).save(stream := io.BytesIO(), kind)
    return stream.getvalue()
