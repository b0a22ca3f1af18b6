"""Loaders for data in the formats people have on disk, and the tiny sets written in those formats."""

import os
import tempfile
from pathlib import Path


def cache_dir(name: str) -> Path:
    """A folder for what is made once and kept: tiny sets, indices, compiled kernels, built wheels.

    Where the home cannot be written to (a container, a cluster's node), the user's own folder among the temporary
    files takes its place. OSError when that is impossible too, or belongs to somebody else.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision-reproductions"
    try:
        return _writable(home / name)
    except OSError:
        own = Path(tempfile.gettempdir()) / f"vision-reproductions-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.lstat().st_uid != os.getuid():
            raise PermissionError(f"{own} belongs to another user; set XDG_CACHE_HOME to a folder of yours") from None
        return _writable(own / name)


def _writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # a folder that is there may still be read-only
        return folder
