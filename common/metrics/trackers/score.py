"""What result files say: scores, speeds, and their rows in results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import run
from common.data import tracking as data
from common.metrics import tracking
from common.metrics.trackers.files import results
from common.metrics.trackers.protocol import RULES, Protocol, dataset_of
from common.run import UserError


def scorable(sequences: Sequence[data.Sequence]) -> bool:
    """Whether all have ground truth beyond the first frame; GOT-10k's and TrackingNet's test sets have not."""
    return all(len(s) < 2 or np.isfinite(s.boxes[1:]).all(1).any() for s in sequences)


def score(sequences: Sequence[data.Sequence], out: Path, protocol: Protocol | None = None) -> tracking.Summary:
    """Scores of the result files in OUT, by the data set's own rule unless `protocol` has another."""
    dataset = dataset_of(sequences)
    rule = protocol.rule if protocol else RULES[dataset]
    tracks = []
    for sequence, result in zip(sequences, results(sequences, out)):
        to_file = (sequence.offset, sequence.offset, 0, 0)
        visible = None
        if rule == "got10k" and sequence.cover is not None:
            visible = np.asarray(sequence.cover) > 0
        elif rule.startswith(("lasot", "avist")) and sequence.absent is not None:
            visible = ~sequence.absent
        truth, boxes = sequence.boxes + to_file, result.boxes + to_file
        tracks.append(tracking.Track(sequence.name, truth, boxes, visible, result.size))
    try:
        return tracking.RULES[rule](tracks)
    except ValueError as error:
        raise UserError(str(error)) from None


def sizes_lost(sequences: Sequence[data.Sequence], out: Path, factor: float = 4.0, frames: int = 10) -> int:
    """In how many sequences the box's area is over `factor` times the truth's, or under 1 / `factor` of it, for that
    many visible frames running: a tracker whose box walks away from its target's size."""
    count = 0
    for sequence, result in zip(sequences, results(sequences, out)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = result.boxes[:, 2:].prod(1) / sequence.boxes[:, 2:].prod(1)
        wrong = ((ratio > factor) | (ratio < 1 / factor))[np.asarray(sequence.visible)]
        running = longest = 0
        for bad in wrong:
            running = running + 1 if bad else 0
            longest = max(longest, running)
        count += longest >= frames
    return count


def speed(sequences: Sequence[data.Sequence], out: Path, hardware: str) -> dict[str, float]:
    """{'fps': with reading, 'fps_model': in the tracker alone}: frames per second of one process, starts included.

    Only of the sequences that were tracked on this hardware, as `run.hardware` names it; without any, nothing.
    """
    found = [result for result in results(sequences, out) if result.hardware == hardware]
    if not found:
        return {}
    frames = sum(len(r.boxes) for r in found)
    seconds, reading = sum(r.seconds.sum() for r in found), sum(r.read_seconds.sum() for r in found)
    return {"fps": float(frames / (seconds + reading)), "fps_model": float(frames / seconds)}


def metrics(
    place: str, scores: Mapping[str, float], *, published: Mapping[str, float] | None = None,
    source: str | None = None, comparable: bool = False, label: str = "",
) -> list[dict[str, Any]]:
    """Rows of results.json, named "got10k ao" (with a baseline's `label`: "got10k ao, static box").

    `place` is a protocol's name, or that and a sequence's, "otb/Bolt". Scores are percent, 'fps...' frames per second.
    `published` are the paper's figures by score ({"ao": 69.9}), `source` where they stand. Speeds are never comparable.
    """
    rows = []
    for key, value in scores.items():
        fast = key.startswith("fps")
        row = run.metric(f"{place} {key}" + (f", {label}" if label else ""), value, "frames/s" if fast else "%")
        if published and key in published:
            row |= {"paper_value": published[key], "paper_source": source, "comparable": comparable and not fast}
        rows.append(row)
    return rows
