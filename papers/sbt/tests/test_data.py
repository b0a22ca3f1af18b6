"""Crops: the authors' own numbers, and their errors beside the right ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import crops, pairs, tracking
from papers.sbt.data import AuthorsTransform, authors_around, authors_frame, transform
from papers.sbt.recipes import RECIPES

FIXTURES = Path(__file__).parent / "fixtures"
CROPS = json.loads((FIXTURES / "crops.json").read_text())


@pytest.mark.parametrize("case", CROPS["cases"], ids=lambda case: str(case["index"]))
def test_a_crop_is_the_authors(case):
    with np.load(FIXTURES / "crops_a.npz") as images:
        frame, expected, mask = (images[f"{name}"] for name in (
            "image", f"crop_{case['index']}", f"padmask_{case['index']}"))
    crop, seen = crops.around(case["box_xywh"], case["factor"], case["out_size"]), authors_frame(frame)
    geometry = case["geometry"]
    assert (crop.left, crop.top, crop.side) == (geometry["x1"], geometry["y1"], geometry["side"])
    assert crop.scale == case["resize_factor"]
    np.testing.assert_array_equal(crops.cut(seen, crop), expected)
    np.testing.assert_array_equal(crops.padding(crop, seen.shape[1], seen.shape[0]), mask)
    pixels = crops.normalize(crops.to_tensor(expected))
    np.testing.assert_allclose(pixels.mean(), case["normalised_mean"], atol=1e-5)
    np.testing.assert_allclose(pixels.std(correction=0), case["normalised_std"], rtol=1e-5)


@pytest.mark.parametrize("case", CROPS["box_to_crop"])
def test_a_box_in_a_crop_is_the_authors(case):
    size = case["crop_size"]
    crop = authors_around(case["crop_around_xywh"], case["factor"], size, (size - 1) / 2)
    assert crop.scale == pytest.approx(case["resize_factor"], rel=1e-12)
    np.testing.assert_allclose(crop.to_crop(case["gt_xywh"]) / size, case["box_in_crop_xywh_normalised"], atol=1e-6)


@pytest.mark.parametrize("case", CROPS["jitter"])
def test_jitter_is_the_authors(case):
    moved = crops.jitter(
        case["box_xywh"], case["centre_factor"], case["scale_factor"], case["normal_for_wh"], case["uniform_for_centre"]
    )
    np.testing.assert_allclose(moved, case["jittered_xywh"], rtol=1e-5, atol=1e-4)


def test_the_center_of_an_authors_crop_lies_where_asked():
    rng = np.random.default_rng(0)
    for _ in range(200):
        (x, y), (w, h) = rng.uniform(-300, 900, 2), rng.uniform(0.5, 500, 2)
        crop = authors_around((x, y, w, h), 2.5, 127, 63.0)
        left, top, width, height = crop.to_crop((x, y, w, h))
        assert [left + width / 2, top + height / 2] == pytest.approx([63.0, 63.0], abs=1e-6)
        other = rng.uniform(1, 200, (2, 4))
        np.testing.assert_allclose(crop.to_frame(crop.to_crop(other)), other, atol=1e-6)


def test_the_authors_lose_the_last_row_and_column():
    frame = np.full((20, 30, 3), 200, np.uint8)
    corner = crops.square(30, 20, 10, 10)  # its upper left quarter is in the frame
    assert (crops.cut(frame, corner) == 200).all(2).sum() == 25
    assert (crops.cut(authors_frame(frame), corner) == 200).all(2).sum() == 16


@pytest.mark.parametrize("box", [(60, 50, 30, 22), (0, 0, 24, 30), (130, 100, 30, 20), (150, 3, 10, 40)])
def test_training_pairs_err_as_the_authors_do_and_not_otherwise(box):
    """The target lies in its box: to a pixel, or to the authors' half pixel and lost column beyond that."""
    frame = np.full((120, 160, 3), 30, np.uint8)
    x, y, w, h = box
    frame[y : y + h, x : x + w] = (250, 120, 60)
    sequence = tracking.Sequence("a", "otb", (), np.array([box], float), np.ones(1, bool))
    sample = pairs.Sample(frame, sequence.boxes[0], sequence)
    recipe = dataclasses.replace(RECIPES["full"], template_px=96, search_px=128, brightness=0, gray=0)
    found, errors = 0, {False: [], True: []}
    for seed in range(60):
        for erring in errors:
            cut = transform(dataclasses.replace(recipe, authors_errors=erring))
            assert isinstance(cut, AuthorsTransform) == erring
            made = cut([sample, sample], np.random.default_rng(seed))
            if made is None:
                continue
            for name, side in (("template", 96), ("search", 128)):
                pixels, (x, y, w, h) = made[name], (made[f"{name}_box"].numpy() * side)
                assert pixels.shape == (3, side, side) and pixels.dtype == torch.uint8
                rows, columns = (np.flatnonzero((pixels[0] > 140).any(axis)) for axis in (1, 0))
                if not len(rows) or rows[0] == 0 or columns[0] == 0 or rows[-1] == side - 1 or columns[-1] == side - 1:
                    continue
                found += 1
                off = [columns[0] - x, rows[0] - y, columns[-1] + 1 - x - w, rows[-1] + 1 - y - h]
                errors[erring].append(np.abs(off).max())
                assert errors[erring][-1] <= 1 + (1.6 * w / box[2] if erring else 0)
    assert found > 50 and max(errors[True]) > 1 >= max(errors[False])
