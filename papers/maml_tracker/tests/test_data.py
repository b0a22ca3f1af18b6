"""Crops, sets and data sets."""

import dataclasses

import numpy as np
import pytest
import torch

from common.data import pairs, tracking
from common.data.tiny.sequences import sequences
from common.run import UserError
from papers.maml_tracker.data import (
    VideoSets,
    context_side,
    corners,
    crop_around,
    cut,
    support_set,
    target_set,
    zooms,
)
from papers.maml_tracker.recipes import RECIPES

TINY, FULL = RECIPES["tiny"], RECIPES["retina"]


def frame_with_square(box, width=640, height=480):
    frame = np.full((height, width, 3), 60, np.uint8)
    x, y, w, h = box
    frame[y : y + h, x : x + w] = (255, 0, 0)
    return frame


def red_box(pixels):
    """x1, y1, x2, y2 around what is red."""
    rows, columns = (np.flatnonzero((pixels[..., 0] > 150).any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def sample(box, sequence, frame=None):
    return pairs.Sample(frame_with_square(box) if frame is None else frame, np.array(box, float), sequence)


@pytest.fixture(scope="module")
def data():
    return pairs.open_data(TINY, sequences())


def test_a_square_target_measures_its_anchor_in_the_middle():
    assert context_side(50, 50) == 100 and context_side(20, 60) == pytest.approx((60 * 100) ** 0.5)
    for recipe in (FULL, TINY):
        crop = crop_around((300, 200, 50, 50), recipe)
        x1, y1, x2, y2 = corners(crop, (300, 200, 50, 50))
        assert x2 - x1 == pytest.approx(recipe.anchor_px, rel=0.06) and y2 - y1 == pytest.approx(x2 - x1)
        # a crop begins at a whole pixel
        assert (x1 + x2) / 2 == pytest.approx(recipe.crop_px / 2, abs=0.5 * crop.scale + 1e-9)


@pytest.mark.parametrize("zoom", [1.0, 1.08, 1 / 1.08])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (40.0, -25.0)])
def test_boxes_lie_on_what_they_enclose(zoom, shift):
    box = (300, 200, 40, 70)
    crop = crop_around(box, FULL, zoom, shift)
    truth = corners(crop, box)
    np.testing.assert_allclose(red_box(cut(frame_with_square(box), crop)), truth, atol=1.5)
    off = (truth[:2] + truth[2:]) / 2 - FULL.crop_px / 2
    np.testing.assert_allclose(off, -np.array(shift), atol=1.0)
    plain = corners(crop_around(box, FULL), box)
    np.testing.assert_allclose(truth[2:] - truth[:2], zoom * (plain[2:] - plain[:2]), rtol=0.01)


def test_outside_the_frame_is_its_mean_colour():
    frame = frame_with_square((0, 0, 60, 60))
    pixels = cut(frame, crop_around((0, 0, 60, 60), FULL))
    np.testing.assert_allclose(pixels[0, 0], frame.reshape(-1, 3).mean(0), atol=1)


def test_sets_of_a_video(data):
    video, other = data.train["got10k"][:2]
    box = (300, 200, 40, 70)
    recipe = dataclasses.replace(FULL, gray=0.0, brightness=0.0)
    made = VideoSets(recipe)([sample(box, video), sample(box, video)], np.random.default_rng(0))
    assert made["support"].shape == (3, 3, 263, 263) and made["target"].shape == (3, 263, 263) and made["present"]
    for picture, truth in zip([*made["support"], made["target"]], [*made["support_box"], made["target_box"]]):
        np.testing.assert_allclose(red_box(picture.permute(1, 2, 0).numpy()), truth, atol=1.5)
    boxes = made["support_box"]
    off = ((boxes[:, :2] + boxes[:, 2:]) / 2 - 263 / 2).abs()
    assert off[0].max() < 1 and 3 < off[1:].max() <= 66  # the copies show the target off the middle
    sides = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_allclose(sides[1:] / sides[0], [1.08, 1 / 1.08], rtol=0.01)
    assert zooms(recipe) == (1.0, 1.08, 1 / 1.08) and zooms(dataclasses.replace(recipe, zoom=1.0)) == (1.0,)
    assert not VideoSets(recipe)([sample(box, video), sample(box, other)], np.random.default_rng(0))["present"]


def test_the_target_moves_as_far_as_the_recipe_says(data):
    video, box = data.train["got10k"][0], (300, 200, 50, 50)
    made = [VideoSets(FULL)([sample(box, video)] * 2, np.random.default_rng(i)) for i in range(60)]
    boxes = torch.stack([each["target_box"] for each in made])
    shifts = ((boxes[:, :2] + boxes[:, 2:]) / 2 - 263 / 2).abs()
    sides = boxes[:, 2] - boxes[:, 0]
    assert 50 < shifts.max() <= 66 and shifts.min() < 8
    assert 63.5 / 2 - 1 < sides.min() < 35 and 115 < sides.max() < 63.5 * 2 + 1
    assert (torch.stack([each["support_box"] for each in made])[:, 0] == made[0]["support_box"][0]).all()


def test_pairs_are_a_function_of_their_seed_and_a_share_is_negative(data):
    samples = pairs.Pairs(data.train, VideoSets(TINY), length=8, max_gap=TINY.max_gap, negatives=0.25)
    first, again, other = samples[0, 5], samples[3, 5], samples[0, 6]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["support"], other["support"])
    present = [bool(samples[0, seed]["present"]) for seed in range(80)]
    assert 0.6 < np.mean(present) < 0.9


def test_sets_of_a_batch(data):
    samples = pairs.Pairs(data.train, VideoSets(TINY), length=8, max_gap=TINY.max_gap)
    batch = torch.utils.data.default_collate([samples[0, seed] for seed in range(3)])
    support, target = support_set(batch, 1, torch.device("cpu")), target_set(batch, slice(1, 2), torch.device("cpu"))
    assert support.x.shape == (3, 3, 127, 127) and target.x.shape == (1, 3, 127, 127)
    assert torch.equal(support.box_xyxy, batch["support_box"][1]) and torch.equal(target.x[0], batch["target"][1])
    assert support.present.all() and target.weight.tolist() == [1]
    assert target_set(batch, slice(0, 2), torch.device("cpu")).x.shape == (2, 3, 127, 127)


def test_data_sets(data, tmp_path):
    assert data.describe("sequences") == "sequences: 60 training sequences, 6 test sequences"
    held = dataclasses.replace(TINY, datasets=("got10k",), held_out=("otb",))
    with pytest.raises(UserError, match="no folder for got10k, otb"):
        pairs.open_data(held, tmp_path)
    (tmp_path / "GOT-10k").symlink_to(sequences() / "train")
    (tmp_path / "OTB" / "Square" / "img").mkdir(parents=True)
    from PIL import Image

    Image.fromarray(frame_with_square((9, 9, 20, 20))).save(tmp_path / "OTB" / "Square" / "img" / "0001.jpg")
    (tmp_path / "OTB" / "Square" / "groundtruth_rect.txt").write_text("10,10,20,20\n")
    found = pairs.open_data(held, tmp_path)
    assert [s.name for s in found.test] == ["Square"] and len(found.train["got10k"]) == 60
    assert isinstance(found.test[0], tracking.Sequence)
