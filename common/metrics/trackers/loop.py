"""The loop: a tracker over sequences, a file for each, resumed where it was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common import run
from common.data import tracking as data
from common.data.text import printable
from common.metrics.trackers.files import Result, read_result, result_path, write_result
from common.metrics.trackers.protocol import Tracker
from common.run import UserError, World


def evaluate(
    tracker: Tracker, sequences: Sequence[data.Sequence], out: Path, *, settings: Mapping[str, Any],
    world: World | None = None, fresh: bool = False,
) -> None:
    """Runs a tracker over sequences and writes ``OUT/<dataset>/<name>.csv`` for each.

    Frames are read one at a time. A file appears when its sequence is finished, so a killed evaluation started again
    goes on with the first unfinished sequence. `settings` is all that the answers depend on (JSON values; for a network
    `settings_of`, which knows its weights): a file that is damaged or was made under other settings is made anew; with
    `fresh` all are. How many are kept is said: nothing shows who made them. Under torchrun the ranks share the
    sequences out, and all return when all files are there.
    """
    if not settings:
        raise ValueError("settings must say what the answers depend on: kept ones are taken for those of this tracker")
    cv2.setNumThreads(torch.get_num_threads())  # or the baselines' seconds would be of all cores
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    settings = json.loads(json.dumps(settings))
    mine = sorted(sequences, key=len, reverse=True)[rank::ranks]  # the longest first: ranks finish together
    due = mine if fresh else [s for s in mine if not _finished(s, out, settings)]
    kept = sum(run.gather_objects([len(mine) - len(due)])) if world else len(mine) - len(due)
    if kept and rank == 0:
        print(f"{kept} of {len(sequences)} sequences taken from earlier results in {out}")
    total = sum(map(len, mine))
    with tqdm(total=total, initial=total - sum(map(len, due)), desc="tracking", unit="frame", leave=False,
              disable=None if rank == 0 else True, dynamic_ncols=True) as bar:
        for sequence in due:
            bar.set_postfix_str(printable(sequence.name), refresh=False)
            boxes, scores, seconds, read_seconds, size = _track(tracker, sequence, bar)
            result = Result(boxes, scores, seconds, read_seconds, size, settings, device_of(world))
            write_result(result_path(sequence, out), result)
    if world:
        world.wait()


def device_of(world: World | None) -> str:
    """What a tracker's seconds are measured on, in one line."""
    return run.hardware(world.device.type if world else "auto")


def _track(tracker: Tracker, sequence: data.Sequence, bar: tqdm) -> tuple:
    """boxes (N, 4), scores, seconds, seconds of reading (N,), and the first frame's (width, height)."""
    first = tuple(sequence.boxes[0].tolist())
    if not (np.isfinite(first).all() and min(first[2:]) > 0):
        raise UserError(f"{sequence.name}: a tracker starts from the first frame's box, and that is {first}")
    rows = []
    for path in sequence.frames:
        began = time.perf_counter()
        try:
            frame = data.read_frame(path)
        except OSError as error:
            raise UserError(f"cannot evaluate: {error}") from None
        read = time.perf_counter()
        if rows:
            box, value = tracker.track(frame)
            if len(box) != 4:
                raise TypeError(f"a tracker's box is x, y, w, h; {type(tracker).__name__} returned {box}")
        else:
            tracker.init(frame, first)
            box, value, size = first, np.nan, frame.shape[1::-1]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or reading the next frame would hide what the tracker still computes
        rows.append([*map(float, box), float(value), time.perf_counter() - read, read - began])
        bar.update()
    table = np.array(rows)
    return table[:, :4], *table.T[4:], size


def _finished(sequence: data.Sequence, out: Path, settings: Mapping[str, Any]) -> bool:
    try:
        result = read_result(result_path(sequence, out))
    except (OSError, ValueError):
        return False
    fits = len(result.boxes) == len(sequence) and np.array_equal(result.boxes[0], sequence.boxes[0])
    return fits and result.settings == settings
