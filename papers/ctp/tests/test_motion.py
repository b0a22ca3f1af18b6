"""The judge of motion: made-up motion goes where its label says, and only the order of frames tells it."""

import numpy as np
import pytest
import torch
from torch import nn

from common import run
from papers.ctp import evaluate, motion
from papers.ctp.recipes import RECIPES

RECIPE = RECIPES["compare"]
WORLD = run.World(0, 1, torch.device("cpu"), None)
S, T = RECIPE.size_px, RECIPE.frames


def _angle(moved):
    return np.degrees(np.arctan2(moved[1], moved[0]))


@pytest.mark.parametrize("direction", range(motion.DIRECTIONS))
@pytest.mark.parametrize("speed", range(len(motion.TRAVEL)))
def test_window_and_piece_go_where_the_label_says(direction, speed):
    """On a slope that grows to the right and down, a window's mean tells its place; a piece's place is its centroid."""
    rng = np.random.default_rng(0)
    path = motion.draw_path(rng, direction, speed, RECIPE)
    moved = path[-1] - path[0]
    off = (_angle(moved) - 45 * direction + 180) % 360 - 180
    assert abs(off) < 45 / 4 + 1e-6
    assert np.hypot(*moved) / S == pytest.approx(motion.TRAVEL[speed], rel=0.15 + 1e-6)
    across, down = np.meshgrid(np.arange(2 * S) + 20, np.arange(2 * S) + 20)
    slope = np.stack([across, down, np.zeros_like(across)], -1).astype(np.uint8)
    seen = motion.camera(rng, slope, path, RECIPE)
    assert seen.shape == (T, S, S, 3) and seen.dtype == np.uint8
    place = seen[..., :2].mean((1, 2))
    np.testing.assert_allclose(place - place[0], path - path[0], atol=1.05)  # two roundings to grey levels
    black, white = np.zeros((40, 60, 3), np.uint8), np.full((50, 40, 3), 255, np.uint8)
    frames = motion.moving_piece(rng, black, white, path, RECIPE)[..., 0].astype(float)
    weight = frames / frames.sum((1, 2), keepdims=True)
    centroid = np.stack([(weight * np.arange(S)).sum((1, 2)), (weight * np.arange(S)[:, None]).sum((1, 2))], 1)
    np.testing.assert_allclose(centroid - centroid[0], path - path[0], atol=0.3)
    assert frames.sum((1, 2)).std() / frames.sum((1, 2)).mean() < 0.02, "nothing of it leaves the picture"


def test_shuffled_frames_are_the_same_frames_in_no_direction():
    rng = np.random.default_rng(0)
    for _ in range(200):
        order = motion.shuffled(rng, np.arange(4))
        assert sorted(order) == [0, 1, 2, 3] and order.tolist() not in ([0, 1, 2, 3], [3, 2, 1, 0])


@pytest.fixture(scope="module")
def known():
    recipe = RECIPES["tiny"]
    videos, val = (evaluate.open_split(recipe, None, split) for split in ("train", "val"))
    return {"train": motion.tasks(videos, RECIPE, 120, 0), "val": motion.tasks(val, RECIPE, 60, 1)}


def test_every_question_is_asked_of_clips_of_one_kind(known):
    assert [set(task.labels) for task in known["val"]] == [
        {"camera_direction", "camera_speed"}, {"object_direction", "object_speed"}, {"order"}, {"camera_shuffled"},
        {"object_shuffled"},
    ]
    for task in known["val"]:
        assert task.clips.shape == (60, T, S, S, 3) and task.clips.dtype == np.uint8
    camera, control = known["val"][0], known["val"][3]
    assert np.array_equal(np.sort(camera.clips, 1), np.sort(control.clips, 1)), "the same frames"
    assert np.array_equal(camera.labels["camera_direction"], control.labels["camera_shuffled"])


def test_the_same_seed_makes_the_same_clips(known):
    val = evaluate.open_split(RECIPES["tiny"], None, "val")
    again = motion.tasks(val, RECIPE, 60, 1)
    for ours, theirs in zip(known["val"], again, strict=True):
        assert np.array_equal(ours.clips, theirs.clips)


class Middles(nn.Module):
    """A backbone that sees where brightness lies in the first frame and in the last."""

    def forward(self, clip):
        x = clip - clip.amin((3, 4), keepdim=True)
        at = torch.linspace(-1, 1, S)
        total = x.sum((3, 4)).clamp(min=1e-6)
        places = [(x * weights).sum((3, 4)) / total for weights in (at, at[:, None])]
        return torch.cat([places[i][:, :, -1] - places[i][:, :, 0] for i in range(2)], 1)[..., None, None, None]


def test_who_sees_motion_scores_and_shuffled_frames_take_it_away():
    """White pieces on black: where they went from the first frame to the last is their direction."""
    def pieces(count, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(motion.DIRECTIONS, size=count)
        black, white = np.zeros((S, S, 3), np.uint8), np.full((S, S, 3), 255, np.uint8)
        clips = np.stack([motion.moving_piece(rng, black, white, motion.draw_path(rng, int(label), 2, RECIPE), RECIPE)
                          for label in labels])
        disordered = np.stack([motion.shuffled(rng, clip) for clip in clips])
        return [motion.Task(clips, {"seen": labels}), motion.Task(disordered, {"control": labels})]

    found = motion.scores(Middles(), {"train": pieces(300, 0), "val": pieces(150, 1)}, WORLD)
    assert found["seen"] > 90 and found["control"] < 60, found
