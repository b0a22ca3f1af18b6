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
    "PanLeft": (-0.6, 0, 0, 0), "PanRight": (0.6, 0, 0, 0), "TiltUp": (0, -0.6, 0, 0), "TiltDown": (0, 0.6, 0, 0),
    "ZoomIn": (0, 0, 0.02, 0), "ZoomOut": (0, 0, -0.02, 0), "RollLeft": (0, 0, 0, 2), "RollRight": (0, 0, 0, -2),
}
FRAMES, WIDTH, HEIGHT = 36, 48, 40
PER_CLASS = {"train": 36, "val": 12}
WALL = 240  # px, its side


def clips(root: Path | None = None) -> Path:
    """Clips in UCF101's layout: 8 classes of camera motion, 36 training and 12 test clips each, 36 frames of 48x40.

    The camera moves over a dark wall with pieces of a photograph on it, at half to twice its class's speed, and
    shakes. Training and test clips show other photographs, every class the same ones. Written once, to the cache
    unless `root` says otherwise. Returns the data folder.
    """

    def write(folder: Path) -> None:
        lists = folder / "ucfTrainTestlist"
        lists.mkdir()
        classes = "".join(f"{i} {name}\n" for i, name in enumerate(MOTIONS, 1))
        (lists / "classInd.txt").write_text(classes, encoding="utf-8")
        rng = np.random.default_rng(0)
        group = 0
        for split, names in PHOTOGRAPHS.items():
            walls = [_wall(_photograph(name), rng) for name in names]
            lines = []
            for label, motion in enumerate(MOTIONS, 1):
                (folder / "UCF-101" / motion).mkdir(parents=True, exist_ok=True)
                for i in range(PER_CLASS[split]):
                    which, clip = i % len(names), i // len(names) + 1
                    name = f"{motion}/v_{motion}_g{group + which + 1:02d}_c{clip:02d}.avi"
                    frames = list(_film(walls[which], MOTIONS[motion], rng))
                    write_video(folder / "UCF-101" / name, frames, fps=25)
                    lines.append(f"{name} {label}\n" if split == "train" else f"{name}\n")
            name = "trainlist01.txt" if split == "train" else "testlist01.txt"
            (lists / name).write_text("".join(lines), encoding="utf-8")
            group += len(names)

    about = "Generated camera motion over pieces of scikit-image's and scikit-learn's photographs, in UCF101's layout."
    return written_once("clips_48x40", write, about, root)


def _photograph(name: str) -> np.ndarray:
    """(H, W, 3), its shorter side 96 px."""
    for package in ("skimage.data", "sklearn.datasets.images"):
        file = resources.files(package) / name
        if file.is_file():
            with file.open("rb") as stream:
                image = Image.open(stream).convert("RGB")
            scale = 96 / min(image.size)
            return np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    raise FileNotFoundError(f"neither scikit-image nor scikit-learn ships {name}")


def _wall(photograph: np.ndarray, rng: np.random.Generator, pitch: int = 12) -> Image.Image:
    """Discs and squares cut from a photograph, each made about as bright as the others, on a dark wall."""
    wall = np.full((WALL, WALL, 3), 20, np.uint8)
    for corner in np.ndindex(WALL // pitch, WALL // pitch):
        side = int(rng.integers(7, 12))
        y, x = (pitch * i + int(rng.integers(max(pitch - side, 1))) for i in corner)
        top, left = (int(rng.integers(length - side)) for length in photograph.shape[:2])
        piece = photograph[top : top + side, left : left + side].astype(np.float64)
        piece *= rng.uniform(120, 220) / max(piece.mean(), 1)
        distance = np.hypot(*(np.mgrid[:side, :side] - (side - 1) / 2))
        inside = distance < (side / 2 if rng.random() < 0.5 else side)
        wall[y : y + side, x : x + side][inside] = piece.clip(0, 255)[inside]
    return Image.fromarray(wall)


def _film(wall: Image.Image, motion: tuple[float, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Frames (HEIGHT, WIDTH, 3) of the camera's path, which passes the wall's middle half way through."""
    speed = rng.uniform(0.5, 2)
    middle = WALL / 2 + rng.uniform(-15, 15, 2)
    phase, frequency = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.3, 0.8, 2)
    zoom = rng.uniform(0.8, 1.25)
    for t in range(FRAMES):
        right, down, log_zoom, degrees = np.multiply(motion, speed * (t - FRAMES / 2))
        angle = np.radians(degrees)
        shake = 0.4 * np.sin(phase + frequency * t)
        x, y = middle + (right, down) + shake
        scale = np.exp(-log_zoom) / zoom
        a, b = scale * np.cos(angle), scale * np.sin(angle)
        corner = x - a * WIDTH / 2 - b * HEIGHT / 2, y + b * WIDTH / 2 - a * HEIGHT / 2
        yield np.asarray(
            wall.transform((WIDTH, HEIGHT), Image.AFFINE, (a, b, corner[0], -b, a, corner[1]), Image.BILINEAR)
        )
