"""What is in a folder of videos and what is wrong with it, and lists of what nothing is wrong with."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data.index import SUFFIXES as PICTURE_SUFFIXES
from common.data.video.files import SUFFIXES, open_video
from common.data.video.frames import hidden
from common.data.video.layouts import as_text, refuse_loop
from common.data.video.lists import Videos, open_videos, write_list
from common.run import UserError

HEAD = " frames   width  height  turned     rate  codec       file"


@dataclass
class Look:
    """What was seen of a video: a line, its frames, and what is wrong with it."""

    path: Path
    line: str
    frames: int = 0
    wrong: str = ""


def look(path: Path, whole: bool = False) -> Look:
    """Decodes the first, middle and last frame, or with `whole` all of them."""
    name = as_text(str(path))
    try:
        with open_video(path) as video:
            frames = len(video)
            shown = video.read([0, frames // 2, frames - 1])
            if whole:
                for frame in video:
                    if frame.shape != shown.shape[1:]:
                        raise OSError(f"{path} holds frames of several sizes")
            height, width = shown.shape[1:3]
            line = f"{frames:>7}  {width:>6}  {height:>6}  {video.rotation:>6}  {video.rate:>7.3f}  {video.codec:<10}"
            return Look(path, f"{line}  {name}", frames)
    except OSError as error:
        return Look(path, f"  wrong: {as_text(str(error))}", wrong=as_text(str(error)))


def spread(work: Callable[[Any], Any], jobs: Sequence[Any], workers: int, what: str) -> Iterator[Any]:
    """``work(job)`` of each, in order, by so many processes, with a progress bar."""
    if workers < 2:
        yield from tqdm(map(work, jobs), total=len(jobs), desc=what, disable=None)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from tqdm(pool.imap(work, jobs, chunksize=4), total=len(jobs), desc=what, disable=None)


def find(path: Path, skipped: Counter[str]) -> Iterator[Path]:
    """All video files, and folders and zips of frames, from a path on, links followed; `skipped` counts the rest."""
    if not os.path.isdir(path):
        yield path
        return
    below = sorted(path.iterdir())
    if any(p.suffix.lower() in PICTURE_SUFFIXES and not hidden(p.name) for p in below):
        yield path
        below = [p for p in below if p.is_dir() or p.suffix.lower() in SUFFIXES]
    for entry in below:
        if hidden(entry.name):
            skipped["hidden or system files"] += 1
        elif entry.is_dir() or entry.suffix.lower() in SUFFIXES | {".zip"}:
            refuse_loop(entry)
            yield from find(entry, skipped)
        else:
            skipped[f"files that are no video ({entry.suffix.lower() or 'no suffix'})"] += 1


def check(folder: Path, /, every: int = 1, whole: bool = False, workers: int = 1) -> None:
    """Says of each video in a folder its frames, size, rotation (degrees clockwise), frames/s, and what is wrong.

    Args:
        folder: A data folder in any layout, any other folder, or one video.
        every: Look at every n-th video only.
        whole: Decode all frames, not the first, middle and last.
        workers: Processes to do so.
    """
    if not folder.exists():
        raise UserError(f"no folder or file {folder}")
    skipped: Counter[str] = Counter()
    paths = list(find(folder, skipped))
    print(HEAD)
    wrong = 0
    for seen in spread(partial(look, whole=whole), paths[::every], workers, "looking"):
        tqdm.write(seen.line)
        wrong += bool(seen.wrong)
    for split in ("train", "val"):
        try:
            videos = open_videos(folder, split, missing=1)
            counts = np.bincount(videos.labels, minlength=len(videos.classes))
            print(f"{split}: {describe(videos)}, {counts.min()} to {counts.max()} a class")
        except UserError as error:
            print(f"{split}: {str(error).splitlines()[0]}")
    looked, notes = len(paths[::every]), ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))
    print(f"{len(paths):,} videos, {looked:,} looked at, {wrong} wrong{f'; skipped: {notes}' if notes else ''}")
    if wrong:
        raise SystemExit(1)


def describe(videos: Videos) -> str:
    notes = f"; {notes} passed over" if (notes := videos.notes()) else ""
    return f"{len(videos):,} videos of {len(videos.classes)} classes{notes}"


def lists(folder: Path, out: Path, /, fold: int = 1, workers: int = 1) -> None:
    """Writes {train,val}.txt and classes.txt of the videos of a data folder that can be read, left_out.txt of others.

    What is measured with such lists is not comparable with results on the whole set if a video of val is left out.

    Args:
        folder: A data folder in any layout.
        out: Where the lists go; a folder to train from.
        fold: UCF101's and HMDB51's.
        workers: Processes that open the videos.
    """
    out.mkdir(parents=True, exist_ok=True)
    left_out = []
    for split in ("train", "val"):
        videos = open_videos(folder, split, fold=fold, missing=1)
        rows = []
        for seen, label in zip(spread(look, videos.paths, workers, f"opening {split}"), videos.labels):
            if seen.wrong:
                left_out.append(f"{split}\t{as_text(str(seen.path))}\t{seen.wrong}")
            else:
                rows.append((seen.path.resolve(), seen.frames, int(label)))
        write_list(out, split, rows, videos.classes)
        print(f"{split}: {len(rows):,} of {len(videos):,} videos can be read; {describe(videos)}")
    (out / "left_out.txt").write_text("".join(f"{line}\n" for line in left_out), encoding="utf-8")
