"""Video in, video out, for any tracker: a paper's ``demo.py`` is ``run.main(lambda: demo.main(PAPER))``."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import av
import cv2
import numpy as np
import tyro
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw

from common import run
from common.data import tracking as data
from common.data.text import read_text
from common.data.tiny.sequences import sequences
from common.data.video import FrameFolder
from common.metrics.trackers.paper import Paper
from common.metrics.trackers.protocol import Box, Tracker
from common.run import UserError, drawing, shipped

BOX_COLORS = ("red", "deepskyblue", "lime", "orange", "violet", "yellow")
CAMERA_FRAMES = 250


@dataclass
class Arguments:
    source: Annotated[Path | None, tyro.conf.Positional] = None
    """A video, or a folder of frames; without one, a sequence of the built-in set."""
    camera: int | None = None
    """Number of a camera to follow instead, 0 for the first; `frames` of it."""
    box: tuple[str, ...] = ()
    """The target in the first frame: x,y,w,h in pixels, or a ground truth file whose first line says it; a folder
    with a groundtruth*.txt needs none. Several targets are followed together."""
    checkpoint: Path | None = None
    """Run folder, file of weights, or shipped[:NAME]; without one, the shipped weights, or the newest finished run."""
    recipe: str | None = None
    """Recipe of a file of weights."""
    out: Path = Path("answer.mp4")
    """.mp4 or .gif; a strip of pictures goes beside it as .png."""
    frames: int = 0
    """Frames to track at most; 0: all, of a camera 250."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(paper: Paper) -> None:
    """The command line of ``papers.<name>.demo``: draws the boxes a tracker gives into a video."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.demo", description="A target, followed.")
    checkpoint = shipped.for_demo(paper.name, args.checkpoint, paper.recipes)
    tracker = paper.load(checkpoint, args.recipe, run.start_world(run.Options(device=args.device))).tracker
    if args.camera is not None:
        source, boxes = args.camera, [first_box(Path(f"camera {args.camera}"), box) for box in args.box or (None,)]
    elif args.source:
        source, boxes = args.source, [first_box(args.source, box) for box in args.box or (None,)]
    else:
        sequence = data.open_sequences(sequences(), "val")[0]
        source, boxes = sequence.frames[0].parent, [tuple(sequence.boxes[0])]
    count = annotate(tracker, source, boxes[0], args.out, args.frames, more=boxes[1:])
    print(f"{count} frames in {args.out}, some of them in {args.out.with_suffix('.png')}; {checkpoint}")


def first_box(source: Path, box: str | None) -> Box:
    """x, y, w, h from "x,y,w,h", a ground truth file, or that of the folder; of a polygon the box around it.

    Zero-based: 1 is taken from what OTB's and LaSOT's files say.
    """
    if box is None:
        found = [p for folder in (source, source.parent) for p in sorted(folder.glob("groundtruth*.txt"))]
        found = [p for p in found if p.stat().st_size]  # the first of OTB's Human4 is empty
        if not (source.is_dir() and found):
            raise UserError(f"where is the target in the first frame of {source}? Give --box x,y,w,h")
        box = str(found[0])
    file, is_file = Path(box), os.path.isfile(box)  # not Path's, which raises where the text is long
    try:
        text = read_text(file).split("\n")[0] if is_file else box
    except ValueError as error:
        raise UserError(f"cannot read the target's box: {error}") from None
    from_one = is_file and (
        file.name.startswith("groundtruth_rect") or file.with_name("full_occlusion.txt").is_file()
    )
    try:
        x, y, w, h = data.box_around(re.sub(r"[,\s]+", ",", text.strip()))
    except ValueError:
        x = y = w = h = np.nan
    if not np.isfinite([x, y, w, h]).all() or min(w, h) <= 0:
        raise UserError(f"--box is x,y,w,h in pixels with w and h above 0, or a ground truth file; got {text[:80]!r}")
    return float(x - from_one), float(y - from_one), float(w), float(h)


def annotate(
    tracker: Tracker, source: Path | int, box: Box, out: Path, limit: int = 0, more: Sequence[Box] = ()
) -> int:
    """Tracks through a video, a folder of frames or a camera, by its number, and writes the annotated video and a strip
    of pictures. `more` targets are each followed by a copy of the tracker.

    Returns the number of frames. The strip has 8 to 15 evenly spaced frames (fewer of a shorter video).
    """
    if out.suffix not in (".mp4", ".gif"):
        raise UserError(f"--out is an .mp4 or a .gif, got {out}")
    codec, pixels = ("gif", "rgb8") if out.suffix == ".gif" else ("libx264", "yuv420p")
    kept, every, count = [], 1, 0
    followers = [tracker, *(copy.copy(tracker) for _ in more)]
    try:
        with (
            open_frames(source) as (frames, rate), run.written_whole(out) as part,
            av.open(str(part), "w", format=out.suffix[1:]) as video,
        ):
            for count, frame in enumerate(frames, 1):
                if count == 1:
                    found = [(given, "given") for given in (box, *more)]
                    for follower, (given, _) in zip(followers, found):
                        follower.init(frame, given)
                    height, width = (n // 2 * 2 for n in frame.shape[:2])  # as H.264 wants them
                    stream = video.add_stream(codec, rate=rate, width=width, height=height, pix_fmt=pixels)
                else:
                    found = [(its, f"{value:.2f}") for its, value in (f.track(frame) for f in followers)]
                drawn = frame
                for color, (its, caption) in zip(itertools.cycle(BOX_COLORS), found):
                    drawn = _drawn(drawn, its, caption, color)
                video.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn[:height, :width]))))
                if (count - 1) % every == 0:
                    kept.append((drawn, f"{count}: {', '.join(caption for _, caption in found)}"))
                if len(kept) == 16:
                    kept, every = kept[::2], 2 * every
                if count == (limit or (CAMERA_FRAMES if isinstance(source, int) else 0)):
                    break
            if not count:
                raise UserError(f"{source} has no frames")
            video.mux(stream.encode())
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"cannot make {out} from {source}: {error}") from None
    pictures, captions = zip(*kept)
    drawing.gallery(out.with_suffix(".png"), pictures, captions, ["black"] * len(kept), columns=min(4, len(kept)))
    return count


def _drawn(frame: np.ndarray, box: Box, caption: str, color: str) -> np.ndarray:
    picture = Image.fromarray(frame)
    if np.isfinite(box).all():
        x, y, w, h = box
        draw = ImageDraw.Draw(picture)
        draw.rectangle((x, y, x + max(w, 1), y + max(h, 1)), outline=color, width=2)
        draw.text((x, max(y - 12, 0)), caption, fill=color)
    return np.asarray(picture)


@contextmanager
def open_frames(source: Path | int) -> Iterator[tuple[Iterator[np.ndarray], int]]:
    """(frames (H, W, 3) uint8 RGB, one at a time, their rate per second) of a video, a folder of images or a camera.

    A video is decoded once from its beginning: `common.data.video.VideoFile` reads any frames, and so starts at the key
    frame before them each time.
    """
    if isinstance(source, int):
        camera = cv2.VideoCapture(source)
        try:
            if not camera.isOpened():
                raise UserError(f"there is no camera {source} here, or another program has it")
            yield _from_camera(camera), round(camera.get(cv2.CAP_PROP_FPS)) or 25
        finally:
            camera.release()
        return
    if source.is_dir():
        yield map(data.read_frame, _frame_files(source)), 25
        return
    with av.open(str(source)) as video:
        if not video.streams.video:
            raise UserError(f"{source} holds no pictures")
        stream = video.streams.video[0]
        scaler = VideoReformatter()  # one for all: to_ndarray(format=...) would set one up for every frame
        frames = (scaler.reformat(frame, format="rgb24").to_ndarray() for frame in video.decode(stream))
        yield frames, round(stream.average_rate or 25)


def _from_camera(camera: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while (read := camera.read())[0]:
        yield cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)


def _frame_files(folder: Path) -> list[Path]:
    """The images of a folder, or of img/ in it, in the order of their numbers; of OTB's those of the sequence."""
    img = folder / "img" if (folder / "img").is_dir() else folder
    files = [img / name for name in FrameFolder(img).names]
    otb = img.parent if img.name == "img" else img
    if otb.name in data.OTB_RANGES and any(otb.glob("groundtruth_rect*.txt")):
        return data.otb_part(otb.name, files)
    return files
