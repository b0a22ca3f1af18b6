"""Times the decoders of videos that a training could use, side by side, one thread each.

    python -m common.data.bench_video FOLDER

Two jobs: clips, as a training reads them (16 frames at a random stride of 1 to 5 from a random start of a random
file, opened for it), and whole files from end to end. Decoders that are not installed are left out and named. Before
anything is timed each must give the frames of a plain decode by PyAV from the file's start: by number, up to the
rounding of the colour conversion. What they do with damaged copies of the files is tried as well. Result: a JSON and
a Markdown file named after the hardware.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro

from common import run
from common.data.video import SLACK, SUFFIXES, VideoFile

Reader = Callable[[Path, Callable[[int], np.ndarray]], np.ndarray]  # (file, total -> indices) -> (n, H, W, 3) RGB
FRAMES, STRIDES = 16, (1, 2, 3, 4, 5)


def by_pyav(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    with VideoFile(path) as video:
        return video.read(choose(len(video)))


def by_opencv(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
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


def by_decord(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    import decord

    video = decord.VideoReader(str(path), num_threads=1)
    return video.get_batch(choose(len(video))).asnumpy()


def by_torchcodec(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
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


def random_clip(rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    def choose(total: int) -> np.ndarray:
        stride = int(rng.choice(STRIDES))
        start = int(rng.integers(max(total - (FRAMES - 1) * stride, 1)))
        return (start + stride * np.arange(FRAMES)).clip(0, total - 1)

    return choose


def agreement(read: Reader, files: Sequence[Path]) -> tuple[dict[str, float], dict[str, str]]:
    """By file name: mean absolute difference, in grey levels, of random clips from the true frames; and failures."""
    differences, failures = {}, {}
    for path in files:
        frames, asked = whole(path), []

        def choose(total: int, frames=frames, asked=asked) -> np.ndarray:
            asked.append(random_clip(np.random.default_rng(len(asked)))(min(total, len(frames))))
            return asked[-1]

        try:
            worst = 0.0
            for _ in range(4):
                got = read(path, choose)
                worst = max(worst, float(np.abs(got.astype(np.int16) - frames[asked[-1]]).mean()))
            differences[path.name] = worst
        except Exception as error:  # whatever a decoder raises is what a training would meet
            failures[path.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return differences, failures


def seconds(read: Reader, files: Sequence[Path], choose, rounds: int) -> tuple[float, int]:
    """Time for every file `rounds` times, and the frames that came back."""
    frames, began = 0, time.perf_counter()
    for _ in range(rounds):
        for path in files:
            frames += len(read(path, choose))
    return time.perf_counter() - began, frames


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


def main(folder: Path, /, out: Path = Path(__file__).parent / "records", rounds: int = 5) -> None:
    """See the module's text."""
    torch.set_num_threads(1)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise run.UserError(f"{folder} holds no videos: {', '.join(sorted(SUFFIXES))}")
    rows, left_out = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        damaged = damage(files, Path(scratch))
        for name, read in DECODERS.items():
            try:
                read(files[0], lambda total: np.arange(1))
            except (ImportError, RuntimeError) as error:
                left_out[name] = str(error).strip().splitlines()[0]
                continue
            differences, failures = agreement(read, files)
            right = [path for path in files if differences.get(path.name, np.inf) < 3]
            rows[name] = {
                "right": len(right), "wrong": {k: round(v, 2) for k, v in differences.items() if v >= 3},
                "failures": failures, "files": right,
                "damaged files that raise": {kind: survival(read, copies) for kind, copies in damaged.items()},
            }
    common = [path for path in files if all(path in row["files"] for row in rows.values())]
    for name, row in rows.items():
        row.pop("files")
        rng = np.random.default_rng(0)
        seconds(DECODERS[name], common, random_clip(rng), 1)  # warm
        spent, _ = seconds(DECODERS[name], common, random_clip(rng), rounds)
        row["clips per second"] = rounds * len(common) / spent
        spent, frames = seconds(DECODERS[name], common, lambda total: np.arange(total), 1)
        row["frames per second, whole files"] = frames / spent
    versions = {k: run.environment()["packages"].get(k) for k in ("av", "opencv-python-headless", "torch")}
    about = {
        "videos": len(files), "timed on": [path.name for path in common], "rounds": rounds, "rows": rows,
        "left out": left_out, "versions": versions, "hardware": run.hardware(), "git": run.git_revision(),
        "time": run.environment()["time"],
    }
    stem = out / ("video_decoding_" + re.sub(r"[^a-z0-9]+", "_", run.hardware().lower()).strip("_"))
    run.write_json(stem.with_suffix(".json"), about)
    stem.with_suffix(".md").write_text(page(about))
    print(page(about))


def page(about: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [
        "`.venv/bin/python -m common.data.video_bench FOLDER`", "",
        f"{about['hardware']}, one thread, {about['videos']} videos, of which the {len(about['timed on'])} that every "
        f"decoder reads rightly are timed; {versions}; revision {about['git']}, {about['time']}", "",
        "| decoder | right files | clips/s | frames/s, whole files | error when cut in half | a tenth overwritten "
        "| empty |",
        "|---" * 7 + "|",
    ]
    for name, row in about["rows"].items():
        raised = row["damaged files that raise"]
        lines.append(
            f"| {name} | {row['right']} of {about['videos']} | {row['clips per second']:.1f} | "
            f"{row['frames per second, whole files']:.0f} | {' | '.join(raised.values())} |"
        )
    notes = [f"- {name} is not here: {reason}" for name, reason in about["left out"].items()]
    for name, row in about["rows"].items():
        notes += [f"- {name} gives other frames than asked for: {k}, {v} levels off" for k, v in row["wrong"].items()]
        notes += [f"- {name} fails on {k}: {v}" for k, v in row["failures"].items()]
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
