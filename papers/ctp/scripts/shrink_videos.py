"""Videos and folders of frames -> small AVIs and lists of them, for a recipe that must run on a CPU.

``python -m papers.ctp.scripts.shrink_videos OUT VIDEO...`` takes up to 150 frames of each, from the start,
with a shorter side of 48 px. Every fourth, in the order given, is held out. A list names each 16 times, a random clip
each time.
"""

import sys
from pathlib import Path

import numpy as np

from common.data.video import open_video, write_video
from papers.ctp.data import resize

FRAMES, SIDE_PX, TIMES = 150, 48, 16


def main(out: Path, sources: list[Path]) -> None:
    out.mkdir(parents=True)
    lists = {"train": [], "val": []}
    for i, source in enumerate(sources):
        name = f"{i:02d}.avi"
        with open_video(source) as video:
            parts = np.array_split(np.arange(min(len(video), FRAMES)), 10)
            frames = np.concatenate([resize(video.read(part), SIDE_PX) for part in parts if len(part)])
        write_video(out / name, frames[:, :, : frames.shape[2] // 2 * 2], fps=25)
        lists["val" if i % 4 == 3 else "train"].append(name)
    for split, names in lists.items():
        (out / f"{split}.txt").write_text("".join(f"{name} 0\n" for name in names * TIMES), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
