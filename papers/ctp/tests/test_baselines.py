"""What the baselines and the fine-tuning are fed, draw by draw, against the authors' configurations (the README names
them): sizes, crops, flips, colours, frames, answers."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from papers.ctp import baselines, data
from papers.ctp.model import Targets, decode, encode
from papers.ctp.recipes import RECIPES

N = 3000
NEAR = 5 * math.sqrt(0.25 / N)  # of a share: five standard deviations of the widest
KINETICS_300 = 300  # frames
# name: recipe, sizes (a shorter side, or width and height whatever the aspect), flips, sides cropped per draw
ASPECT_LOST = {(149, 112), (171, 128), (192, 144)}
CASES = {
    "speed": ("kinetics_speed", {112, 128, 144}, 0.5),
    "rotation": ("kinetics_rotation", ASPECT_LOST, 0.5),
    "moco": ("kinetics_moco", ASPECT_LOST, 0.5),
    "recognize": ("ucf101_r3d18_finetune", ASPECT_LOST, 0.35),
    "something": ("ssv1_r3d18_finetune", {112, 128, 144}, 0.0),
}


class Video:
    """Landscape, and remembers which frames were asked for."""

    def __init__(self, frames=KINETICS_300):
        self.frames, self.asked = frames, []

    def __len__(self):
        return self.frames

    def read(self, indices):
        self.asked.append(np.array(indices))
        return np.broadcast_to(np.uint8(0), (len(indices), 240, 320, 3))


@pytest.fixture
def seen(monkeypatch):
    """Every step of the augmentation as (name, what it was given), none of them carried out."""
    found = []

    def resize(frames, size):
        found.append(("resize", size))
        wide = (round(size * 4 / 3), size) if isinstance(size, int) else size
        return np.broadcast_to(np.uint8(0), (len(frames), wide[1], wide[0], 3))

    def crop(frames, size, x, y):
        found.append(("crop", (x / (frames.shape[2] - size or 1), y / (frames.shape[1] - size or 1))))
        return frames[:, :size, :size]

    def note(name):
        return lambda frames, *how: found.append((name, how)) or frames

    monkeypatch.setattr(data, "resize", resize)
    monkeypatch.setattr(data, "crop", crop)
    for name in ("flip", "hue_saturation", "brightness", "contrast", "rotate"):
        monkeypatch.setattr(data, name, note(name))
    monkeypatch.setattr(data, "tensor", lambda frames: found.append(("tensor", None)) or torch.zeros(1))
    return found


def _draw(name, count=N, frames=KINETICS_300, **changes):
    """(recipe, video, labels) of so many samples."""
    recipe = replace(RECIPES[name], **changes)
    video, rng = Video(frames), np.random.default_rng(0)
    labels = [data.SAMPLES[recipe.method](video, rng, recipe).get("label") for _ in range(count)]
    return recipe, video, labels


def _given(seen, name):
    return [how for step, how in seen if step == name]


def _uniform(values, low, high):
    """Moments and reach of a uniform distribution."""
    values = np.asarray(values, dtype=float)
    wide = high - low
    assert low <= values.min() <= low + 0.02 * wide and high - 0.02 * wide <= values.max() <= high
    assert values.mean() == pytest.approx((low + high) / 2, abs=5 * wide / math.sqrt(12 * len(values)))
    assert values.std() == pytest.approx(wide / math.sqrt(12), rel=0.1)


def _evenly(values, expected):
    """Each of the values expected, and as often as the others."""
    shares = {value: count / len(values) for value, count in Counter(values).items()}
    assert shares == pytest.approx(dict.fromkeys(expected, 1 / len(expected)), abs=NEAR)


@pytest.mark.parametrize("case", CASES)
def test_sizes_crops_and_flips(seen, case):
    name, sizes, flip = CASES[case]
    _draw(name)
    _evenly(_given(seen, "resize"), sizes)
    assert len(_given(seen, "flip")) / len(_given(seen, "crop")) == pytest.approx(flip, abs=NEAR)
    x, _ = np.transpose(_given(seen, "crop"))
    assert x.min() == 0 and x.max() == 1 and x.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("case", CASES)
def test_colours_are_constant_and_end_with_the_hue(seen, case):
    """Brightness up to 32 of 255, contrast up to exp(0.2), hue up to 12 of 180 and saturation exp(0.1): each in a fifth
    of the clips, one draw for all frames of a clip."""
    _draw(CASES[case][0])
    clips = len(_given(seen, "tensor"))
    for step in ("brightness", "contrast", "hue_saturation"):
        assert len(_given(seen, step)) / clips == pytest.approx(0.2, abs=NEAR), step
    assert all(np.ndim(value) == 0 for (value,) in _given(seen, "brightness") + _given(seen, "contrast"))
    _uniform([value for (value,) in _given(seen, "brightness")], -32, 32)
    _uniform([np.log(value) for (value,) in _given(seen, "contrast")], -0.2, 0.2)
    hue, saturation = zip(*_given(seen, "hue_saturation"))
    _uniform(hue, -12, 12)
    _uniform(np.log(saturation), -0.1, 0.1)
    order = {"brightness": 0, "contrast": 1, "hue_saturation": 2, "tensor": 3}
    steps = [order[step] for step, _ in seen if step in order]
    assert all(a < b for a, b in itertools.pairwise(steps) if a != 3), "in this order up to the tensor"


def test_the_games_colours_move_and_begin_with_the_hue(seen):
    _draw("kinetics_r3d18", 300, hue_saturation=1.0, brightness=1.0, contrast=1.0)
    assert [step for step, _ in seen][-4:] == ["hue_saturation", "brightness", "contrast", "tensor"]
    assert all(len(value) == 16 for (value,) in _given(seen, "brightness"))


def test_constant_colours_leave_whole_grey_levels_to_the_hue():
    """OpenCV takes hue of 0 to 179 from bytes alone: of floats it would be 0 to 360."""
    recipe = replace(RECIPES["ucf101_r3d18_finetune"], hue_saturation=1.0, brightness=1.0, contrast=1.0)
    frames = np.random.default_rng(1).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    out = data.color(np.random.default_rng(0), frames, recipe)
    assert out.dtype == np.uint8 and out.shape == frames.shape


def test_rot3d_turns_what_was_cropped_and_samples_as_the_game_does(seen):
    _, video, labels = _draw("kinetics_rotation")
    _evenly(labels, range(4))
    assert [how[0] for how in _given(seen, "rotate")] == [baselines.ANGLES[label] for label in labels]
    assert all(seen[i - 1][0] in ("crop", "flip") for i, (step, _) in enumerate(seen) if step == "rotate")
    _strides(video, range(1, 6))


def test_mocos_two_clips_are_drawn_apart(seen):
    _, video, _ = _draw("kinetics_moco", N // 2)
    _strides(video, range(1, 5))
    starts = np.array([frames[0] for frames in video.asked]).reshape(-1, 2)
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.1


def _strides(video, strides):
    """Each stride as often as the others, every frame somewhere within its stride."""
    drawn = []
    for frames in video.asked:
        # Frame i lies in start + i stride + 0 .. stride - 1: the mean step tells the stride.
        stride = round((frames[-1] - frames[0]) / 15)
        moved = frames - frames[0] - stride * np.arange(16)
        assert np.abs(moved).max() < max(strides)
        drawn.append(stride)
    shares = np.bincount(drawn, minlength=max(strides) + 1)[1:] / len(drawn)
    assert shares == pytest.approx(np.full(len(shares), 1 / len(strides)), abs=2 * NEAR)
    steps = np.concatenate([np.diff(frames) for frames in video.asked])
    assert steps.min() >= 0 and steps.max() > max(strides), "jitter within a stride"


def test_speednet_plays_at_each_speed_alike_and_without_jitter(seen):
    _, video, labels = _draw("kinetics_speed")
    _evenly(labels, range(7))
    assert baselines.SPEEDS == (-4, -2, -1, 0, 1, 2, 4)
    for label, frames in zip(labels, video.asked):
        assert (np.diff(frames) == baselines.SPEEDS[label]).all()
    for speed in (1, -4):  # the start is uniform over the whole video
        firsts = [frames.min() for label, frames in zip(labels, video.asked) if baselines.SPEEDS[label] == speed]
        _uniform(firsts, 0, KINETICS_300 - 1 - 15 * abs(speed))


@pytest.mark.parametrize("frames, gap", [(300, 24), (64, 24), (56, 20), (20, 2)])
def test_vcops_clips_lie_half_a_clip_apart_or_nearer(seen, frames, gap):
    _, video, labels = _draw("kinetics_vcop", 600, frames=frames)
    assert Counter(step for step, _ in seen).keys() == {"resize", "crop", "tensor"}, "no flip, no colour, no rotation"
    assert set(_given(seen, "resize")) == {(171, 128)}
    shares = np.bincount(labels, minlength=6) / len(labels)
    assert shares == pytest.approx(np.full(6, 1 / 6), abs=0.08)
    for asked in video.asked:
        clips = asked.reshape(3, 16)
        assert (np.diff(clips, axis=1) == 1).all() and (np.diff(clips[:, 0]) == gap).all()
    firsts = [asked[0] for asked in video.asked]
    assert min(firsts) == 0 and max(firsts) == max(frames - 16 - 2 * gap, 0)


@pytest.mark.parametrize("clips, orders", [(2, 2), (4, 24)])
def test_vcop_shuffles_as_many_clips_as_it_is_told(clips, orders):
    recipe = replace(RECIPES["kinetics_vcop"], order_clips=clips)
    sample = data.order(Video(200), np.random.default_rng(0), recipe)
    assert sample["clip"].shape == (clips, 3, 16, 112, 112) and len(baselines.orders(clips)) == orders
    model = baselines.VCOP(width=4, clips=clips).eval()
    with torch.no_grad():
        assert model(sample["clip"][None, :, :, :8, ::4, ::4]).shape == (1, orders)


@pytest.mark.parametrize("name", ["kinetics_r3d18", "kinetics_vcop", "kinetics_speed", "kinetics_rotation",
                                  "kinetics_moco", "ucf101_r3d18_finetune"])
def test_all_are_normalised_alike(name):
    """White is (1 - mean) / std of ImageNet's statistics, a grey level less where a patch was blended in."""
    recipe = replace(RECIPES[name], hue_saturation=0.0, brightness=0.0, contrast=0.0)
    video = Video()
    video.read = lambda indices: np.full((len(indices), 120, 160, 3), 255, np.uint8)
    clip = data.SAMPLES[recipe.method](video, np.random.default_rng(0), recipe)["clip"]
    white = clip.reshape(-1, *clip.shape[-4:])[0, :, 0, 0, 0]
    assert white.tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], abs=0.02)


def test_targets_have_means_and_deviations_of_their_own():
    paths = torch.tensor([[[0.0, 0, 10, 20], [4, 2, 14, 22]]])
    targets = Targets((1.0, 2, 0, 0), (2.0, 4, 1, 1))
    assert encode(paths, targets)[0].tolist() == [[-0.5, -0.5, 0, 0], [1.5, 0, 0, 0]]
    torch.testing.assert_close(decode(encode(paths, targets), paths[:, 0], targets), paths)
