"""Sequences to test trackers on."""

import numpy as np
from PIL import Image

from common.data import tracking as data


def make_sequences(folder, lengths=(5, 9, 7), dataset="got10k", **more):
    """A textured square moving 2, 1 px a frame over another texture."""
    rng, sequences = np.random.default_rng(0), []
    for k, count in enumerate(lengths):
        (folder / f"s{k}").mkdir(parents=True)
        ground, square = (rng.integers(0, 255, (n, m, 3), dtype=np.uint8) for n, m in ((60, 80), (16, 20)))
        boxes = np.array([[10 + 2 * i, 12 + i, 20, 16] for i in range(count)], float)
        frames = [folder / f"s{k}" / f"{i}.png" for i in range(count)]
        for path, (x, y, w, h) in zip(frames, boxes.astype(int)):
            picture = ground.copy()
            picture[y:y + h, x:x + w] = square
            Image.fromarray(picture).save(path)
        sequences.append(data.Sequence(f"s{k}", dataset, frames, boxes, np.ones(count, bool), **more))
    return sequences
