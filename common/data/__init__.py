"""Loaders for data in the formats people have on disk, and the tiny sets written in those formats."""

import os
from pathlib import Path


def cache_dir(name: str) -> Path:
    """A folder for what is made once and kept: tiny sets, indices, compiled kernels, built wheels."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vision-reproductions" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
