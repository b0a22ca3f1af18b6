"""Where a region of one view is in the other: exact arithmetic, and pixels that agree with it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from torchvision.ops import box_iou

from common.run import UserError
from papers.maskco import data
from papers.maskco.data import View
from papers.maskco.model import MaskCo
from papers.maskco.recipes import RECIPES, Recipe

PLAIN = dict(jitter_probability=0.0, gray=0.0, blur=0.0)  # pixels that only move
SMALL = replace(RECIPES["mini"], **PLAIN)
FULL = Recipe("", **PLAIN)


def _pairs(recipe, count, size=(640, 480), seed=0):
    torch.manual_seed(seed)
    picture = Image.new("RGB", size)
    for _ in range(count):
        query, key, fallback = data.draw_pair(picture, recipe)
        yield query, key, fallback, *data.draw_regions(query, key, recipe)


def test_worked_example():
    """Section 3 of the derivation: every number of it."""
    query, key = View(100, 60, 320, 240, 224, False), View(200, 120, 280, 280, 224, True)
    np.testing.assert_allclose([query.scale, key.scale], [[0.7, 0.93333333], [0.8, 0.8]])
    shared = data.overlap(query, key)
    np.testing.assert_allclose(shared, [200, 120, 420, 300])
    np.testing.assert_allclose(query.from_picture(shared), [70, 56, 224, 224])
    in_picture = query.to_picture(np.array([84.0, 70, 168, 140]))
    np.testing.assert_allclose(in_picture, [220, 135, 340, 210])
    np.testing.assert_allclose(key.from_picture(in_picture), [112, 12, 208, 72])
    np.testing.assert_allclose(replace(key, flip=False).from_picture(in_picture), [16, 12, 112, 72])
    # cells of a 7 x 7 map: u / 32 - 0.5
    np.testing.assert_allclose(np.array([112, 12, 208, 72]) / 32 - 0.5, [3.0, -0.125, 6.0, 1.75])


@pytest.mark.parametrize("recipe", [FULL, replace(FULL, regions=3), SMALL], ids=["224", "three", "64"])
def test_regions_are_whole_pixels_inside_both_views(recipe):
    S, (least, most) = recipe.input_size_px, recipe.region_px
    for query, key, _, in_query, in_key in _pairs(recipe, 300):
        assert in_query.shape == in_key.shape == (recipe.regions, 4)
        np.testing.assert_array_equal(in_query, in_query.round())
        for boxes in (in_query, in_key):
            assert (boxes >= 0).all() and (boxes <= S).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        sides = in_query[:, 2:] - in_query[:, :2]
        assert (least <= sides).all() and (sides <= most).all()
        back = query.from_picture(key.to_picture(in_key))
        np.testing.assert_allclose(back, in_query, atol=1e-3)


def test_views_share_enough_and_the_fallback_is_rare():
    drawn = [fallback for *_, fallback, _, _ in _pairs(FULL, 1500)]
    assert np.mean(drawn) < 0.005
    for query, key, _, _, in_key in _pairs(FULL, 300, size=(500, 375), seed=1):
        shared = data.overlap(query, key)
        for view in (query, key):
            assert ((shared[2:] - shared[:2]) * view.scale >= FULL.overlap_px).all()
        sides = (in_key[:, 2:] - in_key[:, :2]).ravel()
        assert sides.min() > 20 and sides.max() <= 224


def test_a_picture_whose_crops_never_meet_enough_falls_back():
    never = replace(FULL, overlap_tries=0)
    for query, key, fallback, in_query, in_key in _pairs(never, 20):
        assert fallback and (query.crop == key.crop).all()
        np.testing.assert_allclose(in_key, query.from_picture(key.to_picture(in_query)) if query.flip == key.flip
                                   else replace(query, flip=not query.flip).from_picture(query.to_picture(in_query)))
    sample = data.Views(never)(Image.new("RGB", (70, 50)))
    assert sample["fallback"] == 1


def _where(view: View, size: tuple[int, int]) -> torch.Tensor:
    """A view of a picture whose first two channels are the coordinates of its pixels' centres: (1, 2, S, S)."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = view.of(Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None, :2].float() + 0.5


def _read(view: torch.Tensor, boxes: np.ndarray, r: int) -> torch.Tensor:
    """What MaskCo pools from a backbone that averages r x r pixels: it turns with the picture, as no ResNet does."""
    pool = SimpleNamespace(roi_cells=3, roi_samples=2)
    return MaskCo.pooled(pool, avg_pool2d(view, r), torch.from_numpy(boxes).float()[None], view.shape[-1])[0, 0]


def _errors(count, swap_edges=True, r=1, size=(250, 200)):
    """Distances in pixels of the picture between a region's centre and what RoIAlign reads there, (count, 2)."""
    errors, flips = [], set()
    for query, key, _, in_query, in_key in _pairs(SMALL, count, size):
        if not swap_edges and key.flip:  # the mistake: the box is not mirrored with the picture
            in_key = replace(key, flip=False).from_picture(query.to_picture(in_query)).clip(0, key.side)
        box = query.to_picture(in_query)[0]
        middle = torch.from_numpy((box[:2] + box[2:]) / 2)
        read = [_read(_where(view, size), boxes, r) for view, boxes in ((query, in_query), (key, in_key))]
        errors.append([(point - middle).norm().item() for point in read])
        flips.add((query.flip, key.flip))
    assert len(flips) == 4
    return np.array(errors)


@pytest.mark.parametrize("r", [1, 2])
def test_both_views_show_the_same_region(r):
    assert _errors(1000 if r == 1 else 100, r=r).max() < 1


def test_the_test_above_would_see_a_wrong_flip():
    assert _errors(60, swap_edges=False)[:, 1].max() > 10


def test_flipping_twice_is_nothing():
    boxes = np.random.default_rng(0).uniform(0, 224, (50, 4))
    view = View(3, 4, 50, 60, 224, True)
    np.testing.assert_allclose(view._flipped(view._flipped(boxes)), boxes)


def test_same_image_negatives_are_elsewhere():
    full = 0
    for *_, in_key in _pairs(FULL, 300):
        others, present = data.draw_negatives(in_key[0], FULL)
        assert others.shape == (2, 4) and present.dtype == bool
        full += present.all()
        iou = box_iou(torch.from_numpy(in_key), torch.from_numpy(others))[0].numpy()
        assert (iou[present] <= FULL.negative_iou).all()
        np.testing.assert_allclose(others[:, 2:] - others[:, :2], np.tile(in_key[0, 2:] - in_key[0, :2], (2, 1)))
        assert (others >= 0).all() and (others <= 224 + 1e-9).all()
    assert full > 150
    others, present = data.draw_negatives(np.array([0.0, 0, 224, 224]), FULL)
    assert not present.any(), "nothing fits beside a region that fills the view"


def test_a_sample_is_a_function_of_its_seed_and_the_key_view_is_whole():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    views = data.Views(RECIPES["mini"])
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(views(picture))
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    one = samples[0]
    assert {k: tuple(v.shape) for k, v in one.items()} == {
        "query": (3, 64, 64), "key": (3, 64, 64), "query_boxes": (1, 4), "key_boxes": (1, 4), "negatives": (1, 2, 4),
        "present": (1, 2), "fallback": (),
    }
    assert set(data.Views(replace(RECIPES["mini"], method="moco_v2"))(picture)) == {"query", "key"}
    with pytest.raises(UserError, match="does not fit into --overlap-px 20"):
        data.Views(replace(RECIPES["mini"], overlap_px=20, region_px=(19, 20)))


def test_a_region_outside_the_key_view_is_named(monkeypatch):
    """The arithmetic never gives one; if it did, a loading process would say which."""
    monkeypatch.setattr(data.View, "to_picture", lambda self, boxes: boxes + 1000)
    torch.manual_seed(0)
    views = data.draw_pair(Image.new("RGB", (640, 480)), FULL)[:2]
    with pytest.raises(ValueError, match=r"regions .* of View.* in View.*: expected inside it"):
        data.draw_regions(*views, FULL)


def test_noise_is_a_function_of_the_samples_seed():
    picture, views = Image.new("RGB", (60, 80)), data.Views(replace(RECIPES["mini"], mask="noise"))
    noise = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        noise.append(views(picture)["noise"])
    assert noise[0].shape == (3, 64, 64) and torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
