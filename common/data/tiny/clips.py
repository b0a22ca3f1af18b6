"""Short clips of a moving camera, labelled by its motion."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.tiny import written_once
from common.data.video import write_video

# Photographs that scikit-image and scikit-learn ship; those of one split never appear in the other.
PHOTOGRAPHS = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "coins.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
        "motorcycle_left.png", "retina.jpg", "rocket.jpg", "china.jpg", "moon.png",
    ),
    "val": ("chelsea.png", "coffee.png", "grass.png", "flower.jpg"),
}
# What the camera does in each frame: pixels right, pixels down, logarithm of the zoom, degrees counter-clockwise.
MOTIONS = {
    "PanLeft": (-1, 0, 0, 0), "PanRight": (1, 0, 0, 0), "TiltUp": (0, -1, 0, 0), "TiltDown": (0, 1, 0, 0),
    "ZoomIn": (0, 0, 0.02, 0), "ZoomOut": (0, 0, -0.02, 0), "RollLeft": (0, 0, 0, 2), "RollRight": (0, 0, 0, -2),
}
FRAMES, WIDTH, HEIGHT = 36, 80, 64
PER_CLASS = {"train": 36, "val": 12}


def clips(root: Path | None = None) -> Path:
    """Clips in UCF101's layout: 8 classes of camera motion, 36 training and 12 test clips each, 36 frames of 80x64.

    The camera moves over a photograph at half to twice its class's speed, and shakes. Training and test clips show
    other photographs, every class the same ones. Written once, to the cache unless `root` says otherwise. Returns the
    data folder.
    """

    def write(folder: Path) -> None:
        lists = folder / "ucfTrainTestlist"
        lists.mkdir()
        (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(MOTIONS, 1)))
        rng = np.random.default_rng(0)
        group = 0
        for split, names in PHOTOGRAPHS.items():
            photographs = [_photograph(name) for name in names]
            lines = []
            for label, motion in enumerate(MOTIONS, 1):
                (folder / "UCF-101" / motion).mkdir(parents=True, exist_ok=True)
                for i in range(PER_CLASS[split]):
                    which, clip = i % len(names), i // len(names) + 1
                    name = f"{motion}/v_{motion}_g{group + which + 1:02d}_c{clip:02d}.avi"
                    frames = list(_film(photographs[which], MOTIONS[motion], rng))
                    write_video(folder / "UCF-101" / name, frames, fps=25)
                    lines.append(f"{name} {label}\n" if split == "train" else f"{name}\n")
            (lists / f"{'train' if split == 'train' else 'test'}list01.txt").write_text("".join(lines))
            group += len(names)

    about = "Generated camera motion over photographs shipped with scikit-image and scikit-learn, in UCF101's layout."
    return written_once("clips", write, about, root)


def _photograph(name: str) -> np.ndarray:
    """(H, W, 3), its shorter side 96 px, mirrored around so that the camera may leave it."""
    for package in ("skimage.data", "sklearn.datasets.images"):
        file = resources.files(package) / name
        if file.is_file():
            with file.open("rb") as stream:
                image = Image.open(stream).convert("RGB")
            scale = 96 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
            return np.pad(np.asarray(image), ((150, 150), (150, 150), (0, 0)), "symmetric")
    raise FileNotFoundError(f"neither scikit-image nor scikit-learn ships {name}")


def _film(photograph: np.ndarray, motion: tuple[float, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Frames (HEIGHT, WIDTH, 3) of the camera's path, which passes the photograph's middle half way through."""
    image = Image.fromarray(photograph)
    speed = rng.uniform(0.5, 2)
    middle = np.array([image.width, image.height]) / 2 + rng.uniform(-15, 15, 2)
    phase, frequency = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.3, 0.8, 2)
    zoom = rng.uniform(0.8, 1.25)
    for t in range(FRAMES):
        right, down, log_zoom, degrees = np.multiply(motion, speed * (t - FRAMES / 2))
        angle = np.radians(degrees)
        shake = 0.7 * np.sin(phase + frequency * t)
        x, y = middle + (right, down) + shake
        scale = np.exp(-log_zoom) / zoom
        a, b = scale * np.cos(angle), scale * np.sin(angle)
        corner = x - a * WIDTH / 2 - b * HEIGHT / 2, y + b * WIDTH / 2 - a * HEIGHT / 2
        yield np.asarray(
            image.transform((WIDTH, HEIGHT), Image.AFFINE, (a, b, corner[0], -b, a, corner[1]), Image.BILINEAR)
        )
