"""Crops of frames: where pixels and boxes come to lie, the way back, and what lies outside the frame."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.data import crops
from common.data.tiny import sequences as tiny
from common.run import UserError

PLACES, SIDES = st.floats(-300, 900), st.floats(0.5, 500)
BOXES = st.tuples(PLACES, PLACES, SIDES, SIDES)


@given(box=BOXES, other=BOXES, factor=st.floats(1, 6), size=st.sampled_from([33, 127, 256]))
def test_into_the_crop_and_back(box, other, factor, size):
    crop = crops.around(other, factor, size)
    np.testing.assert_allclose(crop.to_frame(crop.to_crop([box, other])), [box, other], atol=1e-3, rtol=0)
    (x, y, w, h), middle = crop.to_crop(other), size / 2
    assert w * h == pytest.approx((size / factor) ** 2, rel=0.05 + 2 * factor / crop.side)  # side is rounded up
    off = np.array([x + w / 2 - middle, y + h / 2 - middle])
    assert abs(off).max() <= 0.5 * crop.scale + 1e-6


@pytest.mark.parametrize("cx, cy, side, size", [
    (100.0, 60.0, 80, 64), (3.2, 7.9, 81, 128), (190, 95, 60, 33), (97.5, 51.5, 21, 256), (60, 40, 400, 32),
])
def test_pixels_come_to_lie_where_boxes_say(cx, cy, side, size):
    """In a frame whose pixels hold their own coordinates, at the borders and in the branch for wide crops too."""
    y, x = np.mgrid[:120, :200]
    frame = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    crop = crops.square(cx, cy, side, size)
    rows, columns = (~crops.padding(crop, 200, 120)).nonzero()
    assert len(rows) > 8
    values = crops.cut(frame, crop)[rows, columns, :2]
    points = crop.to_frame(np.stack([columns + 0.5, rows + 0.5, 0 * rows, 0 * rows], -1))[:, :2] - 0.5
    first, last = np.maximum((crop.left, crop.top), 0), np.minimum((crop.left + side, crop.top + side), (200, 120)) - 1
    inside = ((points >= first) & (points <= last)).all(1)  # in the outermost half pixel the border is repeated
    off = (values - points)[inside]  # OpenCV rounds to whole levels, a little unevenly
    assert inside.mean() > 0.7 and np.abs(off).max() < 0.8 and np.abs(off.mean(0)).max() < 0.2


def test_a_wide_crop_equals_the_padded_copy():
    photo = tiny._photo("china.jpg")
    crop = crops.square(200, 150, 900, 100)
    direct = crops.cut(photo, crop, "mean")
    big = crops.cut(photo, crops.square(200, 150, 900, 113), "mean")  # below the limit: through a padded copy
    resized = np.asarray(Image.fromarray(big).resize((100, 100), Image.BILINEAR), dtype=float)
    assert np.abs(direct - resized).mean() < 12  # sampled at other points of the same picture
    assert (direct[-5:, -5:] == np.round(photo.mean((0, 1)))).all() and (big[-5:, -5:] == direct[-1, -1]).all()


def test_outside_the_frame():
    frame = np.full((20, 30, 3), 200, np.uint8)
    beside = crops.square(-40, 10, 20, 16)
    assert (crops.cut(frame, beside, (1, 2, 3)) == (1, 2, 3)).all() and crops.padding(beside, 30, 20).all()
    corner = crops.square(30, 20, 10, 10)  # its upper left quarter is in the frame
    assert (crops.cut(frame, corner, 7) == np.where(crops.padding(corner, 30, 20), 7, 200)[..., None]).all()
    assert crops.padding(corner, 30, 20).sum() == 75
    for box in ([1, 2, 0, 5], [1, 2, 3, -1], [np.nan, 1, 2, 3]):
        with pytest.raises(UserError, match="cannot crop"):
            crops.around(box, 2, 16)
