"""From a video to what a network is fed: which frames, which part of them, in which colours.

    N clips of a video · T frames of a clip · H, W rows and columns; frames are (T, H, W, 3), RGB
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from common.data.video import Clips, FrameFolder, VideoFile, Videos
from common.run import UserError
from papers.ctp import baselines, patches
from papers.ctp.recipes import Recipe

MEAN, STD = np.float32(IMAGENET_DEFAULT_MEAN), np.float32(IMAGENET_DEFAULT_STD)
Video = VideoFile | FrameFolder
Generator = np.random.Generator
cv2.setNumThreads(0)  # loading processes are as many as there are cores

# Frames ---------------------------------------------------------------------------------------------------


def clip_indices(total: int, frames: int, stride: int, start: int, jitter: np.ndarray | int = 0) -> np.ndarray:
    """Frame numbers of a clip of a video of `total` frames, whose last frame repeats where it is too short."""
    return (start + stride * np.arange(frames) + jitter).clip(0, total - 1)


def draw_clip(
    rng: Generator, total: int, frames: int, strides: Sequence[int], *, jitter: bool = False
) -> np.ndarray:
    """Frame numbers of a clip at a stride, start and, with `jitter`, place within each stride chosen at random."""
    stride = int(rng.choice(strides))
    start = int(rng.integers(max(total - (frames - 1) * stride, 1)))
    return clip_indices(total, frames, stride, start, rng.integers(stride, size=frames) if jitter else 0)


def spread_clips(total: int, clips: int, frames: int, stride: int) -> np.ndarray:
    """Frame numbers (clips, frames) of evenly spread clips: the test protocol."""
    room = total - frames * stride + 1
    starts = [0] * clips
    if room > 0:
        starts = [int(room / (2 * clips) + i * room / clips) for i in range(clips)]
    return np.stack([clip_indices(total, frames, stride, start) for start in starts])


# Pixels ---------------------------------------------------------------------------------------------------


def resize(frames: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Bilinear, to a shorter side, or to a width and height, which change places for frames on end."""
    H, W = frames.shape[-3:-1]
    if isinstance(size, int):
        scale = size / min(H, W)
        wide = (int(W * scale + 0.5), int(H * scale + 0.5))
    else:
        wide = size if W >= H else size[::-1]
    return np.stack([cv2.resize(frame, wide) for frame in frames])


def crop(frames: np.ndarray, size: int, x: int, y: int) -> np.ndarray:
    return frames[:, y : y + size, x : x + size]


def center_crop(frames: np.ndarray, size: int) -> np.ndarray:
    H, W = frames.shape[1:3]
    return crop(frames, size, (W - size) // 2, (H - size) // 2)


def flip(frames: np.ndarray) -> np.ndarray:
    return frames[:, :, ::-1]


def hue_saturation(frames: np.ndarray, hue: float, saturation: float) -> np.ndarray:
    """uint8 -> uint8. `hue` is added in OpenCV's units, 0 to 179, and clipped, not wrapped, as the authors' does."""
    T, H, W, _ = frames.shape
    hsv = cv2.cvtColor(np.ascontiguousarray(frames).reshape(T * H, W, 3), cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + hue).clip(0, 179)
    hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 255)
    return cv2.cvtColor(np.round(hsv).astype(np.uint8), cv2.COLOR_HSV2RGB).reshape(T, H, W, 3)


def brightness(frames: np.ndarray, offset: np.ndarray | float) -> np.ndarray:
    """Float, 0 to 255; one offset for all frames or one each."""
    return (frames + np.float32(offset).reshape(-1, 1, 1, 1)).clip(0, 255)


def contrast(frames: np.ndarray, factor: np.ndarray | float) -> np.ndarray:
    """Float, 0 to 255; one factor for all frames or one each."""
    return (frames * np.float32(factor).reshape(-1, 1, 1, 1)).clip(0, 255)


def tensor(frames: np.ndarray) -> torch.Tensor:
    """(T, H, W, 3), 0 to 255 -> (3, T, H, W), normalised with ImageNet's statistics."""
    clip = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float()
    scale, offset = (torch.from_numpy(v).view(3, 1, 1, 1) for v in (1 / (255 * STD), MEAN / STD))
    return clip.mul_(scale).sub_(offset)


# Augmentation ---------------------------------------------------------------------------------------------


def short_side_size(recipe: Recipe, short_side_px: int) -> int | tuple[int, int]:
    """What `resize` is asked for: the shorter side, or without `keep_aspect` a width and height of 4:3."""
    return short_side_px if recipe.keep_aspect else (round(short_side_px * 4 / 3), short_side_px)


def random_crop(rng: Generator, frames: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Size, square and flip, the same for all frames."""
    frames = resize(frames, short_side_size(recipe, int(rng.choice(recipe.short_sides_px))))
    H, W = frames.shape[1:3]
    x, y = rng.integers(W - recipe.size_px + 1), rng.integers(H - recipe.size_px + 1)
    frames = crop(frames, recipe.size_px, int(x), int(y))
    return flip(frames) if rng.random() < recipe.flip else frames


def random_path(
    rng: Generator, frames: int, most: float, moves: bool, map: Callable[[Any], np.ndarray] = np.asarray
) -> np.ndarray:
    """`map` of a value between -most and most: one for all frames, or, if it `moves`, one for each of them.

    Then two or three frames are given random values, and the others lie between what `map` makes of those.
    """
    if not moves:
        return map(rng.uniform(-most, most))
    keys = patches.draw_key_frames(rng, frames, (0.7, 0.3))
    return patches.interpolate(keys, map(rng.uniform(-most, most, len(keys))), patches.draw_profiles(rng, keys))


def color(rng: Generator, frames: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The game's colours move, hue and saturation before the others; constant ones, of all else, end with them."""
    T, moves = len(frames), recipe.colors_move
    if moves:
        frames = random_hue_saturation(rng, frames, recipe)
    if rng.random() < recipe.brightness:
        frames = brightness(frames, random_path(rng, T, recipe.brightness_reach, moves))
    if rng.random() < recipe.contrast:
        frames = contrast(frames, random_path(rng, T, recipe.contrast_reach, moves, np.exp))
    return frames if moves else random_hue_saturation(rng, frames, recipe)


def random_hue_saturation(rng: Generator, frames: np.ndarray, recipe: Recipe) -> np.ndarray:
    if rng.random() >= recipe.hue_saturation:
        return frames
    return hue_saturation(frames.astype(np.uint8), rng.uniform(-12, 12), np.exp(rng.uniform(-0.1, 0.1)))


# Samples --------------------------------------------------------------------------------------------------


def game(recipe: Recipe) -> patches.Game:
    return patches.Game(recipe.patches, recipe.scales, recipe.location_velocity, recipe.size_velocity, recipe.visible)


def read_clip(video: Video, rng: Generator, recipe: Recipe) -> np.ndarray:
    return video.read(draw_clip(rng, len(video), recipe.frames, recipe.strides, jitter=recipe.jitter))


def tracking(video: Video, rng: Generator, recipe: Recipe) -> dict[str, Any]:
    """``clip`` (3, T, H, W), ``trajectories`` (P, T, 4) px, ``visible`` (P, T)."""
    frames = random_crop(rng, read_clip(video, rng, recipe), recipe)
    frames, paths, visible = patches.play(rng, frames, game(recipe))
    clip = tensor(color(rng, frames, recipe))  # after the game, so that patch and background change together
    return {"clip": clip, "trajectories": torch.from_numpy(paths).float(), "visible": torch.from_numpy(visible)}


def action(video: Video, rng: Generator, recipe: Recipe) -> dict[str, Any]:
    """``clip`` (3, T, H, W); its label is the video's."""
    frames = random_crop(rng, read_clip(video, rng, recipe), recipe)
    return {"clip": tensor(color(rng, frames, recipe))}


def order(video: Video, rng: Generator, recipe: Recipe) -> dict[str, Any]:
    """VCOP: ``clip`` (N, 3, T, H, W), clips of a video shuffled; ``label`` which of their `baselines.orders`.

    They lie half a clip apart, nearer or overlapping where the video is short.
    """
    T, N, total = recipe.frames, recipe.order_clips, len(video)
    step = max(min(T + T // 2, (total - T) // (N - 1)), 1)
    start = int(rng.integers(max(total - T - (N - 1) * step + 1, 1)))
    indices = np.concatenate([clip_indices(total, T, 1, start + i * step) for i in range(N)])
    frames = random_crop(rng, video.read(indices), recipe)  # one crop for all of them
    orders = baselines.orders(N)
    label = int(rng.integers(len(orders)))
    clips = [tensor(color(rng, frames[i * T : (i + 1) * T], recipe)) for i in orders[label]]
    return {"clip": torch.stack(clips), "label": label}


def speed(video: Video, rng: Generator, recipe: Recipe) -> dict[str, Any]:
    """SpeedNet: ``clip`` (3, T, H, W) played at one of `baselines.SPEEDS`, ``label`` which."""
    label = int(rng.integers(len(baselines.SPEEDS)))
    stride = baselines.SPEEDS[label]
    if stride:
        indices = draw_clip(rng, len(video), recipe.frames, (abs(stride),))
    else:
        indices = np.repeat(rng.integers(len(video)), recipe.frames)
    frames = random_crop(rng, video.read(indices if stride >= 0 else indices[::-1]), recipe)
    return {"clip": tensor(color(rng, frames, recipe)), "label": label}


def rotation(video: Video, rng: Generator, recipe: Recipe) -> dict[str, Any]:
    """Rot3D: ``clip`` (3, T, H, W) turned by one of `baselines.ANGLES`, ``label`` which."""
    label = int(rng.integers(len(baselines.ANGLES)))
    frames = random_crop(rng, read_clip(video, rng, recipe), recipe)
    frames = rotate(frames, baselines.ANGLES[label])
    return {"clip": tensor(color(rng, frames, recipe)), "label": label}


def rotate(frames: np.ndarray, degrees: int) -> np.ndarray:
    """Counter-clockwise about (W / 2, H / 2), as the authors' warp does: a pixel off an exact turn of the array."""
    H, W = frames.shape[1:3]
    turn = cv2.getRotationMatrix2D((W / 2, H / 2), degrees, 1)
    return np.stack([
        cv2.warpAffine(frame, turn, (W, H), borderMode=cv2.BORDER_REPLICATE) for frame in np.ascontiguousarray(frames)
    ])


def two_clips(video: Video, rng: Generator, recipe: Recipe) -> dict[str, Any]:
    """MoCo-3D: ``clip`` (2, 3, T, H, W), two clips of a video; ``label`` 0, the place of the right key."""
    return {"clip": torch.stack([action(video, rng, recipe)["clip"] for _ in range(2)]), "label": 0}


SAMPLES = {
    "ctp": tracking, "recognize": action, "vcop": order, "speed": speed, "rotation": rotation, "moco": two_clips,
}


def test_clips(video: Video, _rng: Generator, recipe: Recipe) -> torch.Tensor:
    """(N, 3, T, H, W): clips spread over a video, their middle, nothing random: the test protocol."""
    indices = spread_clips(len(video), recipe.test_clips, recipe.frames, recipe.test_stride)
    frames = resize(video.read(indices.ravel()), short_side_size(recipe, recipe.test_short_side_px))
    clips = center_crop(frames, recipe.size_px).reshape(*indices.shape, recipe.size_px, recipe.size_px, 3)
    return torch.stack([tensor(clip) for clip in clips])


def training_clips(videos: Videos, recipe: Recipe, *, seed: int | None = None) -> Clips:
    """What the recipe's method is trained on; with a seed, the same for every call: held-out games."""
    if recipe.size_px > min(recipe.short_sides_px):
        raise UserError(f"--size-px {recipe.size_px} is no crop of frames whose shorter side is "
                        f"{min(recipe.short_sides_px)} px (--short-sides-px)")
    return Clips(videos, partial(SAMPLES[recipe.method], recipe=recipe), seed=seed)


def testing_clips(videos: Videos, recipe: Recipe) -> Clips:
    if recipe.size_px > recipe.test_short_side_px:
        raise UserError(f"--size-px {recipe.size_px} is no crop of frames whose shorter side is "
                        f"{recipe.test_short_side_px} px (--test-short-side-px)")
    return Clips(videos, partial(test_clips, recipe=recipe), seed=0)
