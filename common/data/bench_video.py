"""Times the decoders of videos that a training could use, side by side, one thread each.

    python -m common.data.bench_video FOLDER...

Each folder is a set with figures of its own. The job is a training's: 16 frames at a random stride of 1 to 5 from a
random start of a random file, opened for it. The decoders take turns, every turn the same clips for each, and what is
reported beside clips per second is the ratio within turns. Decoders that are not installed are left out and named.
Before anything is timed each must give the frames of a plain decode by PyAV from the file's start: by number, up to
the rounding of the colour conversion. What they do with damaged copies of the files is tried as well. Result: a JSON
and a Markdown file named after the hardware.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import run
from common.data.video import SLACK, SUFFIXES, VideoFile

Reader = Callable[[Path, Callable[[int], np.ndarray]], np.ndarray]  # (file, total -> indices) -> (n, H, W, 3) RGB
FRAMES, STRIDES = 16, (1, 2, 3, 4, 5)
RECORDS = Path(__file__).parent / "records"


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


def turn(read: Reader, files: Sequence[Path], seed: int) -> float:
    """Clips per second of CPU time, one of every file: other work on the machine counts less than by the clock."""
    choose, began = random_clip(np.random.default_rng(seed)), time.process_time()
    for path in files:
        read(path, choose)
    return len(files) / (time.process_time() - began)


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


def measure(files: Sequence[Path], rounds: int) -> dict:
    """Of one set of files: by decoder, what it reads rightly, what damage it notices, and its speed."""
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
            rows[name] = {
                "right": [path.name for path in files if differences.get(path.name, np.inf) < 3],
                "wrong": {k: round(v, 2) for k, v in differences.items() if v >= 3}, "failures": failures,
                "damaged files that raise": {kind: survival(read, copies) for kind, copies in damaged.items()},
            }
    common = [path for path in files if all(path.name in row["right"] for row in rows.values())]
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for number in tqdm(range(rounds + 1), desc="turns"):
        for name in sorted(rows, key=lambda name: (list(rows).index(name) + number) % len(rows)):
            speeds[name].append(turn(DECODERS[name], common, number))
    ours = np.array(speeds["PyAV (ours)"][1:])  # the first is a warm-up
    for name, row in rows.items():
        row["clips per second"] = float(np.median(speeds[name][1:]))
        row["ours is faster by"] = np.quantile(ours / speeds[name][1:], [0.25, 0.5, 0.75]).round(3).tolist()
    kinds = set()
    for path in common:
        with VideoFile(path) as video:
            kinds.add(f"{video.codec} {video.size[0]}x{video.size[1]}")
    return {"timed on": [path.name for path in common], "kinds": sorted(kinds), "rows": rows, "left out": left_out}


def main(folders: tyro.conf.Positional[list[Path]], out: Path = RECORDS, rounds: int = 20) -> None:
    """See the module's text."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    sets = {}
    for folder in folders:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise run.UserError(f"{folder} holds no videos: {', '.join(sorted(SUFFIXES))}")
        sets[folder.name] = measure(files, rounds)
    about = {
        "sets": sets, "rounds": rounds, "versions": versions(), "hardware": run.hardware(), "git": run.git_revision(),
        "time": run.environment()["time"],
    }
    stem = out / ("video_decoding_" + re.sub(r"[^a-z0-9]+", "_", run.hardware().lower()).strip("_"))
    run.write_json(stem.with_suffix(".json"), about)
    stem.with_suffix(".md").write_text(page(about), encoding="utf-8")
    print(page(about))


def versions() -> dict[str, str]:
    found = {}
    for package in ("av", "opencv-contrib-python-headless", "decord", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def page(about: dict) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [
        f"`.venv/bin/python -m common.data.bench_video {' '.join(about['sets'])}`", "",
        f"{about['hardware']}, one thread, {about['rounds']} turns, CPU time; {packages}; revision {about['git']}, "
        f"{about['time']}. Ratios are medians over the turns, with quartiles.", "",
        "| set | decoder | right files | clips/s | ours is faster by | error when cut in half | a tenth overwritten "
        "| empty |",
        "|---" * 8 + "|",
    ]
    notes = []
    for name, found in about["sets"].items():
        label = f"{name}: {', '.join(found['kinds'])}"
        for decoder, row in found["rows"].items():
            low, middle, high = row["ours is faster by"]
            total = len(row["right"]) + len(row["wrong"]) + len(row["failures"])
            raised = " | ".join(row["damaged files that raise"].values())
            lines.append(
                f"| {label} | {decoder} | {len(row['right'])} of {total} | {row['clips per second']:.1f} | "
                f"{middle:.2f} ({low:.2f} to {high:.2f}) | {raised} |"
            )
            notes += [f"- {decoder} gives other frames of {k}: {v} levels off" for k, v in row["wrong"].items()]
            notes += [f"- {decoder} fails on {k}: {v}" for k, v in row["failures"].items()]
        notes += [f"- {decoder} is not here: {reason}" for decoder, reason in found["left out"].items()]
    return "\n".join([*lines, "", *dict.fromkeys(notes), ""])


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
