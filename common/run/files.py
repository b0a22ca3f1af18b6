"""Files and folders: what is written is written whole or not at all. Imports nothing of this repository."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.umask(_UMASK := os.umask(0o077))  # the only way to ask


class UserError(Exception):
    """A mistake in what was asked for. Its text says what was found, what was expected, and how to mend it."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end it takes its place, so that a reader finds the old file or
    the new one, never half of either. The folder is made; after an exception nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # several processes may be at it
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        open_as_umask(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def open_as_umask(file: Path) -> None:
    """Gives a file the mode that any other would have: safetensors makes files that nobody else can read."""
    os.chmod(file, 0o666 & ~_UMASK)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all. NaN and infinities, which are not JSON, are a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A file of `write_json`, or anybody's; OSError or ValueError where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def cache_dir(name: str) -> Path:
    """A folder for what is made once and kept: tiny sets, indices, compiled kernels, built wheels.

    What lies in it is believed, and some of it run, so it must be the user's own and nobody else's to write to. Where
    the home has no such place (a container, a cluster's node), a folder among the temporary files takes its place.
    OSError when that is impossible too.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision-reproductions"
        return _own(home, home / name)
    except (OSError, RuntimeError):  # RuntimeError: no home at all, as for a user without an entry in passwd
        return temporary_dir(name)


def temporary_dir(name: str) -> Path:
    """A folder of the user's own among the temporary files, and so on this machine's disk."""
    home = Path(tempfile.gettempdir()) / f"vision-reproductions-{os.getuid()}"
    return _own(home, home / name)


def _own(home: Path, folder: Path) -> Path:
    home.parent.mkdir(parents=True, exist_ok=True)
    for each in dict.fromkeys((home, folder)):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if each.lstat().st_uid != os.getuid() or each.lstat().st_mode & 0o022:
            raise PermissionError(
                f"{each} belongs to another user or others may write to it; set XDG_CACHE_HOME to one of yours"
            )
    with tempfile.TemporaryFile(dir=folder):  # a folder that is there may still be read-only
        return folder
