"""The tracker around the network: geometry, window, precision, the authors' errors and what is right."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from common import run
from common.metrics.trackers import hann_window
from papers.sbt.evaluate import build, make_tracker
from papers.sbt.model import Prediction, create_tracker
from papers.sbt.recipes import RECIPES
from papers.sbt.tracker import SBTTracker, best_token


class Brightest(nn.Module):
    """Stands in for a network: says that the target is the crop's bright pixels, on every token."""

    grid = 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, template):
        return template

    def predict(self, z, search):
        bright = search[0].mean(0) > 0.3  # half way between black and white, normalised
        rows, columns = (bright.any(axis).nonzero().flatten() for axis in (1, 0))
        low, high = torch.stack([columns[0], rows[0]]), torch.stack([columns[-1], rows[-1]]) + 1
        box = torch.cat([low + high, 2 * (high - low)]).float() / 2 / search.shape[-1]
        return Prediction(torch.zeros(1, 256, 2), box.expand(1, 256, 4))


# A template of 64 and a search crop of 128 pixels, else as published.
RECIPE = dataclasses.replace(RECIPES["full"], template_px=64, search_px=128)


def frame_with(x, y, w, h):
    frame = np.zeros((120, 160, 3), dtype=np.uint8)
    frame[y : y + h, x : x + w] = 255
    return frame


@pytest.mark.parametrize("authors_errors, off_px", [(False, 0.6), (True, 1.2)])
def test_follows_a_square_over_the_frame(authors_errors, off_px):
    tracker = SBTTracker(Brightest(), dataclasses.replace(RECIPE, authors_errors=authors_errors))
    tracker.init(frame_with(20, 20, 24, 18), (20, 20, 24, 18))
    for step in range(1, 12):
        x, y = 20 + 9 * step, 20 + 6 * step
        box, score = tracker.track(frame_with(x, y, 24, 18))
        np.testing.assert_allclose(box, (x, y, 24, 18), atol=off_px)
        assert score == 0.5


def test_the_window_decides_between_equals():
    window = hann_window(8)
    logits, boxes = torch.zeros(64, 2), torch.rand(64, 4)
    *box, score, windowed, cell = best_token(logits, boxes, window, 0.49).tolist()
    assert cell in (27, 28, 35, 36) and score == 0.5
    assert windowed == pytest.approx(0.51 * 0.5 + 0.49 * window.max().item())
    assert box == pytest.approx(boxes[int(cell)].tolist())
    logits[0, 0] = 9.0
    assert best_token(logits, boxes, window, 0.0)[-1] == 0 and best_token(logits, boxes, window, 0.6)[-1] != 0


def test_a_new_start_forgets_the_last_target():
    tracker = SBTTracker(Brightest(), RECIPE)
    for x in (20, 100):
        tracker.init(frame_with(x, 40, 20, 20), (x, 40, 20, 20))
        box, _ = tracker.track(frame_with(x + 3, 40, 20, 20))
        assert box[0] == pytest.approx(x + 3, abs=0.6)


def test_bf16_leaves_the_trained_weights_alone():
    torch.manual_seed(0)
    network = build(RECIPES["tiny"]).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    world = run.World(0, 1, torch.device("cpu"), torch.bfloat16)
    tracker = make_tracker(network, RECIPES["tiny"], world)
    frame = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    tracker.init(frame, (60, 40, 30, 30))
    box, score = tracker.track(frame)
    assert np.isfinite(box).all() and 0 < score < 1 and tracker.z.dtype == torch.bfloat16
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == torch.float32


def test_an_answer_that_is_not_finite_leaves_the_box_where_it_is():
    network = Brightest()
    tracker, frame = SBTTracker(network, RECIPE), frame_with(20, 20, 24, 18)
    tracker.init(frame, (20, 20, 24, 18))
    for logit, share in ((float("nan"), 0.5), (0.0, float("nan")), (0.0, float("inf"))):
        found = Prediction(torch.full((1, 256, 2), logit), torch.full((1, 256, 4), share))
        network.predict = lambda z, x, found=found: found
        assert tracker.track(frame) == ((20, 20, 24, 18), 0.0)


def test_an_empty_box_is_refused():
    tracker = SBTTracker(Brightest(), RECIPE)
    with pytest.raises(run.UserError, match="empty or not finite"):
        tracker.init(frame_with(1, 1, 2, 2), (10, 10, 0, 5))


def test_unknown_ways_to_run_a_network_are_refused():
    network = create_tracker("sbt_micro", search_size=64)
    with pytest.raises(run.UserError, match="no --speed 'fast'; there are eager, compile and graph"):
        SBTTracker(network, dataclasses.replace(RECIPE, speed="fast"))
    with pytest.raises(run.UserError, match="--speed graph is a CUDA graph and needs a GPU"):
        SBTTracker(network, dataclasses.replace(RECIPE, speed="graph"))


def test_compiled_tracker_gives_the_same_boxes(monkeypatch):
    torch.manual_seed(0)
    network, tiny = build(RECIPES["tiny"]).eval(), RECIPES["tiny"]
    frames = np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    answers, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend="eager", fullgraph=True))
    for speed in ("eager", "compile"):
        tracker = SBTTracker(network, dataclasses.replace(tiny, speed=speed))
        tracker.init(frames[0], (30.0, 20.0, 40.0, 30.0))
        answers.append([[*box, score] for box, score in map(tracker.track, frames[1:])])
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("speed", ["compile", "graph"])
def test_fast_paths_track_like_the_plain_one(speed):
    torch.manual_seed(0)
    network = build(RECIPES["tiny"]).eval().cuda()
    tiny = RECIPES["tiny"]
    frames = np.random.default_rng(0).integers(0, 256, (5, 120, 160, 3), dtype=np.uint8)
    tracks = []
    for tracker in (SBTTracker(network, tiny), SBTTracker(network, dataclasses.replace(tiny, speed=speed))):
        for start in (0, 1):  # a second sequence goes through the same graph
            tracker.init(frames[start], (60, 40, 30, 30))
            tracks.append([tracker.track(frame)[0] for frame in frames[start + 1 :]])
    np.testing.assert_allclose(np.concatenate(tracks[:2]), np.concatenate(tracks[2:]), atol=0.5)
