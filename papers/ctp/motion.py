"""What a backbone as it stands knows of motion, told by linear classifiers: clips whose motion is made, over frames of
real videos, so that no frame by itself says which class it belongs to.

    camera     a window moves over a still frame: where to, how fast
    object     a piece of another video moves over a still frame: where to, how fast
    order      clips of the videos as they are: in order, or with their frames shuffled
    shuffled   camera and object again, with the frames of every clip shuffled: the direction that can still be told is
               no motion. The line it runs along can be, so that 50 % is the most.

    n clips · T frames · S side of the square
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common import run
from common.data import loader
from common.data.video import Videos, open_video
from common.run import World
from papers.ctp import data
from papers.ctp.model import Backbone, pool
from papers.ctp.recipes import Recipe

DIRECTIONS = 8
TRAVEL = (0.12, 0.24, 0.48)  # shares of the side that are passed in a clip, the speeds
PIECE = (0.3, 0.4)  # shares of the side that a moving piece is wide
COUNTS = {"train": 1200, "val": 600}


class Task(NamedTuple):
    """Clips (n, T, S, S, 3), uint8, and the labels (n) of what is asked of them."""

    clips: np.ndarray
    labels: dict[str, np.ndarray]


def tasks(videos: Videos, recipe: Recipe, count: int, seed: int) -> list[Task]:
    """All clips made of a split's videos; the same for the same seed."""
    rng = np.random.default_rng(seed)
    made: dict[str, list[np.ndarray]] = {"camera": [], "object": [], "order": []}
    direction, speed, disorder = (rng.integers(most, size=count) for most in (DIRECTIONS, len(TRAVEL), 2))
    for i in loader.progress(range(count), "motions"):
        clip, still, other = _frames(videos, rng, recipe)
        path = draw_path(rng, int(direction[i]), int(speed[i]), recipe)
        made["camera"].append(camera(rng, still, path, recipe))
        made["object"].append(moving_piece(rng, still, other, path, recipe))
        made["order"].append(shuffled(rng, clip) if disorder[i] else clip)
    stacked = {name: np.stack(clips) for name, clips in made.items()}
    return [
        Task(stacked["camera"], {"camera_direction": direction, "camera_speed": speed}),
        Task(stacked["object"], {"object_direction": direction, "object_speed": speed}),
        Task(stacked["order"], {"order": disorder}),
        *(Task(np.stack([shuffled(rng, clip) for clip in stacked[name]]), {f"{name}_shuffled": direction})
          for name in ("camera", "object")),
    ]


def _frames(videos: Videos, rng: np.random.Generator, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A clip (T, S, S, 3) of some video, a frame of it as it is (H, W, 3), and one of another video."""
    first, second = (int(i) for i in rng.choice(len(videos), 2, replace=False))
    with open_video(videos.paths[first]) as video:
        frames = video.read(data.draw_clip(rng, len(video), recipe.frames, recipe.strides))
    with open_video(videos.paths[second]) as video:
        other = video.read([int(rng.integers(len(video)))])[0]
    clip = data.center_crop(data.resize(frames, recipe.size_px), recipe.size_px)
    return clip, frames[0], other


def draw_path(rng: np.random.Generator, direction: int, speed: int, recipe: Recipe) -> np.ndarray:
    """(T, 2) px right and down of the middle of the way; about in its direction, about at its speed."""
    angle = 2 * np.pi / DIRECTIONS * (direction + rng.uniform(-0.25, 0.25))
    travel = recipe.size_px * TRAVEL[speed] * rng.uniform(0.85, 1.15)
    way = np.linspace(-0.5, 0.5, recipe.frames)[:, None]
    return way * travel * np.array([np.cos(angle), np.sin(angle)])


def camera(rng: np.random.Generator, still: np.ndarray, path_T2: np.ndarray, recipe: Recipe) -> np.ndarray:
    """(T, S, S, 3): what a window sees that follows the path over a frame shown at twice its size."""
    S = recipe.size_px
    frame = data.resize(still[None], 2 * S)[0]
    middle = _place(rng, path_T2, (S, S), frame.shape[1::-1])
    return np.stack([cv2.getRectSubPix(frame, (S, S), tuple(center.tolist())) for center in middle])


def moving_piece(
    rng: np.random.Generator, still: np.ndarray, other: np.ndarray, path_T2: np.ndarray, recipe: Recipe
) -> np.ndarray:
    """(T, S, S, 3): an elliptical piece of `other` that follows the path over `still`."""
    S = recipe.size_px
    ground, source = (data.resize(frame[None], S) for frame in (still, other))
    ground, source = (data.center_crop(frame, S)[0] for frame in (ground, source))
    w, h = (round(S * side) for side in rng.uniform(*PIECE, 2))
    x, y = (int(rng.integers(S - side + 1)) for side in (w, h))
    piece = np.ascontiguousarray(source[y : y + h, x : x + w])
    mask = (np.hypot(*np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h))) <= 1).astype(np.float32)
    frames = []
    for left, top in _place(rng, path_T2, (w, h), (S, S)) - (w / 2, h / 2):
        move = np.array([[1, 0, left], [0, 1, top]])
        alpha = cv2.warpAffine(mask, move, (S, S))[..., None]
        shown = cv2.warpAffine(piece, move, (S, S), borderMode=cv2.BORDER_REPLICATE)
        frames.append(np.rint(ground * (1 - alpha) + shown * alpha).astype(np.uint8))
    return np.stack(frames)


def _place(
    rng: np.random.Generator, path_T2: np.ndarray, size_wh: tuple[int, int], room_wh: tuple[int, int]
) -> np.ndarray:
    """Centers (T, 2) of something of that size that follows the path somewhere in a room, all of it inside."""
    low = np.divide(size_wh, 2) - path_T2.min(0)
    high = np.subtract(room_wh, np.divide(size_wh, 2)) - path_T2.max(0)
    return path_T2 + rng.uniform(low, np.maximum(low, high))


def shuffled(rng: np.random.Generator, clip: np.ndarray) -> np.ndarray:
    """Its frames in any order but their own and its reverse."""
    order = np.arange(len(clip))
    while (np.diff(order) == 1).all() or (np.diff(order) == -1).all():
        order = rng.permutation(len(clip))
    return clip[order]


# Scores ---------------------------------------------------------------------------------------------------


def features(backbone: Backbone, clips: np.ndarray, world: World) -> np.ndarray:
    """(n, C)"""
    rows = []
    with torch.inference_mode():
        for start in range(0, len(clips), 32):
            batch = torch.stack([data.tensor(clip) for clip in clips[start : start + 32]]).to(world.device)
            with world.autocast():
                maps = backbone(batch.contiguous(memory_format=torch.channels_last_3d))
            rows.append(pool(maps.float()).cpu())
    return torch.cat(rows).numpy()


def scores(backbone: Backbone, known: Mapping[str, list[Task]], world: World) -> dict[str, float]:
    """Accuracy in percent of a linear classifier of each label, taught on the tasks of "train", scored on "val"."""
    backbone.to(world.device, memory_format=torch.channels_last_3d).eval()
    found = {}
    for teaching, asking in zip(known["train"], known["val"], strict=True):
        x, x_val = (features(backbone, task.clips, world) for task in (teaching, asking))
        for name, labels in teaching.labels.items():
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, labels)
            found[name] = 100 * classifier.score(x_val, asking.labels[name])
    return found


def both_splits(train: Videos, val: Videos, recipe: Recipe, world: World) -> dict[str, list[Task]]:
    """What `scores` asks for: clips of the training split's videos to teach with, and of the others to score on."""
    if world.is_main:
        print(f"{sum(COUNTS.values()):,} clips of each motion made of {len(train)} and {len(val)} videos")
    splits = {"train": train, "val": val}
    return {name: tasks(videos, recipe, COUNTS[name], seed=i) for i, (name, videos) in enumerate(splits.items())}


def untrained(recipe: Recipe, seed: int) -> Backbone:
    run.seed_all(seed)
    return Backbone(recipe.backbone, width=recipe.width)
