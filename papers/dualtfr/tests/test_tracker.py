"""Targets, loss, and the way from a token's answer to a box in the frame and back."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from common import run
from common.data import crops
from common.metrics.trackers import hann_window
from papers.dualtfr import loss, tracker
from papers.dualtfr.evaluate import build
from papers.dualtfr.model import Prediction
from papers.dualtfr.recipes import RECIPES
from papers.dualtfr.tracker import DualTFRTracker

TINY = RECIPES["tiny"]


# Targets -------------------------------------------------------------------------------------------------


def marked(box, grid):
    """Rows and columns of the target's tokens."""
    (found,) = loss.assign(torch.tensor([box]), grid).view(1, grid, grid)
    rows, columns = (torch.where(found.any(axis))[0].tolist() for axis in (1, 0))
    assert found.sum() == len(rows) * len(columns)  # a rectangle
    return rows, columns


@pytest.mark.parametrize("box, rows, columns", [
    ([0.30, 0.10, 0.45, 0.30], [1, 2, 3], [3, 4, 5]),  # columns: 3/8, 4/8 and 5/8 lie between 0.30 and 0.75
    ([0.25, 0.25, 0.25, 0.25], [2, 3], [2, 3]),  # a box on the grid's lines: the upper end is not in it
    ([0.26, 0.26, 0.05, 0.30], [3, 4], [3]),  # between two columns: the next one
    ([-0.20, 0.60, 0.30, 0.60], [5, 6, 7], [0]),  # sticks out at the left and the bottom
    ([0.90, 0.95, 0.30, 0.01], [7], [7]),  # beyond the last corner: the last
    ([-0.50, -0.50, 2.00, 2.00], list(range(8)), list(range(8))),
    ([1.10, 0.20, 0.20, 0.20], [], []),  # outside
    ([-0.30, 0.20, 0.25, 0.20], [], []),
])
def test_tokens_of_the_target(box, rows, columns):
    assert marked(box, 8) == (rows, columns)


def test_every_visible_box_has_a_token_inside_or_beside_it():
    rng = np.random.default_rng(0)
    for grid, _ in itertools.product((1, 7, 14), range(200)):
        w, h = rng.uniform(0.001, 1.2, 2)
        x, y = rng.uniform(-w, 1), rng.uniform(-h, 1)
        rows, columns = marked([x, y, w, h], grid)
        for tokens, low, high in ((columns, x, x + w), (rows, y, y + h)):
            assert tokens == list(range(tokens[0], tokens[-1] + 1))
            assert all(low - 1 / grid < token / grid < max(high, low + 1 / grid) for token in tokens)


# Loss ----------------------------------------------------------------------------------------------------


def answers(n=3, grid=4):
    torch.manual_seed(0)
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.5], [-0.1, 0.5, 0.4, 0.3], [2.0, 2.0, 0.1, 0.1]])[:n]
    return Prediction(torch.randn(n, grid**2, 2), torch.rand(n, grid**2, 4)), boxes, loss.assign(boxes, grid)


def test_loss_equals_its_formula():
    prediction, truth, target = answers()
    assert not target[2].any() and target[:2].any(1).all()
    cls, l1, giou, iou, weight, count = 0.0, 0.0, 0.0, 0.0, 0.0, 0
    for b, n in itertools.product(range(3), range(16)):
        p = prediction.logits[b, n].softmax(0)[0].item()
        if not target[b, n]:
            cls, weight = cls - 0.0625 * math.log(1 - p), weight + 0.0625
            continue
        cls, weight, count = cls - math.log(p), weight + 1, count + 1
        cx, cy, w, h = prediction.boxes[b, n].tolist()
        x, y, tw, th = truth[b].tolist()
        l1 += abs(cx - x - tw / 2) + abs(cy - y - th / 2) + abs(w - tw) + abs(h - th)
        across = min(cx + w / 2, x + tw) - max(cx - w / 2, x)
        down = min(cy + h / 2, y + th) - max(cy - h / 2, y)
        inter = max(across, 0) * max(down, 0)
        union = w * h + tw * th - inter
        hull = (max(cx + w / 2, x + tw) - min(cx - w / 2, x)) * (max(cy + h / 2, y + th) - min(cy - h / 2, y))
        giou += 1 - inter / union + (hull - union) / hull
        iou += inter / union
    ours = loss.terms(prediction, truth, target, loss.totals(target))
    assert [t.item() for t in ours] == pytest.approx(
        [cls / weight, l1 / count, giou / count, iou / count], rel=1e-5
    )


def test_losses_of_parts_add_up_to_that_of_the_batch():
    prediction, truth, target = answers()
    totals = loss.totals(target)
    whole = torch.stack(loss.terms(prediction, truth, target, totals))
    parts = [
        torch.stack(loss.terms(Prediction(*(t[rows] for t in prediction)), truth[rows], target[rows], totals))
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_a_batch_without_targets_trains_the_classifier_alone():
    prediction, truth, target = answers()
    cls, *boxes = loss.terms(Prediction(*(t[2:] for t in prediction)), truth[2:], target[2:], loss.totals(target[2:]))
    assert cls > 0 and boxes == [0, 0, 0]


def test_the_right_answer_costs_nothing():
    _, truth, target = answers(2)
    logits = torch.stack([target, ~target], -1).float() * 40
    boxes = torch.cat([truth[:, :2] + truth[:, 2:] / 2, truth[:, 2:]], 1)[:, None].expand(-1, 16, -1)
    cls, l1, giou, iou = loss.terms(Prediction(logits, boxes), truth, target, loss.totals(target))
    assert cls < 1e-6 and l1 < 1e-6 and giou < 1e-5 and iou > 1 - 1e-5


# Boxes and tracker ---------------------------------------------------------------------------------------


def test_the_window_decides_between_equals():
    logits = torch.zeros(1, 64, 2)
    logits[0, [9, 27], 0] = 3.0  # a token near the corner and one in the middle are equally sure
    boxes = torch.rand(1, 64, 4)
    chosen = tracker.best_token(logits[0], boxes[0], hann_window(8), 0.49)
    assert torch.equal(chosen[:4], boxes[0, 27]) and chosen[4].item() == pytest.approx(1 / (1 + math.exp(-3)))
    logits[0, 9, 0] = 9.0
    assert torch.equal(tracker.best_token(logits[0], boxes[0], hann_window(8), 0.0)[:4], boxes[0, 9])


class Oracle(torch.nn.Module):
    """A network that reads the target's place off the crop: the brightest square."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)
        self.backbone.reduction, self.encoded = 8, 0

    def encode(self, image):
        self.encoded += 1
        return image

    def predict(self, z, search):
        assert z.shape[-1] == 32 and search.shape[-1] == 64
        bright = search[0].mean(0) > 1.5
        rows, columns = (torch.where(bright.any(axis))[0] for axis in (1, 0))
        box = [(columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2, len(columns), len(rows)]
        boxes = torch.tensor(box).expand(1, 64, 4) / 64
        return Prediction(torch.zeros(1, 64, 2), boxes)


@pytest.mark.parametrize("box", [(40.0, 30.0, 50.0, 60.0), (5.0, 90.0, 33.0, 21.5), (250.3, 150.1, 90.0, 14.0)])
def test_box_into_the_crop_and_back(box):
    """What the network says in fractions of the crop around the last box is a box of the frame."""
    network, frame = Oracle(), np.zeros((240, 360, 3), dtype=np.uint8)
    follower = DualTFRTracker(network, TINY)
    for last, size in itertools.product([box, (60.0, 50.0, 40.0, 40.0)], (64, 224)):
        follower.recipe = dataclasses.replace(TINY, search_px=size)
        crop = crops.around(last, TINY.search_factor, size)
        x, y, w, h = crop.to_crop(box) / size
        boxes = torch.tensor([x + w / 2, y + h / 2, w, h]).expand(1, 64, 4)
        network.predict = lambda z, search, boxes=boxes: Prediction(torch.zeros(1, 64, 2), boxes)
        follower.init(frame, last)
        np.testing.assert_allclose(follower.track(frame)[0], box, atol=1e-4)


def test_a_right_answer_becomes_the_right_box():
    network = Oracle()
    follower = DualTFRTracker(network, TINY)
    for start in ((60, 40), (100, 20)):  # two targets: nothing is left of the first
        place = np.array(start)
        for step in range(6):
            frame = np.zeros((120, 160, 3), dtype=np.uint8)
            frame[place[1] : place[1] + 24, place[0] : place[0] + 32] = 255
            if not step:
                follower.init(frame, (*map(float, place), 32.0, 24.0))
            else:
                box, score = follower.track(frame)
                np.testing.assert_allclose(box, (*place, 32, 24), atol=1.5)
                assert score == 0.5
            place += (4, 3)
    assert network.encoded == 2  # the template's branch, once for each sequence


def test_an_answer_that_is_not_finite_leaves_the_box_where_it_is():
    network = Oracle()
    follower = DualTFRTracker(network, TINY)
    frame = np.zeros((120, 160, 3), dtype=np.uint8)
    follower.init(frame, (60.0, 40.0, 32.0, 24.0))
    for logit, share in ((float("nan"), 0.5), (0.0, float("nan")), (0.0, float("inf"))):
        found = Prediction(torch.full((1, 64, 2), logit), torch.full((1, 64, 4), share))
        network.predict = lambda z, x, found=found: found
        assert follower.track(frame) == ((60.0, 40.0, 32.0, 24.0), 0.0)


def test_compiled_tracker_gives_the_same_boxes(monkeypatch):
    torch.manual_seed(0)
    model = build(TINY).eval()
    frames = np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    answers, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend="eager", fullgraph=True))
    for speed in ("eager", "compile"):
        follower = DualTFRTracker(model, dataclasses.replace(TINY, speed=speed))
        follower.init(frames[0], (30.0, 20.0, 40.0, 30.0))
        answers.append([[*box, score] for box, score in map(follower.track, frames[1:])])
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5)
    with pytest.raises(run.UserError, match="no --speed 'fast'; there are eager and compile"):
        DualTFRTracker(model, dataclasses.replace(TINY, speed="fast"))


def test_half_precision_stays_near():
    torch.manual_seed(0)
    model = build(TINY).eval()
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    boxes, half = [], copy.deepcopy(model).bfloat16()
    found = half(torch.randn(1, 3, 32, 32).bfloat16(), torch.randn(1, 3, 64, 64).bfloat16()).boxes
    assert (found != found.bfloat16()).any()  # finer than bfloat16 can say
    for precision in (torch.float32, torch.bfloat16):
        follower = DualTFRTracker(model, TINY, precision)
        follower.init(frames[0], (30.0, 20.0, 40.0, 30.0))
        boxes.append(follower.track(frames[1])[0])
    assert next(model.parameters()).dtype == torch.float32
    np.testing.assert_allclose(*boxes, atol=0.75)
