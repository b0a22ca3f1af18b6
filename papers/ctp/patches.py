"""The game's moves: boxes, trajectories, and patches pasted along them (the paper's synthetic trajectories and MRM).

What is random is drawn first (``draw_*``, `Motion`, `Patch`) and applied afterwards, so that any move can be replayed.

    P patches in a clip · T frames · K key frames · H, W rows and columns of a frame
    boxes (P, 4) and trajectories (P, T, 4) are left, top, right, bottom in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

# The numbers from here to SHAPE_PROBABILITIES are the authors' code's; tests/fixtures hold what they amount to.
SCALES = (16, 24, 28, 32, 48, 64)  # px, for frames of 112 px
RATIOS = (0.5, 0.67, 0.75, 1.0, 1.33, 1.5, 2.0)
PROFILES = {"uniform": lambda u: u, "accelerate": lambda u: u**2, "decelerate": lambda u: 1 - (1 - u) ** 2}
PROFILE_PROBABILITIES = (0.7, 0.15, 0.15)
KEY_FRAME_PROBABILITIES = (0.5, 0.3, 0.2)  # of none, one, two between the first frame and the last
LOG_SIZE_JITTER = 0.18  # largest change of the logarithms of a first box's width and height
SHAPES = ("rectangle", "ellipse", "rhombus")
SHAPE_PROBABILITIES = (0.5, 0.35, 0.15)


@dataclass(frozen=True)
class Game:
    """How the patches are made. Defaults are the paper's, for 16 frames of 112 x 112 pixels."""

    patches: int = 3
    scales: tuple[float, ...] = SCALES
    location_velocity: float = 3.0
    """Pixels per frame and axis that a centre moves at most between two key frames, on average."""
    size_velocity: float = 0.025
    """The same for the logarithms of width and height."""
    visible: float = 0.8
    """Probability of a patch to be seen in a frame; it always is in the first and in the one it was cut from."""


# Key frames -----------------------------------------------------------------------------------------------


def key_frames(frames: int, inner: int, jitter: Sequence[int]) -> np.ndarray:
    """Key frames (K,): the first, the last, and `inner` evenly spread ones, each moved by its `jitter`, if any."""
    gap = frames / (inner + 1)
    between = [int(gap * i) for i in range(1, inner + 1)]
    if len(jitter):
        between = [key + moved for key, moved in zip(between, jitter)]
    return np.unique([0, *between, frames - 1])


def draw_key_frames(
    rng: np.random.Generator, frames: int, probabilities: Sequence[float] = KEY_FRAME_PROBABILITIES
) -> np.ndarray:
    """Key frames (K,); `probabilities` are those of none, one, ... between the first frame and the last."""
    inner = int(rng.choice(len(probabilities), p=probabilities))
    reach = int(frames / (inner + 1) / 3)
    return key_frames(frames, inner, rng.integers(-reach, reach, inner) if reach else [])


def interpolate(keys: np.ndarray, values: np.ndarray, profiles: Sequence[str]) -> np.ndarray:
    """Values at key frames (K, ...) -> values at all frames (T, ...), each segment with its own profile."""
    values = np.asarray(values, dtype=np.float64)
    frames = [values[:1]]
    for start, end, before, after, profile in zip(keys, keys[1:], values, values[1:], profiles):
        u = PROFILES[profile](np.arange(1, end - start + 1) / (end - start))
        u = u.reshape(-1, *[1] * (values.ndim - 1))
        frames.append(before * (1 - u) + after * u)
    return np.concatenate(frames)


def draw_profiles(rng: np.random.Generator, keys: np.ndarray) -> list[str]:
    return list(rng.choice(list(PROFILES), len(keys) - 1, p=PROFILE_PROBABILITIES))


# Trajectories ---------------------------------------------------------------------------------------------


def anchors() -> np.ndarray:
    """Width and height of the first-frame boxes to choose from at scale 1, (ratios, 2)."""
    ratios = np.sqrt(RATIOS)
    return np.stack([ratios, 1 / ratios], 1)


def first_boxes(
    image_wh: tuple[int, int], scales: Sequence[float], anchor: Sequence[int], log_jitter_wh: np.ndarray,
    u_x: np.ndarray, u_y: np.ndarray,
) -> np.ndarray:
    """Boxes (P, 4) of the first frame. `anchor` counts scales within ratios; `u_x` and `u_y` place them, 0 to 1."""
    ratio, scale = np.divmod(anchor, len(scales))
    size = anchors()[ratio] * np.asarray(scales)[scale, None] * np.exp(log_jitter_wh)
    size = size.clip(1, np.subtract(image_wh, 1))
    corner = np.stack([u_x, u_y], 1) * (np.asarray(image_wh) - size)
    return np.concatenate([corner, corner + size], 1)


def draw_boxes(rng: np.random.Generator, image_wh: tuple[int, int], game: Game) -> np.ndarray:
    P = game.patches
    anchor = rng.integers(len(game.scales) * len(RATIOS), size=P)
    log_jitter_wh = rng.uniform(-LOG_SIZE_JITTER, LOG_SIZE_JITTER, (P, 2))
    return first_boxes(image_wh, game.scales, anchor, log_jitter_wh, rng.random(P), rng.random(P))


@dataclass(frozen=True)
class Motion:
    """How centres, or the logarithms of sizes, change: shared key frames, each patch its own steps."""

    keys: np.ndarray
    """(K,) frame numbers"""
    delta: np.ndarray
    """(K - 1, P, 2) change over each segment"""
    profiles: Sequence[str]
    """K - 1 of `PROFILES`"""


def draw_motion(rng: np.random.Generator, frames: int, patches: int, velocity: float) -> Motion:
    keys = draw_key_frames(rng, frames)
    reach = velocity * np.diff(keys)[:, None, None]
    return Motion(keys, rng.uniform(-1, 1, (len(keys) - 1, patches, 2)) * reach, draw_profiles(rng, keys))


def trajectories(boxes: np.ndarray, image_wh: tuple[int, int], location: Motion, size: Motion) -> np.ndarray:
    """Float trajectories (P, T, 4) of first-frame boxes (P, 4).

    A centre stays where a box of its first size fits into the image; a box that grew is cut at the border.
    """
    image = np.asarray(image_wh, dtype=np.float64)
    first = boxes[:, 2:] - boxes[:, :2]
    centers, sizes = [(boxes[:, :2] + boxes[:, 2:]) / 2], [first]
    for delta in location.delta:
        centers.append((centers[-1] + delta).clip(first / 2, image - first / 2))
    for delta in size.delta:
        sizes.append(sizes[-1] * np.exp(delta))
    center = interpolate(location.keys, centers, location.profiles)
    half = interpolate(size.keys, sizes, size.profiles) / 2
    moved = np.concatenate([center - half, center + half], -1).clip(0, np.tile(image, 2))
    return moved.swapaxes(0, 1)


def round_boxes(boxes: np.ndarray, image_wh: tuple[int, int]) -> np.ndarray:
    """Integer boxes inside the image (half rounds to even): what is pasted, and what is predicted."""
    return np.round(boxes).clip(0, np.tile(image_wh, 2)).astype(np.int64)


def draw_trajectories(rng: np.random.Generator, image_wh: tuple[int, int], frames: int, game: Game) -> np.ndarray:
    """Integer trajectories (P, T, 4) without empty boxes, which only unusual games would make: they are redrawn."""
    for _ in range(100):
        boxes = draw_boxes(rng, image_wh, game)
        location = draw_motion(rng, frames, game.patches, game.location_velocity)
        size = draw_motion(rng, frames, game.patches, game.size_velocity)
        drawn = round_boxes(trajectories(boxes, image_wh, location, size), image_wh)
        if (drawn[..., 2:] > drawn[..., :2]).all():
            return drawn
    raise ValueError(f"100 draws of {game} on {image_wh[0]}x{image_wh[1]} px gave an empty box each: larger scales?")


# Patches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    source: int
    """Frame it is cut from"""
    shape: str
    """One of `SHAPES`"""
    soft_from: float | None
    """Distance from the middle, in box sides, where a soft edge begins; None: a hard edge"""
    opacity: np.ndarray
    """(T,) 0 to 1"""
    visible: np.ndarray
    """(T,) bool; where it is not, the patch is still asked for: the masked region model"""


def draw_patch(rng: np.random.Generator, frames: int, game: Game) -> Patch:
    source = int(rng.integers(frames))
    keys = draw_key_frames(rng, frames)
    return Patch(
        source, str(rng.choice(SHAPES, p=SHAPE_PROBABILITIES)), rng.uniform(0.3, 0.45) if rng.random() < 0.5 else None,
        opacity_curve(keys, rng.uniform(0.8, 1, len(keys)), frames),
        visibility(rng.random(frames), source, game.visible),
    )


def opacity_curve(keys: np.ndarray, values: Sequence[float], frames: int) -> np.ndarray:
    return np.interp(np.arange(frames), keys, values)


def visibility(u: np.ndarray, source: int, probability: float = 0.8) -> np.ndarray:
    """(T,) bool from a uniform number for each frame."""
    u = np.array(u)
    u[[0, source]] = 0
    return u <= probability


def mask(width: int, height: int, shape: str, soft_from: float | None) -> np.ndarray:
    """Opaqueness (height, width) of a patch, float32 from 0 to 1."""
    dx = np.abs(np.arange(width) - (width - 1) // 2) / width
    dy = np.abs(np.arange(height) - (height - 1) // 2)[:, None] / height
    distance = {"rectangle": np.maximum, "ellipse": np.hypot, "rhombus": np.add}[shape](dx, dy)
    inside = np.ones_like(distance) if shape == "rectangle" else (distance < 0.5).astype(np.float64)
    if soft_from is not None:
        inside *= ((0.5 - distance) / (0.5 - soft_from)).clip(0, 1)
    return inside.astype(np.float32)


def alphas(patch: Patch, trajectory: np.ndarray) -> list[np.ndarray]:
    """The patch's opaqueness (h, w) in each frame, at its box's size there; hidden or not."""
    width, height = trajectory[patch.source, 2:] - trajectory[patch.source, :2]
    whole = mask(width, height, patch.shape, patch.soft_from)
    sizes = (trajectory[:, 2:] - trajectory[:, :2]).tolist()
    return [cv2.resize(whole, size) * opacity for size, opacity in zip(sizes, patch.opacity)]


def paste(frames: np.ndarray, trajectories_PT4: np.ndarray, patches: Sequence[Patch]) -> np.ndarray:
    """Frames (T, H, W, 3), uint8, with the patches in them: the largest first, so that small ones stay on top."""
    edited = frames.copy()
    sizes = (trajectories_PT4[..., 2:] - trajectories_PT4[..., :2]).mean(1)
    for p in np.argsort(-sizes.prod(1), kind="stable"):
        patch, boxes = patches[p], trajectories_PT4[p].tolist()
        left, top, right, bottom = boxes[patch.source]
        cut = frames[patch.source, top:bottom, left:right]
        for t, alpha in enumerate(alphas(patch, trajectories_PT4[p])):
            if not patch.visible[t]:
                continue
            left, top, right, bottom = boxes[t]
            under, alpha = edited[t, top:bottom, left:right], alpha[..., None].astype(np.float32)
            under[:] = under * (1 - alpha) + cv2.resize(cut, (right - left, bottom - top)) * alpha
    return edited


def play(rng: np.random.Generator, frames: np.ndarray, game: Game) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A game on frames (T, H, W, 3): the edited frames, trajectories (P, T, 4), and who is visible (P, T)."""
    T, H, W, _ = frames.shape
    paths = draw_trajectories(rng, (W, H), T, game)
    patches = [draw_patch(rng, T, game) for _ in range(game.patches)]
    return paste(frames, paths, patches), paths, np.stack([patch.visible for patch in patches])
