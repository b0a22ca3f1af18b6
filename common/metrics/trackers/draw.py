"""Curves of scores, and frames with boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.data import tracking as data
from common.metrics import tracking
from common.metrics.trackers.baselines import BASELINES
from common.metrics.trackers.files import results
from common.run import drawing

COLORS = {"truth": "lime", "tracker": "red", "static box": "white", "template matching (NCC)": "deepskyblue",
          "KCF (OpenCV)": "violet", "CSRT (OpenCV)": "orange"}
# A panel's title, the label of its axis, and the scores that stand in its legend, whichever there is.
PANELS = {
    "success": ("success", "overlap", ("auc", "ao")),
    "precision": ("precision", "centre error in px", ("precision",)),
    "norm_precision": ("normalised precision", "centre error / target size", ("norm_precision",)),
}


def plot(
    path: Path, summaries: Mapping[str, tracking.Summary], published: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Success and precision curves of several trackers on the same sequences, their scores in the legend.

    `published` trackers (label -> {'auc': 71.2, ...}) have no curve, only their score in the legend.
    """
    kinds = next(iter(summaries.values())).curves
    figure, axes = drawing.plt.subplots(
        1, len(kinds), figsize=(4.4 * len(kinds), 3.6), squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds):
        title, xlabel, keys = PANELS[kind]
        for label, summary in summaries.items():
            axis.plot(*summary.curves[kind], label=f"{label} [{_first(summary.scores, keys):.1f}]")
        for label, scores in (published or {}).items():
            if (figure_in_paper := _first(scores, keys)) is not None:
                axis.plot([], [], " ", label=f"{label} [{figure_in_paper:.1f}]")
        axis.set(xlabel=xlabel, ylabel="% of frames", title=title, ylim=(0, 100))
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    drawing.save(figure, path)


def _first(scores: Mapping[str, float], keys: Sequence[str]) -> float | None:
    return next((scores[key] for key in keys if key in scores), None)


def draw_tracks(path: Path, sequences: Sequence[data.Sequence], out: Path, count: int = 6) -> None:
    """`count` evenly spread frames of each sequence with the true boxes, the tracker's under `out`, and those of
    `compare`'s baselines, where they were run."""
    found = {"tracker": results(sequences, out)}
    for label, baseline in BASELINES.items():
        if (out / baseline.folder).is_dir():
            found[label] = results(sequences, out / baseline.folder)
    figure, axes = drawing.plt.subplots(
        len(sequences), count, figsize=(2.2 * count, 1.75 * len(sequences)), squeeze=False, layout="constrained"
    )
    for row, (line, sequence) in enumerate(zip(axes, sequences)):
        boxes = {"truth": sequence.boxes} | {label: result[row].boxes for label, result in found.items()}
        for axis, number in zip(line, np.linspace(0, len(sequence) - 1, count).astype(int)):
            axis.imshow(data.read_frame(sequence.frames[number]))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{sequence.name.removeprefix('GOT-10k_')}, {number + 1}", fontsize=7)
            for label, its in boxes.items():
                drawing.outline(axis, its[number], COLORS[label])
    figure.suptitle(", ".join(f"{label}: {COLORS[label]}" for label in ("truth", *found)), fontsize=8)
    drawing.save(figure, path)
