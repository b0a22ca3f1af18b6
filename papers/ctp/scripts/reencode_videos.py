"""Encodes a data folder's videos once more, so that every epoch after reads them faster.

    python -m papers.ctp.scripts.reencode_videos /data/kinetics400 /data/kinetics_144 --short-side-px 144 --workers 16

H.264 with a key frame every 32 frames at least, since what lies between the key frame before a clip and the clip's
first frame is decoded for nothing; with B-frames that nothing refers to, so that they can be left out; and without the
two tools that take a decoder most time (x264's fastdecode). Frames keep their number and rate, so that a stride means
what it meant, and stand upright. --short-side-px makes them smaller as well: the paper's recipes go down to 112, 128
or 144 anyhow, but then from fewer pixels, which belongs into a report.

OUT is a folder of lists to train from. Stopped and started again, it goes on where it was. Videos that cannot be read
are named in OUT/left_out.txt.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import tyro

from common import run
from common.data.video import open_video, open_videos, write_video
from common.data.video.check import spread
from common.data.video.lists import write_list


def main(
    data: Path, out: Path, /, short_side_px: int = 0, key_every: int = 32, crf: int = 18, fold: int = 1,
    workers: int = 1,
) -> None:
    """Encodes the videos of a data folder once more, with more key frames, and smaller if wished.

    Args:
        data: A data folder in any layout of common/data/video/layouts.py.
        out: A new folder, or one that this script left unfinished with the same settings.
        short_side_px: Shorter side of the new videos, if theirs is longer; 0 keeps their size.
        key_every: Frames from one key frame to the next, at most.
        crf: x264's quality; less is better.
        fold: UCF101's and HMDB51's.
        workers: Processes.
    """
    settings = {"short_side_px": short_side_px, "key_every": key_every, "crf": crf}
    noted = out / "settings.json"
    if noted.exists() and (before := run.read_json(noted)) != settings:
        raise run.UserError(f"{out} was made with {before}, not {settings}; choose another folder")
    run.write_json(noted, settings)
    left_out = []
    for split in ("train", "val"):
        videos = open_videos(data, split, fold=fold, missing=1)
        targets = {
            path: out / "videos" / split / f"{label:04d}" / f"{path.stem}.mp4"
            for path, label in zip(videos.paths, videos.labels.tolist())  # a list may name a video many times
        }
        done = spread(partial(encode, **settings), list(targets.items()), workers, f"encoding {split}")
        frames = dict(zip(targets, done))
        left_out += [f"{split}\t{path}\t{found}\n" for path, found in frames.items() if isinstance(found, str)]
        rows = [
            (targets[path].resolve(), frames[path], label)
            for path, label in zip(videos.paths, videos.labels.tolist()) if isinstance(frames[path], int)
        ]
        write_list(out, split, rows, videos.classes)
        print(f"{split}: {len(rows):,} of {len(videos):,} videos")
    (out / "left_out.txt").write_text("".join(left_out), encoding="utf-8")


def encode(job: tuple[Path, Path], *, short_side_px: int, key_every: int, crf: int) -> int | str:
    """Writes a video unless it is there; its number of frames, or what is wrong with the source."""
    source, target = job
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}")  # renamed when whole
            with open_video(source) as video:
                write_video(
                    part, (smaller(frame, short_side_px) for frame in video), fps=video.rate or 25,
                    g=str(key_every), crf=str(crf), preset="fast", tune="fastdecode",
                    **{"x264-params": "b-pyramid=none"},
                )
            part.replace(target)
        with open_video(target) as video:
            return len(video)
    except OSError as error:
        return str(error)


def smaller(frame: np.ndarray, short_side_px: int) -> np.ndarray:
    """With a shorter side of at most so many px, if any, and even sides, which H.264 asks for."""
    H, W = frame.shape[:2]
    scale = min(1, short_side_px / min(H, W)) if short_side_px else 1
    if scale == 1:
        return frame[: H // 2 * 2, : W // 2 * 2]
    return cv2.resize(frame, (round(W * scale / 2) * 2, round(H * scale / 2) * 2), interpolation=cv2.INTER_AREA)


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
