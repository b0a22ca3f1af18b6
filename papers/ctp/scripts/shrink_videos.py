"""Videos and folders of frames -> small AVIs and lists of them, for a recipe that must run on a CPU.

    .venv/bin/python -m papers.ctp.scripts.shrink_videos OUT VIDEO... [--val VIDEO...] [--times 16]

takes up to 150 frames of each, from the start, with a shorter side of 48 px. Held out is what stands after --val, or
else every fourth, in the order given. A list names each so many times, a random clip each time.
"""

from pathlib import Path

import numpy as np
import tyro

from common import run
from common.data import loader
from common.data.video import open_video, write_video
from papers.ctp.data import resize

FRAMES, SIDE_PX = 150, 48


def main(out: Path, sources: tuple[Path, ...], /, val: tuple[Path, ...] = (), times: int = 16) -> None:
    if not val and len(sources) < 4:
        raise run.UserError(f"{len(sources)} sources, and every fourth is held out: give four, or name such with --val")
    out.mkdir(parents=True)
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for i, source in enumerate(loader.progress([*sources, *val], out)):
        name = f"{i:02d}.avi"
        with open_video(source) as video:
            parts = np.array_split(np.arange(min(len(video), FRAMES)), 10)
            frames = np.concatenate([resize(video.read(part), SIDE_PX) for part in parts if len(part)])
        write_video(out / name, frames[:, :, : frames.shape[2] // 2 * 2], fps=25)
        held_out = i >= len(sources) if val else i % 4 == 3
        lists["val" if held_out else "train"].append(name)
    for split, names in lists.items():
        (out / f"{split}.txt").write_text("".join(f"{name} 0\n" for name in names * times), encoding="utf-8")
        print(f"{out / split}.txt: {len(names)} videos, {times} times each")


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
