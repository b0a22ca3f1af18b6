"""Moving targets as a tracking set, in GOT-10k's layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.data.tiny import written_once

WIDTH, HEIGHT, FRAMES = 240, 180, 40
PATCH = 64  # px, side of an object before it is drawn
PHOTOS = {  # no photograph serves in both splits
    "train": ("astronaut", "brick", "camera", "coffee", "coins", "grass", "hubble_deep_field", "immunohistochemistry",
              "stereo_motorcycle", "china.jpg"),
    "val": ("chelsea", "rocket", "gravel", "retina", "flower.jpg"),
}
COUNTS = {"train": 24, "val": 6}  # scenes
META = """[METAINFO]
url: generated from the photographs {photos}
begin: 00:00:00
end: 00:00:04
anno_fps: 10Hz
object_class: patch
motion_class: moving
major_class: object
root_class: object
motion_adverb: smoothly
resolution: ({width}, {height})
"""


def sequences(root: Path | None = None) -> Path:
    """Discs and rounded squares cut from photographs, moving over other photographs: 60 training, 6 val.

    Each has 40 frames of 240x180: a panning background, a target that moves, turns, and changes size and brightness,
    one or two distractors, and in every third scene a bar that passes in front. In the 24 training scenes every object
    is the target of a sequence: which one to follow is then told by the template alone, not by a scene learned by
    heart. Boxes are exact, and clipped to the frame; absence and cover labels are computed from what is drawn. Written
    once in GOT-10k's layout (root/train, root/val), to the cache unless `root` says otherwise. Returns the data folder.
    """

    def write(folder: Path) -> None:
        for split, count in COUNTS.items():
            photos = {name: _photo(name) for name in PHOTOS[split]}
            names = [name for i in range(count) for name in _write_scene(folder / split, photos, i, split)]
            (folder / split / "list.txt").write_text("\n".join(names) + "\n", encoding="utf-8")

    about = "Generated: patches of photographs that scikit-image and scikit-learn ship, moving over other photographs."
    return written_once("sequences-60-6", write, about, root)


def hard_sequences(root: Path | None = None) -> Path:
    """The same scenes with what makes real targets hard, see `_harder`: they turn another side to the camera, come near
    and go away, and lose half of their width in turning. Same layout, counts and first frames."""

    def write(folder: Path) -> None:
        for split, count in COUNTS.items():
            photos = {name: _photo(name) for name in PHOTOS[split]}
            names = [name for i in range(count) for name in _write_scene(folder / split, photos, i, split, hard=True)]
            (folder / split / "list.txt").write_text("\n".join(names) + "\n", encoding="utf-8")

    about = "Generated: changing patches of photographs that scikit-image and scikit-learn ship, over others."
    return written_once("hard-sequences-60-6", write, about, root)


@dataclass(frozen=True)
class Thing:
    """A patch of a photograph under a soft superellipse |x/a|^k + |y/b|^k < 1, sides in units of the patch's."""

    pixels: np.ndarray  # (PATCH, PATCH, 4) float32: RGB and opacity
    a: float
    b: float
    k: float

    def corners(self) -> np.ndarray:
        """Points on its outline, around its centre, in units of the patch's side: (64, 2)."""
        t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        return np.stack([
            axis * np.sign(f(t)) * np.abs(f(t)) ** (2 / self.k) for axis, f in ((self.a, np.cos), (self.b, np.sin))
        ], -1)


def _photo(name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photo = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    photo = photo[0] if isinstance(photo, tuple) else photo  # the motorcycle comes with its right view and depths
    return np.ascontiguousarray(np.broadcast_to(photo[..., None], (*photo.shape, 3)) if photo.ndim == 2 else photo)


def _thing(photo: np.ndarray, rng: np.random.Generator) -> Thing:
    """The one with the most texture of some places in a photograph, cut out."""
    side = int(rng.integers(70, min(photo.shape[:2]) // 2))
    places = [[int(rng.integers(length - side)) for length in photo.shape[:2]] for _ in range(8)]
    squares = [photo[y : y + side, x : x + side] for y, x in places]
    rgb = cv2.resize(max(squares, key=np.std), (PATCH, PATCH), interpolation=cv2.INTER_AREA)
    aspect, k = math.exp(rng.uniform(-0.4, 0.4)), rng.uniform(2, 5)
    a, b = 0.45 * min(1, aspect), 0.45 * min(1, 1 / aspect)
    y, x = (np.mgrid[:PATCH, :PATCH] + 0.5) / PATCH - 0.5
    radius = (np.abs(x / a) ** k + np.abs(y / b) ** k) ** (1 / k)
    opacity = np.clip((1 - radius) * 12 + 0.5, 0, 1)
    return Thing(np.dstack([rgb, opacity]).astype(np.float32), a, b, k)


def _walk(rng: np.random.Generator, low: float, high: float, speed: float) -> np.ndarray:
    """A smooth random walk of FRAMES steps that turns around at its bounds."""
    velocity = np.empty(FRAMES)
    velocity[0] = speed * rng.choice([-1, 1])
    for i in range(1, FRAMES):
        velocity[i] = 0.9 * velocity[i - 1] + 0.45 * speed * rng.standard_normal()
    span = high - low
    return high - np.abs((rng.uniform(0, span) + np.cumsum(velocity)) % (2 * span) - span)


def _motion(rng: np.random.Generator, side: float, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """(FRAMES, 2, 3) matrices from the patch (center 0, side 1) to the frame, and (FRAMES,) brightness."""
    margin = 0.3 * side  # part of the thing may leave the frame, its centre never does
    x, y = (_walk(rng, margin, length - margin, speed) for length in (WIDTH, HEIGHT))
    size = side * np.exp(_walk(rng, -0.4, 0.4, 0.02))
    turn = _walk(rng, -0.5, 0.5, 0.03)
    cos, sin = size * np.cos(turn), size * np.sin(turn)
    return np.array([[cos, -sin, x], [sin, cos, y]]).transpose(2, 0, 1), np.exp(_walk(rng, -0.25, 0.25, 0.02))


def _draw(frame: np.ndarray, thing: Thing, matrix: np.ndarray, brightness: float) -> np.ndarray:
    """Draws into `frame`, (H, W, 3) float32; returns the opacity, (H, W)."""
    reach = np.abs(matrix[:, :2]).sum(1) / 2
    left, top = np.floor(matrix[:, 2] - reach).clip(0).astype(int)
    right, bottom = np.ceil(matrix[:, 2] + reach).clip((left, top), (WIDTH, HEIGHT)).astype(int)
    opacity = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    if right > left and bottom > top:
        # From pixel indices of the patch to pixel indices of this part of the frame; the matrix speaks of points.
        index = matrix.copy()
        index[:, :2] /= PATCH
        index[:, 2] += index[:, :2].sum(1) * (0.5 - PATCH / 2) - 0.5 - (left, top)
        layer = cv2.warpAffine(thing.pixels, index, (int(right - left), int(bottom - top)))
        part, opacity[top:bottom, left:right] = frame[top:bottom, left:right], layer[..., 3]
        part += layer[..., 3:] * (layer[..., :3] * brightness - part)
    return opacity


@dataclass(frozen=True)
class Moving:
    """A thing and its way: (FRAMES, 2, 3) matrices from the patch to the frame, and (FRAMES,) brightness."""

    thing: Thing
    places: np.ndarray
    lights: np.ndarray
    back: np.ndarray | None = None
    """(PATCH, PATCH, 4) like the thing's pixels: its other side"""
    turned: np.ndarray | None = None
    """(FRAMES,) share of the other side in what is seen"""

    def at(self, i: int) -> Thing:
        if self.back is None:
            return self.thing
        share = np.float32(self.turned[i])
        return replace(self.thing, pixels=(1 - share) * self.thing.pixels + share * self.back)


@dataclass(frozen=True)
class Scene:
    """All that happens, before a pixel of it is drawn."""

    background: np.ndarray
    """(H, W, 3) float32, larger than a frame."""
    middles: np.ndarray
    """(FRAMES, 2) x, y in it of the middle of what the camera sees."""
    objects: list[Moving]
    """The last one on top."""
    bar: Moving | None
    """Passes in front of all."""
    photos: list[str]
    """Names of those it is made of."""


def _harder(each: Moving, photo: np.ndarray, rng: np.random.Generator) -> Moving:
    """The same way of a thing whose look goes over into another part of its photograph and back, whose size changes up
    to twice as far, and whose width shrinks by up to half and grows again. In the first frame all is as it was."""
    other = _thing(photo, rng).pixels
    back = np.dstack([other[..., :3], each.thing.pixels[..., 3]])
    turned = np.sin(np.pi * np.arange(FRAMES) / rng.uniform(FRAMES, 2 * FRAMES)) ** 2
    nearer = np.exp(_walk(rng, -0.7, 0.7, 0.06))
    narrower = 1 - 0.45 * np.sin(np.pi * np.arange(FRAMES) / rng.uniform(0.7 * FRAMES, 1.5 * FRAMES)) ** 2
    places = each.places.copy()
    places[:, :, :2] *= (nearer / nearer[0])[:, None, None].clip(0.4, 1.8)
    places[:, :, 0] *= narrower[:, None]
    return replace(each, places=places, back=back, turned=turned)


def simulate(photos: dict[str, np.ndarray], number: int, split: str, hard: bool = False) -> Scene:
    """The scene of that number, from the photographs of its split."""
    rng = np.random.default_rng((list(COUNTS).index(split), number))
    names = [str(name) for name in rng.permutation(list(photos))]
    background = photos[names[0]]
    zoom = rng.uniform(1.2, 1.6) * max(WIDTH / background.shape[1], HEIGHT / background.shape[0])
    background = cv2.resize(background, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA).astype(np.float32)
    sides = zip(background.shape[1::-1], (WIDTH, HEIGHT))
    corners = np.stack([_walk(rng, 0, length - view, 1.0) for length, view in sides], axis=1)
    beside = [str(name) for name in rng.choice(names[1:], rng.integers(1, 3))]
    objects = [Moving(_thing(photos[name], rng), *_motion(rng, rng.uniform(30, 60), 2.0)) for name in beside]
    objects.append(Moving(_thing(photos[names[1]], rng), *_motion(rng, rng.uniform(36, 72), 2.5)))
    if hard:
        its = np.random.default_rng((list(COUNTS).index(split), number, 1))  # of its own: the scene stays
        objects = [_harder(each, photos[name], its) for each, name in zip(objects, (*beside, names[1]))]
    bar, used = None, [*names[:2], *beside]
    if number % 3 == 2:
        thing, (start, end) = _thing(photos[names[2]], rng), rng.permutation([-20, WIDTH + 20])
        places = [[[30.0, 0, x], [0, 2.0 * HEIGHT, HEIGHT / 2]] for x in np.linspace(start, end, FRAMES)]
        bar = Moving(thing, np.array(places), np.ones(FRAMES))
        used.append(names[2])
    middles = corners + ((WIDTH - 1) / 2, (HEIGHT - 1) / 2)
    return Scene(background, middles, objects, bar, list(dict.fromkeys(used)))


def render(scene: Scene, i: int) -> tuple[Image.Image, list[np.ndarray]]:
    """Frame i, and for each object, the topmost first, (H, W) how much of each pixel shows it."""
    frame = cv2.getRectSubPix(scene.background, (WIDTH, HEIGHT), scene.middles[i])
    opacities = [_draw(frame, each.at(i), each.places[i], each.lights[i]) for each in scene.objects]
    uncovered = np.ones((HEIGHT, WIDTH), dtype=np.float32)
    if scene.bar:
        uncovered = 1 - _draw(frame, scene.bar.thing, scene.bar.places[i], scene.bar.lights[i])
    shown = []
    for opacity in opacities[::-1]:
        shown.append(opacity * uncovered)
        uncovered = uncovered * (1 - opacity)
    return Image.fromarray(frame.clip(0, 255).round().astype(np.uint8)), shown


def labels(target: Moving, i: int, shown: np.ndarray) -> tuple[str, int, int, int]:
    """GOT-10k's rows for frame i: box x,y,w,h clipped to the frame, cover in eighths, absent, cut by the frame."""
    matrix = target.places[i]
    whole = target.thing.pixels[..., 3].sum() * np.linalg.det(matrix[:, :2]) / PATCH**2
    cover = round(8 * min(shown.sum() / whole, 1))
    outline = target.thing.corners() @ matrix[:, :2].T + matrix[:, 2]
    inside = outline.clip(0, (WIDTH, HEIGHT))
    box = ",".join(f"{v:.4f}" for v in (*inside.min(0), *np.ptp(inside, axis=0)))
    return box, cover, int(cover == 0), int((inside != outline).any())


def _write_scene(
    split_folder: Path, photos: dict[str, np.ndarray], number: int, split: str, hard: bool = False
) -> list[str]:
    """Writes the sequences of a scene, of its topmost object first, and returns their names."""
    scene = simulate(photos, number, split, hard)
    targets = scene.objects[::-1] if split == "train" else scene.objects[-1:]
    written = len(list(split_folder.glob("*"))) + 1
    folders = [split_folder / f"GOT-10k_{split.capitalize()}_{written + k:06d}" for k in range(len(targets))]
    for folder in folders:
        folder.mkdir(parents=True)
    rows = [[] for _ in targets]
    for i in range(FRAMES):
        picture, shown = render(scene, i)
        for folder, row, target, part in zip(folders, rows, targets, shown):
            picture.save(folder / f"{i + 1:08d}.jpg", quality=85)
            row.append(labels(target, i, part))
    about = META.format(photos=", ".join(scene.photos), width=WIDTH, height=HEIGHT)
    files = ("groundtruth.txt", "cover.label", "absence.label", "cut_by_image.label")
    for folder, row in zip(folders, rows):
        for file, column in zip(files, zip(*row)):
            (folder / file).write_text("\n".join(str(value) for value in column) + "\n", encoding="utf-8")
        (folder / "meta_info.ini").write_text(about, encoding="utf-8")
    return [folder.name for folder in folders]
