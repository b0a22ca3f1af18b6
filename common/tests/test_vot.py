"""A tracker that answers the VOT toolkit by TraX."""

import subprocess
import sys

import numpy as np
import pytest

from common import run
from common.metrics.trackers import baselines, vot
from common.run import UserError
from common.tests.squares import make_sequences


def test_a_trax_client_gets_its_answers(tmp_path):
    """The whole protocol, in a process: targets of three kinds, each answered in the kind asked for."""
    pytest.importorskip("six")  # which vot-trax does not declare
    trax = pytest.importorskip("trax")
    from trax.client import Client

    (sequence,) = make_sequences(tmp_path, lengths=(4,))
    x, y, w, h = sequence.boxes[0].astype(int).tolist()
    mask = np.zeros((60, 80), np.uint8)
    mask[y:y + h, x:x + w] = 1
    corners = [(x, y), (x + w - 1, y), (x + w - 1, y + h - 1), (x, y + h - 1)]
    command = [sys.executable, "-m", "common.metrics.trackers.vot", "ncc", "--region", "polygon"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=run.ROOT)
    client = Client((process.stdin.fileno(), process.stdout.fileno()), log=lambda _: None)
    images = [{"color": trax.FileImage.create(str(path))} for path in sequence.frames]
    for target in (trax.Rectangle.create(x, y, w, h), trax.Polygon.create(corners), trax.Mask.create(mask)):
        ((answer, _),), _ = client.initialize(images[0], [(target, {})], {})
        assert list(answer) == corners
        for image, true in zip(images[1:], sequence.boxes[1:]):
            ((answer, properties),), _ = client.frame(image, {}, [])
            assert answer.type == "polygon" and float(properties["confidence"]) > 0.9
            np.testing.assert_allclose(vot.region_to_box(answer), true, atol=0.01)
    client.quit()
    assert process.wait(20) == 0


def test_boxes_as_regions_and_back():
    pytest.importorskip("six")
    pytest.importorskip("trax")
    for kind in ("rectangle", "polygon", "mask"):
        region = vot.box_to_region((7, 3, 10, 4), kind, (60, 80))
        assert region.type == kind and vot.region_to_box(region) == (7, 3, 10, 4)
    drawn = vot.box_to_region((-5.2, 3.6, 10, 4), "mask", (60, 80))
    assert drawn.offset() == (0, 4) and drawn.array().shape == (4, 5) and drawn.array().all()
    assert not vot.box_to_region((90, 3, 10, 4), "mask", (60, 80)).array().any()
    assert vot.box_to_region((np.nan, 3, 10, 4), "rectangle", (60, 80)).bounds() == (0, 0, 0, 0)
    with pytest.raises(UserError, match="empty mask"):
        vot.region_to_box(vot.box_to_region((np.nan, 3, 10, 4), "mask", (60, 80)))


def test_without_vot_trax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trax", None)
    with pytest.raises(UserError, match="pip install vot-trax six"):
        vot.serve(baselines.StaticBox())
