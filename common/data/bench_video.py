"""Times the decoders of videos that a training could use, side by side, one thread each.

    python -m common.data.bench_video FOLDER...

Each folder is a set with figures of its own. The job is a training's: 16 frames at a random stride of 1 to 5 from a
random start of each file, opened for it; every turn the same clips for each decoder (common/run/bench.py). Decoders
that are not installed are left out and named. Only files are timed of which each gives the frames of a plain decode by
PyAV from the start: by number, up to the rounding of the colour conversion. What they do with damaged copies of the
files is tried as well. Result: a JSON and a Markdown file named after the hardware.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from common import run
from common.data.video import SLACK, SUFFIXES, VideoFile
from common.run import bench

Choose = Callable[[int], np.ndarray]  # number of frames -> which
Reader = Callable[[Path, Choose], np.ndarray]  # -> (n, H, W, 3) RGB
FRAMES, STRIDES = 16, (1, 2, 3, 4, 5)
RECORDS = Path(__file__).parent / "records"


def by_pyav(path: Path, choose: Choose) -> np.ndarray:
    with VideoFile(path) as video:
        return video.read(choose(len(video)))


def by_opencv(path: Path, choose: Choose) -> np.ndarray:
    """From the start, frame by frame: seeking by number is known to miss."""
    import cv2

    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not video.isOpened():
        raise OSError(f"OpenCV cannot open {path}")
    indices = choose(int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    wanted, found = set(indices.tolist()), {}
    for i in range(max(wanted) + 1):
        if not video.grab():
            break
        if i in wanted:
            found[i] = cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
    if not found or max(wanted) > max(found) + SLACK:
        raise OSError(f"OpenCV reads {path} up to frame {max(found, default=-1)} only")
    return np.stack([found.get(i, found[max(found)]) for i in indices.tolist()])


def by_decord(path: Path, choose: Choose) -> np.ndarray:
    import decord

    video = decord.VideoReader(str(path), num_threads=1)
    return video.get_batch(choose(len(video))).asnumpy()


def by_torchcodec(path: Path, choose: Choose) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    return video.get_frames_at(choose(len(video)).tolist()).data.numpy()


DECODERS: dict[str, Reader] = {
    "PyAV (ours)": by_pyav, "OpenCV": by_opencv, "decord": by_decord, "torchcodec": by_torchcodec,
}


def whole(path: Path) -> np.ndarray:
    """Every frame in the order in which PyAV's decoder gives them: what the others are held to."""
    import av

    with av.open(str(path), metadata_errors="replace") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def random_clip(rng: np.random.Generator) -> Choose:
    def choose(total: int) -> np.ndarray:
        stride = int(rng.choice(STRIDES))
        start = int(rng.integers(max(total - (FRAMES - 1) * stride, 1)))
        return (start + stride * np.arange(FRAMES)).clip(0, total - 1)

    return choose


def wrong(name: str, read: Reader, path: Path) -> str:
    """What is wrong with random clips that a decoder reads from a file; empty if nothing is."""
    frames = whole(path)
    chosen = [random_clip(np.random.default_rng(seed))(len(frames)) for seed in range(4)]
    ways = {
        "the plain decode": lambda: [blocks(frames[clip]) for clip in chosen],
        name: lambda: [blocks(read(path, lambda _total, clip=clip: clip)) for clip in chosen],
    }
    try:
        bench.check_parity(bench.Case(path.name, ways, tolerance=3 / 255))
    except Exception as error:  # whatever a decoder raises is what a training would meet
        return " ".join(str(error).split())[:160]
    return ""


def blocks(frames: np.ndarray) -> torch.Tensor:
    """Means over 16 x 16 px: decoders differ in how they round colours and spread them over pixels."""
    return F.avg_pool2d(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), 16, ceil_mode=True)


def reading(read: Reader, files: Sequence[Path]) -> Callable[[], None]:
    """A call reads one clip of every file, and the n-th call the same clips whoever reads."""
    rng = np.random.default_rng(0)

    def call() -> None:
        for path in files:
            read(path, random_clip(rng))

    return call


def damage(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """Copies of the files: cut in half, with a tenth of their bytes overwritten, empty."""
    rng, kinds = np.random.default_rng(0), {"cut in half": [], "a tenth overwritten": [], "empty": []}
    for kind, copies in kinds.items():
        for i, path in enumerate(files):
            data = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
            if kind == "cut in half":
                data = data[: len(data) // 2]
            elif kind == "empty":
                data = data[:0]
            else:
                part = slice(len(data) // 2, len(data) * 6 // 10)
                data[part] = rng.integers(256, size=part.stop - part.start)
            copy = folder / f"{kind.split()[-1]}_{i}{path.suffix}"
            copy.write_bytes(data.tobytes())
            copies.append(copy)
    return kinds


def survival(read: Reader, copies: Sequence[Path]) -> str:
    """What comes of reading all frames of damaged files: how many raise, how many give frames as if nothing were."""
    raised = 0
    for path in copies:
        try:
            read(path, lambda total: np.arange(total))
        except Exception:
            raised += 1
    return f"{raised} of {len(copies)}"


def measure(name: str, files: Sequence[Path], turns: int) -> dict[str, Any]:
    """Of one set of files: by decoder, what it reads rightly and what damage it notices; and their times."""
    rows: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        damaged = damage(files, Path(scratch))
        for decoder, read in DECODERS.items():
            try:
                read(files[0], lambda total: np.arange(1))
            except (ImportError, RuntimeError) as error:
                notes.append(f"{decoder} is not here: {str(error).strip().splitlines()[0]}")
                continue
            mistakes = {path: why for path in files if (why := wrong(decoder, read, path))}
            notes += [f"{decoder}: {why}" for why in mistakes.values()]
            rows[decoder] = {
                "right": [path for path in files if path not in mistakes],
                "raises": {kind: survival(read, copies) for kind, copies in damaged.items()},
            }
    common = [path for path in files if all(path in row["right"] for row in rows.values())]
    if not common:
        raise run.UserError(f"{name}: no file that all decoders read rightly: {'; '.join(notes)}")
    kinds = set()
    for path in common:
        with VideoFile(path) as video:
            kinds.add(f"{video.codec} {video.size[0]}x{video.size[1]}")
    case = bench.Case(f"{name}: {', '.join(sorted(kinds))}", {each: reading(DECODERS[each], common) for each in rows})
    about = {decoder: row | {"right": len(row["right"])} for decoder, row in rows.items()}
    # No seconds: one call a turn, for every decoder to read the same clips in it.
    counts = {"clips": len(common), "files": len(files), "decoders": about, "notes": notes}
    return bench.measure(case, 0, turns) | counts


def main(folders: tyro.conf.Positional[list[Path]], out: Path = RECORDS, turns: int = 20) -> None:
    """See the module's text."""
    load, records = os.getloadavg()[0], []
    bench.prepare(threads=1)
    for folder in folders:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise run.UserError(f"{folder} holds no videos: {', '.join(sorted(SUFFIXES))}")
        records.append(measure(folder.name, files, turns))
    text = page(records)
    print(text)
    stamp = f"one thread, {turns} turns, {', '.join(f'{k} {v}' for k, v in versions().items())}"
    about = ("Clips per second of CPU time, median of the turns; how many times faster than each decoder ours is, "
             "median and quartiles of the ratios turn by turn; how many damaged copies raise an error.")
    bench.write_record(out, "video_decoding", "cpu", records, text, stamp=stamp, load=load, explanation=about)


def versions() -> dict[str, str]:
    found = {}
    for package in ("av", "opencv-python-headless", "decord", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each set and decoder; below, what went wrong."""
    kinds = list(next(iter(records[0]["decoders"].values()))["raises"])
    lines = [f"| set | decoder | right files | clips/s | ours is faster by | {' | '.join(kinds)} |",
             "|---" * (5 + len(kinds)) + "|"]
    for record in records:
        for decoder, row in record["decoders"].items():
            high, middle, low = (1 / ratio for ratio in record["times_faster"][decoder])
            lines.append(
                f"| {record['case']} | {decoder} | {row['right']} of {record['files']} | "
                f"{record['clips'] / record['seconds'][decoder]:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
                f"{' | '.join(row['raises'].values())} |"
            )
    notes = dict.fromkeys(f"- {note}" for record in records for note in record["notes"])
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
