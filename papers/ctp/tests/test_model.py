"""The game, the baselines and the networks: what must hold whatever the numbers."""

import dataclasses

import numpy as np
import pytest
import torch

from common import run
from papers.ctp import baselines, cases, data, patches
from papers.ctp.model import BN_EPS, PRETRAINING, Backbone, CtP, Recognizer, decode, encode, iou, tracking_losses
from papers.ctp.recipes import RECIPES

WHOLE = RECIPES["ucf101_r3d18"]


@pytest.mark.parametrize("net, pretraining, classification", [("r3d18", 48.0, 40.7), ("r2plus1d18", 49.4, 41.5)])
def test_multiply_adds(net, pretraining, classification):
    with torch.device("meta"):
        clip = torch.empty(1, 3, 16, 112, 112)
        models = Backbone(net, PRETRAINING), Backbone(net)
    for model, expected in zip(models, (pretraining, classification)):
        assert run.multiply_adds(model, clip) / 1e9 == pytest.approx(expected, abs=0.06)


def test_maps():
    with torch.device("meta"):
        clip = torch.empty(1, 3, 16, 112, 112)
        assert Backbone(strides=PRETRAINING)(clip).shape == (1, 512, 2, 14, 14)
        assert Backbone()(clip).shape == (1, 512, 2, 7, 7)
        assert Backbone()(torch.empty(1, 3, 32, 112, 112)).shape == (1, 512, 4, 7, 7)
        assert CtP()(clip, torch.empty(1, 5, 4)).shape == (1, 5, 16, 4)
    assert all(m.eps == BN_EPS for m in Backbone(width=8).modules() if isinstance(m, torch.nn.BatchNorm3d))


def test_the_patches_of_a_clip_may_change_places():
    torch.manual_seed(0)
    model = cases._started(CtP(width=8)).eval()
    clip, query = torch.randn(2, 3, 16, 32, 32), cases._query(2)
    order = [2, 0, 1]
    with torch.no_grad():
        torch.testing.assert_close(model(clip, query[:, order]), model(clip, query)[:, order])


def test_targets_and_boxes_are_inverse():
    rng = np.random.default_rng(0)
    paths = torch.from_numpy(patches.draw_trajectories(rng, (112, 112), 16, patches.Game(patches=50))).double()
    torch.testing.assert_close(decode(encode(paths), paths[:, 0]), paths)
    assert (encode(paths)[:, 0] == 0).all(), "the first frame asks for nothing"


def test_the_first_loss():
    """An answer of zero scores 19.0 and 3.2 under the default game; a network that just started, almost that."""
    rng = np.random.default_rng(0)
    paths = [patches.draw_trajectories(rng, (112, 112), 16, patches.Game()) for _ in range(1000)]
    paths = torch.from_numpy(np.stack(paths)).float()
    losses = tracking_losses(torch.zeros_like(paths), paths)
    assert losses["centre"].item() == pytest.approx(19.0, rel=0.04)
    assert losses["size"].item() == pytest.approx(3.2, rel=0.04)
    still = iou(paths[:, :, :1].expand_as(paths), paths)[..., 1:].mean()
    assert still.item() == pytest.approx(0.43, abs=0.015)


def test_weights_of_frames():
    paths = torch.tensor([[[[0.0, 0, 10, 10], [8, 0, 18, 10]]]])
    predictions = torch.zeros(1, 1, 2, 4)
    every, first, none = (
        tracking_losses(predictions, paths, torch.tensor([[w]])) for w in ([1.0, 1.0], [1.0, 0.0], [0.0, 0.0])
    )
    assert every["centre"].item() == pytest.approx((10 - 0.5) / 2) and every["size"] == 0
    assert first["centre"] == 0 and none["centre"] == 0


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 4, 4], [0, 0, 1, 1], [2, 2, 2, 2]])
    b = torch.tensor([[2.0, 0, 6, 4], [5, 5, 6, 6], [2, 2, 2, 2]])
    assert iou(a, b).tolist() == pytest.approx([8 / 24, 0, 0])


# The game -------------------------------------------------------------------------------------------------


def _frames(T=16, side=112):
    return np.random.default_rng(1).integers(0, 256, (T, side, side, 3), dtype=np.uint8)


def test_a_game_changes_boxes_of_visible_patches_only():
    frames = _frames()
    edited, paths, visible = patches.play(np.random.default_rng(0), frames, patches.Game())
    assert paths.shape == (3, 16, 4) and visible.shape == (3, 16) and visible[:, 0].all()
    inside = np.zeros(frames.shape[:3], dtype=bool)
    for p in range(3):
        for t in np.flatnonzero(visible[p]):
            left, top, right, bottom = paths[p, t]
            inside[t, top:bottom, left:right] = True
    assert np.array_equal(edited[~inside], frames[~inside])
    assert (edited[inside] != frames[inside]).mean() > 0.5
    again, *_ = patches.play(np.random.default_rng(0), frames, patches.Game())
    assert np.array_equal(again, edited)


def test_hidden_frames_hold_no_trace_of_a_patch():
    frames = _frames()
    edited, _, visible = patches.play(np.random.default_rng(0), frames, patches.Game(patches=1, visible=0.0))
    same = (edited == frames).all((1, 2, 3))
    assert visible.sum() in (1, 2) and same[~visible[0]].all() and not same[0]


def test_patches_come_from_raw_frames_and_small_ones_lie_on_top():
    frames = np.zeros((2, 20, 20, 3), np.uint8)
    frames[0, :10], frames[0, 10:] = 100, 200
    boxes = np.array([[[0, 0, 4, 4], [8, 8, 12, 12]], [[0, 10, 10, 20], [4, 4, 14, 14]]])  # small first, then large
    opaque = [patches.Patch(0, "rectangle", None, np.ones(2), np.array([True, True])) for _ in range(2)]
    edited = patches.paste(frames, boxes, opaque)
    assert (edited[1, 9, 9] == 100).all(), "the small one"
    assert (edited[1, 5, 5] == 200).all() and (edited[1, 0, 0] == 0).all()


def test_unusual_games_give_no_empty_boxes():
    rng, game = np.random.default_rng(0), patches.Game(scales=(2, 3), size_velocity=0.3)
    paths = np.stack([patches.draw_trajectories(rng, (48, 40), 8, game) for _ in range(200)])
    assert (paths[..., 2:] > paths[..., :2]).all() and paths[..., ::2].max() <= 48 and paths[..., 1::2].max() <= 40
    with pytest.raises(ValueError, match="empty box"):
        patches.draw_trajectories(rng, (48, 40), 8, patches.Game(scales=(0.01,), patches=50, size_velocity=9.0))


# What the methods are fed ---------------------------------------------------------------------------------


class Counting:
    """A video whose frame i is gray level i."""

    def __init__(self, frames=40):
        self.frames = frames

    def __len__(self):
        return self.frames

    def read(self, indices):
        return np.stack([np.full((128, 160, 3), i, np.uint8) for i in indices])


def _plain(name):
    """The baseline's recipe without changes of colour."""
    return dataclasses.replace(RECIPES[f"kinetics_{name}"], hue_saturation=0.0, brightness=0.0, contrast=0.0)


def _levels(clip):
    """Frame numbers in a normalised clip (3, T, H, W) of `Counting`."""
    return np.round((clip[0].mean((1, 2)).numpy() * data.STD[0] + data.MEAN[0]) * 255).astype(int)


def test_orders_can_be_told_from_the_frames():
    rng, recipe = np.random.default_rng(0), _plain("vcop")
    seen = set()
    for _ in range(40):
        sample = data.order(Counting(100), rng, recipe)
        assert sample["clip"].shape == (3, 3, 16, 112, 112)
        levels = [_levels(clip) for clip in sample["clip"]]
        assert all((np.diff(level) == 1).all() for level in levels)
        starts = [level[0] for level in levels]
        assert np.array_equal(np.argsort(np.argsort(starts)), baselines.orders(3)[sample["label"]])
        assert sorted(np.diff(sorted(starts))) == [24, 24]
        seen.add(sample["label"])
    assert seen == set(range(6))
    short = data.order(Counting(20), rng, recipe)  # overlapping
    assert len({_levels(clip)[0] for clip in short["clip"]}) == 3


def test_speeds_can_be_told_from_the_frames():
    rng, recipe, seen = np.random.default_rng(0), _plain("speed"), set()
    for _ in range(60):
        sample = data.speed(Counting(100), rng, recipe)
        assert set(np.diff(_levels(sample["clip"]))) == {baselines.SPEEDS[sample["label"]]}
        seen.add(sample["label"])
    assert seen == set(range(7))


def test_rotations_are_counter_clockwise():
    frames = np.zeros((1, 6, 6, 3), np.uint8)
    frames[0, :, :2] = 255  # left edge, of which the outer pixel is lost
    assert data.rotate(frames, 0).tolist() == frames.tolist()
    turned = data.rotate(frames, 90)[0, ..., 0]
    assert (turned[-1] == 255).all() and (turned[:-1] == 0).all(), "the left edge comes to lie at the bottom"
    assert np.flatnonzero(data.rotate(frames, 180)[0, 2, :, 0]).tolist() == [5]


def test_two_clips_of_a_video():
    rng = np.random.default_rng(0)
    sample = data.two_clips(Counting(100), rng, _plain("moco"))
    assert sample["clip"].shape == (2, 3, 16, 112, 112) and sample["label"] == 0
    assert not torch.equal(*sample["clip"])


def test_clips_of_the_game_and_of_tests():
    sample = data.tracking(Counting(30), np.random.default_rng(0), WHOLE)
    assert sample["clip"].shape == (3, 16, 112, 112) and sample["trajectories"].shape == (3, 16, 4)
    clips = data.test_clips(Counting(100), None, RECIPES["ucf101_r3d18_finetune"])
    assert clips.shape == (10, 3, 16, 112, 112)
    assert [_levels(clip)[0] for clip in clips] == [3, 10, 17, 24, 31, 37, 44, 51, 58, 65]


def test_the_key_of_the_same_video_is_the_answer():
    torch.manual_seed(0)
    model = baselines.MoCo(width=8, queue=16, features=8).train()
    clips = torch.randn(4, 2, 3, 4, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.fc.parameters():
            p.add_(1)
    model.update_keys()
    logits = model(clips)
    assert torch.equal(model.queue, before["queue"]), "no clip is its own negative"
    model.enqueue()
    after = model.state_dict()
    assert logits.shape == (4, 17) and after["queue_ptr"].item() == 4
    moved = after["key_fc.0.bias"] - before["key_fc.0.bias"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.001), rtol=1e-3, atol=1e-6)
    assert torch.equal(after["queue"][:, 4:], before["queue"][:, 4:])
    torch.testing.assert_close(after["queue"].norm(dim=0), torch.ones(16))
    for _ in range(4):
        model(clips)
        model.enqueue()
    assert model.queue_ptr.item() == 4, "the queue is a ring"
    model.eval()
    model(clips)
    assert not model.new_keys, "in evaluation nothing is remembered"
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model.queue[:, :4] = model._keys(clips[:, 1]).T
        logits = model(clips)
    assert logits.dtype == torch.float32, "networks may be rounded, similarities are not"
    torch.testing.assert_close(logits[range(4), range(1, 5)], logits[:, 0], rtol=1e-5, atol=1e-5)


def test_contrast_moves_on_a_line_between_factors_not_between_logarithms(monkeypatch):
    monkeypatch.setattr(patches, "draw_key_frames", lambda *_: np.array([0, 15]))
    monkeypatch.setattr(patches, "draw_profiles", lambda *_: ["uniform"])
    recipe = dataclasses.replace(WHOLE, hue_saturation=0.0, brightness=0.0, contrast=1.0, contrast_reach=1.0)
    levels = data.color(np.random.default_rng(0), np.full((16, 1, 1, 3), 50, np.uint8), recipe)[:, 0, 0, 0]
    assert 50 / np.e < levels.min() < levels.max() - 5 < 50 * np.e
    np.testing.assert_allclose(np.diff(levels, 2), 0, atol=1e-4)


def test_a_video_is_the_mean_of_its_clips_logits():
    model = Recognizer(width=8, classes=5).eval()
    clips = torch.randn(2, 3, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), torch.stack([model(clips[:, i]) for i in range(3)], 1))
