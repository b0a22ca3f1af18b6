"""Videos from the layouts people have on disk: files of any container FFmpeg knows, or folders of frames.

Decoding is PyAV's: it is a plain wheel with its own FFmpeg, and asked for frame i it can be made to give exactly
frame i (records/video_decoding_*.md compares it with OpenCV, decord and torchcodec).
"""

from __future__ import annotations

import bisect
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data.images import SUFFIXES as FRAME_SUFFIXES
from common.data.picture import Unreadable, read_picture
from common.run import UserError

SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg"}
SLACK = 2  # frames at the end that an AVI's index counts and its decoder never gives: the last one stands in
BAD = 0.01  # share of a training list whose lines or files may be missing
EXPECTED = """expected one of
  UCF101       {root}/ucfTrainTestlist/{{classInd,trainlist01,testlist01}}.txt and {root}/UCF-101/<Class>/v_*.avi
  HMDB51       {root}/testTrainMulti_7030_splits/<class>_test_split1.txt and {root}/<class>/*.avi
  SSv1         {root}/something-something-v1-{{labels,train,validation}}.csv and
               {root}/20bn-something-something-v1/<id>/00001.jpg
  Kinetics     {root}/annotations/{{train,val}}.csv and {root}/train/[<label>/]<id>_000010_000020.mp4
  lists        {root}/{{train,val}}.txt with lines "path label" or "path frames label", labels from 0
  folders      {root}/{{train,val}}/<class>/<video file or folder of frames>"""


class VideoFile:
    """An open video: ``len`` is its number of frames, `read` decodes some of them. Close it, or use it in ``with``.

    Raises `OSError` for a file that cannot be opened, is cut off, or damaged where it is read.
    """

    def __init__(self, path: str | Path):
        import av
        from av.video.reformatter import VideoReformatter

        self.path, self.av = path, av
        # One for all frames, on this thread: to_ndarray(format=...) sets a scaler up for each, at ten times the cost.
        self.scaler = VideoReformatter()
        try:
            self.container = av.open(str(path), metadata_errors="replace")  # AVIs carry text of any encoding
        except (av.FFmpegError, ValueError) as error:
            raise Unreadable(f"{path} is no readable video: {error}") from None
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> None:
        """Lists the packets, which is quick, so that a frame's number can be told from its time stamp."""
        if not self.container.streams.video:
            raise Unreadable(f"{self.path} holds no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # loading processes are as many as there are cores
        try:
            packets = [(p.pts, p.is_keyframe) for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        except self.av.FFmpegError as error:
            raise Unreadable(f"{self.path} is damaged: {error}") from None
        self.length = len(packets)
        if not packets or self.length + SLACK < self.stream.frames:
            raise Unreadable(f"{self.path} is cut off: {self.length} of {self.stream.frames} frames are there")
        # AVI has no time stamps, only packets in order, and a B-frame may share one: then frames are counted instead.
        counted = "avi" in self.container.format.name and self.stream.codec_context.has_b_frames
        times = [] if counted else [pts for pts, _ in packets]
        self.times = sorted(times) if None not in times else []
        self.keys = sorted(pts for pts, key in packets if key) if self.times else []

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames (len(indices), H, W, 3), uint8 RGB; indices from 0, in any order, repeated at will."""
        wanted = set(indices)
        first, final = min(wanted), max(wanted)
        if not 0 <= first <= final < len(self):
            raise IndexError(f"{self.path} has frames 0 to {len(self) - 1}, not {first} to {final}")
        rank = {time: i for i, time in enumerate(self.times)}
        before = bisect.bisect_right(self.keys, self.times[first]) if self.keys else 0  # key frames up to the first
        start = self.keys[before - 1] if before else 0
        found, last = {}, None
        try:
            self.container.seek(start, stream=self.stream)
            for i, frame in enumerate(self.container.decode(self.stream)):
                number = rank.get(frame.pts) if rank else i
                last = frame
                if number in wanted:
                    if frame.is_corrupt:
                        raise Unreadable(f"{self.path} is damaged at frame {number}")
                    found[number] = self._rgb(frame)
                    if len(found) == len(wanted):
                        break
        except self.av.FFmpegError as error:
            raise Unreadable(f"{self.path} is damaged: {error}") from None
        for number in wanted:
            if number not in found:
                if last is None or number < len(self) - SLACK:
                    raise Unreadable(f"{self.path} is damaged: frame {number} of {len(self)} cannot be decoded")
                found[number] = self._rgb(last)
        return np.stack([found[number] for number in indices])

    def _rgb(self, frame: Any) -> np.ndarray:
        return self.scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def close(self) -> None:
        self.container.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class FrameFolder:
    """A folder of numbered images as a video, in the order of the numbers in their names."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = (p for p in self.path.iterdir() if p.suffix.lower() in FRAME_SUFFIXES)
        self.files = sorted(files, key=lambda p: ([int(n) for n in re.findall(r"\d+", p.stem)], p.name))
        if not self.files:
            raise Unreadable(f"{path} holds no frames")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """As `VideoFile.read`. Pillow, unlike OpenCV, raises on a file that is cut off."""
        return np.stack([np.asarray(read_picture(self.files[i])) for i in indices])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def open_video(path: str | Path) -> VideoFile | FrameFolder:
    """A video file or a folder of frames, open for reading."""
    return FrameFolder(path) if Path(path).is_dir() else VideoFile(path)


class Videos:
    """Where videos are, and their classes: ``paths``, ``labels`` (class indices from 0), ``classes`` (names)."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]):
        self.paths, self.labels, self.classes = list(paths), np.asarray(labels, dtype=np.int64), list(classes)
        if len(labels) and not 0 <= self.labels.min() <= self.labels.max() < len(classes):
            raise UserError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, expected 0 to {len(classes) - 1}: "
                f"{len(classes)} classes, counted from 0"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])


class Clips(Dataset):
    """``sample(video, rng)`` of every video, with its label: what common/data/loader.py loads.

    In training the generator follows from numpy's, which the loader seeds for each sample; with a `seed` it follows
    from that and the video's index, so that every evaluation sees the same clips.
    """

    def __init__(self, videos: Videos, sample: Callable[[VideoFile | FrameFolder, np.random.Generator], Any], *,
                 seed: int | None = None):
        self.videos, self.sample, self.seed = videos, sample, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int):
        key = np.random.randint(2**32) if self.seed is None else (self.seed, index)
        with open_video(self.videos.paths[index]) as video:
            return self.sample(video, np.random.default_rng(key)), int(self.videos.labels[index])

    def name(self, index: int) -> str:
        return self.videos.name(index)


# Layouts --------------------------------------------------------------------------------------------------


def open_videos(root: str | Path, split: str, *, fold: int = 1) -> Videos:
    """Opens split 'train' or 'val' of a folder in any of the layouts below; `fold` chooses UCF101's and HMDB51's.

    Lines that cannot be read and files that are missing are counted and named. In training up to 1 % of a list is
    passed over; more, or any in evaluation, is a `UserError`.
    """
    root = Path(root)
    expected = EXPECTED.format(root=root)
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {expected}")
    for marker, layout in (
        ("ucfTrainTestlist", _ucf101), ("testTrainMulti_7030_splits", _hmdb51),
        ("something-something-v1-labels.csv", _ssv1), (f"annotations/{split}.csv", _kinetics), (f"{split}.txt", _list),
        (split, _folders),
    ):
        if (root / marker).exists():
            rows, classes, bad = layout(root, split, fold)
            break
    else:
        raise UserError(f"{root} has no {split} split: {expected}")
    missing = {path for path, _ in tqdm(rows, desc=f"looking for {split} videos", disable=len(rows) < 20_000)
               if not path.exists()}
    bad += [f"no file {path}" for path in sorted(missing)]
    total = len(rows) + len(bad) - len(missing)
    if bad and (split != "train" or len(bad) > BAD * total):
        raise UserError(
            f"{len(bad)} of {total} {split} videos listed in {root} cannot be used, first: {bad[0]}; "
            f"{BAD:.0%} may be missing in training, none in evaluation"
        )
    if bad:
        print(f"{len(bad)} of {total} {split} videos listed in {root} are passed over, first: {bad[0]}")
    rows = [(path, label) for path, label in rows if path not in missing]
    if not rows:
        raise UserError(f"{root} lists no {split} videos: {expected}")
    return Videos(*zip(*rows), classes)


Rows = tuple[list[tuple[Path, int]], list[str], list[str]]  # (path, label), class names, what could not be used


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {EXPECTED.format(root=path.parent.parent)}")
    return [line for line in path.read_text().splitlines() if line.strip()]


def _rows(lines: Sequence[Any], parse: Callable[[Any], tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[str]]:
    rows, bad = [], []
    for line in lines:
        try:
            rows.append(parse(line))
        except (ValueError, KeyError, IndexError):
            bad.append(f"line {line!r}")
    return rows, bad


def _ucf101(root: Path, split: str, fold: int) -> Rows:
    """Class ids of classInd.txt count from 1, labels here from 0."""
    lists = root / "ucfTrainTestlist"
    ids = dict(reversed(line.split()) for line in _lines(lists / "classInd.txt"))
    classes = sorted(ids, key=lambda name: int(ids[name]))
    videos = next((f for f in (root / "UCF-101", root / "videos") if f.is_dir()), root)
    number = {name: i for i, name in enumerate(classes)}

    def parse(line: str):
        relative = line.split()[0]  # the training list repeats the id behind it
        return videos / relative, number[relative.split("/")[0]]

    rows, bad = _rows(_lines(lists / f"{'train' if split == 'train' else 'test'}list{fold:02d}.txt"), parse)
    return rows, classes, bad


def _hmdb51(root: Path, split: str, fold: int) -> Rows:
    """Classes in the order of the alphabet, not of a directory listing."""
    files = sorted((root / "testTrainMulti_7030_splits").glob(f"*_test_split{fold}.txt"))
    classes = [file.name.removesuffix(f"_test_split{fold}.txt") for file in files]
    videos = next((f for f in (root / "hmdb51_org", root / "videos") if f.is_dir()), root)
    rows, bad = [], []
    for label, (file, name) in enumerate(zip(files, classes)):
        found, wrong = _rows(_lines(file), lambda line: (line.split()[0], int(line.split()[1])))
        wanted = 1 if split == "train" else 2  # 0: in neither
        rows += [(videos / name / video, label) for video, use in found if use == wanted]
        bad += wrong
    return rows, classes, bad


def _ssv1(root: Path, split: str, _fold: int) -> Rows:
    classes = _lines(root / "something-something-v1-labels.csv")
    number = {name: i for i, name in enumerate(classes)}
    frames = root / "20bn-something-something-v1"
    file = root / f"something-something-v1-{'train' if split == 'train' else 'validation'}.csv"

    def parse(line: str):
        video, label = line.split(";", 1)
        return frames / video, number[label]

    rows, bad = _rows(_lines(file), parse)
    return rows, classes, bad


def _kinetics(root: Path, split: str, _fold: int) -> Rows:
    with open(root / "annotations" / f"{split}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    classes = sorted({line["label"] for line in lines})
    number = {name: i for i, name in enumerate(classes)}
    flat = {p.stem: p for p in (root / split).iterdir() if p.suffix.lower() in SUFFIXES}

    def parse(line: dict[str, str]):
        name = f"{line['youtube_id']}_{int(line['time_start']):06d}_{int(line['time_end']):06d}"
        return flat.get(name, root / split / line["label"] / f"{name}.mp4"), number[line["label"]]

    rows, bad = _rows(lines, parse)
    return rows, classes, bad


def _list(root: Path, split: str, _fold: int) -> Rows:
    def parse(line: str):
        path, *_frames, label = line.rsplit(maxsplit=2 if re.search(r"\s\d+\s+\d+\s*$", line) else 1)
        return root / path, int(label)

    rows, bad = _rows(_lines(root / f"{split}.txt"), parse)
    names = root / "classes.txt"
    classes = _lines(names) if names.exists() else [str(i) for i in range(max((r[1] for r in rows), default=-1) + 1)]
    return rows, classes, bad


def _folders(root: Path, split: str, _fold: int) -> Rows:
    classes = sorted(p.name for p in (root / split).iterdir() if p.is_dir())
    rows = [
        (path, label) for label, name in enumerate(classes) for path in sorted((root / split / name).iterdir())
        if path.suffix.lower() in SUFFIXES or path.is_dir()
    ]
    return rows, classes, []


# Writing --------------------------------------------------------------------------------------------------


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int = 12) -> None:
    """Writes frames (H, W, 3), uint8 RGB, with even H and W: .mp4 as H.264, .avi as MPEG-4, .gif."""
    if path.suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in frames)
        first.save(path, save_all=True, append_images=rest, duration=1000 // fps, loop=0)
        return
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the same file every time
        stream.codec_context.qmax = 4 if path.suffix == ".avi" else stream.codec_context.qmax
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def main(folder: Path, /, check: int = 200) -> None:
    """Prints what a data folder holds and opens up to `check` evenly spread videos of each split."""
    for split in ("train", "val"):
        videos = open_videos(folder, split)
        counts = np.bincount(videos.labels, minlength=len(videos.classes))
        lengths, unreadable = [], []
        for i in tqdm(np.unique(np.linspace(0, len(videos) - 1, check).astype(int)), desc=f"opening {split}"):
            try:
                with open_video(videos.paths[i]) as video:
                    lengths.append(len(video))
            except OSError as error:
                unreadable.append(str(error))
        print(
            f"{split}: {len(videos):,} videos of {len(videos.classes)} classes, {counts.min()} to {counts.max()} a "
            f"class; {len(lengths)} opened, {min(lengths, default=0)} to {max(lengths, default=0)} frames; "
            f"{len(unreadable)} unreadable" + "".join(f"\n  {reason}" for reason in unreadable[:10])
        )


if __name__ == "__main__":
    import tyro

    from common import run

    run.main(lambda: tyro.cli(main))
