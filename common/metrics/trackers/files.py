"""A tracker's answers on disk: a file for each sequence, and the archive a benchmark takes."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import run
from common.data import tracking as data
from common.metrics.trackers.protocol import Protocol, dataset_of
from common.run import UserError


@dataclass(frozen=True)
class Result:
    """A tracker's answer to one sequence of N frames."""

    boxes: np.ndarray
    """(N, 4) x, y, w, h in pixels, zero-based, the given one first"""
    scores: np.ndarray
    """(N,), NaN for the first frame"""
    seconds: np.ndarray
    """(N,) in `Tracker.init`, then `Tracker.track`"""
    read_seconds: np.ndarray
    """(N,) reading and decoding the frame"""
    size: tuple[int, int]
    """(width, height) of the first frame, in pixels"""
    settings: dict[str, Any]
    """what the boxes depend on"""
    hardware: str
    """what the seconds were measured on"""


def result_path(sequence: data.Sequence, out: Path) -> Path:
    """OTB's parts are made of the same sequences, and share their files."""
    return out / ("otb" if sequence.dataset in ("otb50", "otb2013") else sequence.dataset) / f"{sequence.name}.csv"


def write_result(path: Path, result: Result) -> None:
    header = {"frames": len(result.boxes)} | {key: getattr(result, key) for key in ("size", "settings", "hardware")}
    table = np.column_stack([result.boxes, result.scores, result.seconds, result.read_seconds]).tolist()
    rows = [",".join(map(repr, row)) for row in table]
    run.write_text(path, "\n".join([f"# {json.dumps(header)}", *rows, "# end", ""]))


def read_result(path: Path) -> Result:
    """The result in a file of `write_result`; ValueError if it is not whole."""
    try:
        header, *rows, end = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(header.removeprefix("# "))
        table = np.array([row.split(",") for row in rows], dtype=np.float64)
        if end != "# end" or table.shape != (header["frames"], 7):
            raise ValueError("not whole")
        return Result(table[:, :4], *table.T[4:], tuple(header["size"]), header["settings"], header["hardware"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no result file: {error}") from None


def results(sequences: Sequence[data.Sequence], out: Path) -> list[Result]:
    """The sequences' results; `UserError` for one that is missing, cut short or of another length."""
    found = []
    for sequence in sequences:
        path = result_path(sequence, out)
        try:
            result = read_result(path)
        except (OSError, ValueError) as error:
            raise UserError(f"no result of {sequence.name}: {error}; evaluate it again") from None
        if len(result.boxes) != len(sequence):
            raise UserError(f"{path} has {len(result.boxes)} boxes, its sequence {len(sequence)} frames")
        found.append(result)
    return found


def archive(sequences: Sequence[data.Sequence], out: Path, protocol: Protocol) -> Path:
    """``OUT/<dataset>.zip``: the results as the benchmark takes them, in the coordinates of its own files.

    One NAME.txt of x,y,w,h per sequence; for GOT-10k NAME/NAME_001.txt and NAME/NAME_time.txt. Three decimals, or
    integers where the protocol says so. A box that is not finite becomes 0,0,0,0.
    """
    path = out / f"{dataset_of(sequences)}.zip"
    number = "%d" if protocol.integers else "%.3f"
    with run.written_whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
        for sequence, result in zip(sequences, results(sequences, out)):
            boxes = result.boxes + (sequence.offset, sequence.offset, 0, 0)
            boxes[~np.isfinite(boxes).all(1)] = 0
            if protocol.dataset == "got10k":
                file.writestr(f"{sequence.name}/{sequence.name}_001.txt", _text(boxes, number))
                file.writestr(f"{sequence.name}/{sequence.name}_time.txt", _text(result.seconds, "%.8f"))
            else:
                file.writestr(f"{sequence.name}.txt", _text(boxes, number))
    return path


def _text(table: np.ndarray, number: str) -> str:
    np.savetxt(stream := io.StringIO(), table, fmt=number, delimiter=",")
    return stream.getvalue()
