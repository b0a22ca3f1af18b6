"""Small real data written in the formats of the large sets, so that tiny runs go through the same loaders."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from common.run.files import cache_dir


def written_once(name: str, write: Callable[[Path], None], about: str, root: Path | None = None) -> Path:
    """The folder that `write` fills on first use: `root`, or `name` in the cache. Whole or absent, never half written.

    `about` becomes its README.txt, which also says that the folder is complete.
    """
    root = root or cache_dir("tiny") / name
    if (root / "README.txt").exists():
        return root
    part = root.with_name(f".{root.name}.{os.getpid()}.part")  # every process may be at it
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        (part / "README.txt").write_text(about + "\n", encoding="utf-8")
        with contextlib.suppress(OSError):  # another process wrote the same set meanwhile
            part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
