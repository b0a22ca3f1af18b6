"""Whatever boxes come in, what comes out is an embedding or one line; never a crash or foreign memory."""

import itertools
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from common.run import ROOT
from papers.mm_gem import build, demo
from papers.mm_gem.configuration import InputError
from papers.mm_gem.pooling import PoolAggregator, clipped
from papers.mm_gem.processing import wrong_box
from papers.mm_gem.recipes import RECIPES

NAN, INF = math.nan, math.inf
FUZZ = "from common import run; from papers.mm_gem.tests.test_boxes import fuzz; run.main(fuzz)"


def fuzz() -> None:
    """Hundreds of odd boxes; at the end the last refusal, if any. Runs in a process of its own."""
    processor = build.processor(RECIPES["tiny"])
    model = build.model(RECIPES["tiny"], processor).eval()
    picture, pixels = Image.effect_noise((50, 40), 80).convert("RGB"), torch.randn(3, 3, 64, 64)
    texts = processor.texts(["a red circle ."])
    ways = {
        "region": lambda box: model.encode_region(pixels, torch.tensor([box])),
        "loss": lambda box: model(pixel_values=pixels, boxes=torch.tensor([box]), **texts).loss_gen[None],
        "generate": lambda box: model.generate(pixels, torch.tensor([box]), max_new_tokens=1).float(),
        "processor": lambda box: processor(images=[picture], boxes=[[box[1:]]])["boxes"],
    }
    values, choose = (NAN, INF, -INF, -1e30, 1e30, -1, 0, 0.5, 7, 63.9, 64, 3e-39, 2.0**31), random.Random(0)
    odd = [[choose.choice(values) for _ in range(5)] for _ in range(300)]
    # and one value off at a time, which the draw may miss
    odd += [[*(good := [0, 5, 5, 40, 40])[:i], value, *good[i + 1 :]] for i, value in
            itertools.product(range(5), values)]
    for embedded in ways.values():
        refused, passed = [], 0
        for box in odd:
            try:
                with torch.inference_mode():
                    found = embedded([float(v) for v in box])
                assert found.isfinite().all(), box
                passed += 1
            except InputError as error:
                assert "\n" not in str(error)
                refused.append(error)
        print(passed, len(refused))
    raise refused[-1]


def test_odd_boxes_are_refused_in_one_line():
    done = subprocess.run([sys.executable, "-c", FUZZ], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 4 and all(passed > 10 and refused > 100 for passed, refused in counts)
    assert done.stderr.splitlines()[-1].startswith("error: box ")


@pytest.mark.parametrize(("box", "message"), [
    ([0, NAN, 0, 9, 9], r"box 1, \[.*nan.*\], is not of finite numbers"),
    ([0, 0, 0, INF, 9], "box 1, .* is not of finite numbers"),
    ([9, 0, 0, 9, 9], "box 1 is of image 9, but there are 3 images, counted from 0"),
    ([1e6, 0, 0, 9, 9], "box 1 is of image 1e.06"),
    ([-1, 0, 0, 9, 9], "box 1 is of image -1"),
    ([0.5, 0, 0, 9, 9], "box 1 is of image 0.5"),
    ([0, 9, 0, 9, 9], "box 1, .* is empty in the image of 40 x 30 px"),
    ([0, 50, 0, 90, 9], "box 1, .* is empty in the image of 40 x 30 px"),
])
def test_what_is_wrong_with_a_box_is_said(box, message):
    boxes = torch.tensor([[2.0, -5, 3, 99, 12], box])
    with pytest.raises(InputError, match=message):
        PoolAggregator(4)(torch.randn(3, 5, 7, 7), boxes, (30, 40))
    assert clipped(boxes[:1], 3, (30, 40)).tolist() == [[2, 0, 3, 40, 12]]


def test_boxes_have_five_columns():
    with pytest.raises(InputError, match=r"boxes of shape \(1, 4\); expected \(R, 5\)"):
        clipped(torch.zeros(1, 4), 1, (9, 9))


@pytest.mark.parametrize(("box", "message"), [
    ((NAN, 0, 5, 5), "not of finite numbers"), ((0, 0, 5), "not four numbers"), (None, "not four numbers"),
    (("a", 0, 5, 5), "not four numbers"), ((9, 0, 9, 5), "holds nothing"), ((0, 0, 5, 5), "^$"),
])
def test_boxes_of_a_picture(box, message):
    assert re.search(message, wrong_box(box, Image.new("RGB", (9, 9))))


def test_a_box_of_the_command_line_is_looked_at(tmp_path, monkeypatch):
    processor = build.processor(RECIPES["smoke"])
    for part in (build.model(RECIPES["smoke"], processor), processor):
        part.save_pretrained(tmp_path / "model")
    Image.effect_noise((50, 40), 80).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "model"), "--box", "nan", "3", "20", "30"]
    monkeypatch.setattr("sys.argv", ["demo", *words])
    with pytest.raises(InputError, match="not of finite numbers"):
        demo.main()
