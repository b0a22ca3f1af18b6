"""Pictures every run draws: curves of its log, and images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.run import read_log


def curves(run: Path, panels: Sequence[Sequence[str]]) -> None:
    """Writes ``curves.png``: one panel for each group of keys of the run's log, against the step."""
    rows = read_log(run)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3), squeeze=False, layout="constrained")
    for axis, keys in zip(axes[0], panels):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points) if points else ((), ()), label=key, marker="." if len(points) < 40 else "")
        axis.set_xlabel("step")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    save(figure, run / "curves.png")


def gallery(
    path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str], colors: Sequence[str], columns: int = 8
) -> None:
    """Writes a grid of pictures (H, W, 3), 0 to 255, each under its caption."""
    rows = -(-len(pictures) // columns)
    size = (1.5 * columns, 1.75 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption, color in zip(axes.flat, pictures, captions, colors):
        axis.imshow(picture)
        axis.set_title(caption, fontsize=8, color=color)
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
