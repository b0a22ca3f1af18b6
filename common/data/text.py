"""The texts that come with data sets: UTF-8 whatever the locale, and names that can be shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. `ValueError` names a file that is something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """A JSON file in UTF-8, -16 or -32. `ValueError` names a file that is damaged or something else."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole JSON file: {error}") from None


def printable(name: str | bytes | Path) -> str:
    """The name of a file or folder, or any text, as it can be shown and written in one line: bytes that are not UTF-8
    and control characters as in caf\\xe9 and a\\nb."""
    text = name if isinstance(name, str) else os.fsencode(name).decode("utf-8", "surrogateescape")
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def inside(folder: Path, name: str) -> Path:
    """A file that a data set names. `ValueError` if it lies outside its folder: a data set has no say about others."""
    if not Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{printable(name)} lies outside {folder}")
    return folder / name


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(character)[1:-1]
