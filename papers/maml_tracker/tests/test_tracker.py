"""The online part, step by step and on a moving square."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from common.data import crops
from common.run import World
from papers.maml_tracker.data import corners, crop_around, cut
from papers.maml_tracker.evaluate import build
from papers.maml_tracker.maml import multi_step_weights
from papers.maml_tracker.model import Crops, Detector
from papers.maml_tracker.recipes import RECIPES
from papers.maml_tracker.tracker import MAMLTracker, SupportSet, change_penalty

WORLD = World(0, 1, torch.device("cpu"), None)
TINY = RECIPES["tiny"]
CELLS = 256


class Scripted(MAMLTracker):
    """A tracker whose detector answers what the test wants: one box in crop pixels, its score, a rival's score, the
    highest score of all."""

    def answer(self, box_xyxy, score, rival=0.0, penalty=1.0, highest=None):
        highest = max(score, rival) if highest is None else highest
        self.detect = lambda *_: torch.tensor([*box_xyxy, penalty, score, rival, highest])


def tracker(kind=MAMLTracker, seed=0, **changes):
    torch.manual_seed(seed)
    recipe = dataclasses.replace(TINY, **changes)
    return kind(build(recipe).eval(), recipe, WORLD)


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (180, 240, 3), dtype=np.uint8)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# Support set ---------------------------------------------------------------------------------------------


def entry(value, count=1):
    return Crops(
        torch.full((count, 2, 3, 3), float(value)), torch.full((count, 4), float(value)), torch.ones(count).bool(),
        torch.ones(count),
    )


def test_the_oldest_crop_leaves_and_the_first_frame_stays():
    support = SupportSet(entry(100, 3), buffer=4)
    assert support.filled().x[:, 0, 0, 0].tolist() == [100] * 3 and support.slots.weight.tolist() == [1] * 3 + [0] * 4
    for value in range(6):
        support.put(entry(value))
        assert len(support.filled().x) == 3 + min(value + 1, 4) == support.slots.weight.sum()
    assert support.filled().x[:, 0, 0, 0].tolist() == [100] * 3 + [4, 5, 2, 3]
    assert support.filled().box_xyxy[:, 0].tolist() == [100] * 3 + [4, 5, 2, 3]
    support = SupportSet(entry(1, 3), buffer=0)
    support.put(entry(2))
    assert len(support.filled().x) == 3


def test_empty_slots_change_nothing():
    one = tracker()
    one.init(noise(), (60, 50, 40, 30))
    one.support.put(Crops(*(x[1:2] for x in one.support.slots)))
    whole, filled = (one.maml.adapt(s, 2, one.theta) for s in (one.support.slots, one.support.filled()))
    for name in whole:
        torch.testing.assert_close(whole[name], filled[name])


# Steps ----------------------------------------------------------------------------------------------------


def test_penalty():
    last = torch.tensor([32.0, 32.0])
    boxes = torch.tensor([[32.0, 32.0], [64.0, 64.0], [16.0, 16.0], [64.0, 32.0]])
    p = change_penalty(boxes, last, 0.04).tolist()
    assert p[0] == 1 and p[1] == pytest.approx(p[2]) == pytest.approx(math.exp(-0.04))
    assert p[3] == pytest.approx(math.exp(-0.04 * (2 * math.sqrt(112 * 80) / 64 - 1)))
    assert change_penalty(boxes, last, 0.0).tolist() == [1] * 4


def test_the_best_box_is_chosen_by_penalised_score_and_window():
    one = tracker(penalty_k=0.1, window=0.3)
    boxes, scores = torch.rand(CELLS, 4) * 40, torch.rand(CELLS)
    boxes[:, 2:] += boxes[:, :2] + 5
    one.maml.call = lambda *_: (boxes[None], scores[None])
    last = torch.tensor([30.0, 24.0])
    *box, penalty, score, rival, highest = one.detect({}, None, last).tolist()
    assert highest == scores.max().item()
    hann = np.outer(np.hanning(16), np.hanning(16)).ravel()
    best, top, anchors = -1, -1.0, one.maml.detector.head.anchors
    for i in range(CELLS):
        w, h = (boxes[i, 2:] - boxes[i, :2]).tolist()
        size = [math.sqrt((a + (a + b) / 2) * (b + (a + b) / 2)) for a, b in ((w, h), (30, 24))]
        aspect, change = (w / h) / (30 / 24), size[0] / size[1]
        p = math.exp(-0.1 * (max(aspect, 1 / aspect) * max(change, 1 / change) - 1))
        if (value := scores[i].item() * p * 0.7 + 0.3 * hann[i]) > top:
            best, top, wanted = i, value, p
    assert box == boxes[best].tolist() and score == scores[best].item() and penalty == pytest.approx(wanted, rel=1e-5)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    beyond = [i for i in range(CELLS)
              if not (box[0] <= centres[i, 0] <= box[2] and box[1] <= centres[i, 1] <= box[3])]
    assert rival == max(scores[i].item() for i in beyond) and len(beyond) < CELLS


def test_size_follows_slowly_and_the_box_stays_in_the_frame():
    one = tracker(Scripted, size_lr=0.3, online_update=False)
    box, frame = (100.0, 60.0, 40.0, 30.0), noise()
    one.init(frame, box)
    crop = crop_around(box, one.recipe)
    found = corners(crop, (110, 70, 60, 20))
    one.answer(found, score=0.5, penalty=0.8)
    (x, y, w, h), score = one.track(frame)
    assert score == 0.5 and (w, h) == pytest.approx((0.88 * 40 + 0.12 * 60, 0.88 * 30 + 0.12 * 20), abs=1e-4)
    assert (x + w / 2, y + h / 2) == pytest.approx((140, 80), abs=1e-4)

    one.init(frame, box)
    one.answer(corners(crop, (-500, 900, 4000, 1)), score=1.0)
    for _ in range(20):
        one.answer(corners(crop_around(one.box, one.recipe), (-500, 900, 1, 1)), score=1.0)
        x, y, w, h = one.track(frame)[0]
        assert 0 <= x + w / 2 <= 240 and 0 <= y + h / 2 <= 180 and w >= 10 and h >= 10
    assert (w, h) == (10, 10)
    for _ in range(20):
        one.answer(corners(crop_around(one.box, one.recipe), (0, 0, 4000, 4000)), score=1.0)
        *_, w, h = one.track(frame)[0]
    assert (w, h) == (240, 180)

    before = one.box
    for found, score in (([math.nan, 0, 10, 10], 0.9), ([0, 0, 10, 10], math.nan)):
        one.answer(found, score)
        assert one.track(frame) == (before, 0.0)


def learn_events(rows, **changes):
    """Frames at which the tracker learned, for (score, rival) in each frame."""
    one = tracker(Scripted, buffer=4, **changes)
    one.init(noise(), (100, 60, 40, 30))
    first, events = one.theta, []
    for number, (score, rival) in enumerate(rows, 1):
        before = one.theta
        one.answer(corners(crop_around(one.box, one.recipe), (100, 60, 40, 30)), score, rival)
        one.track(noise(number))
        if not same(before, one.theta):
            events.append(number)
    assert one.updates == len(events)
    assert bool(events) == (not same(first, one.theta))
    return events, one.support


def test_updates_come_every_u_frames_whatever_the_score_and_at_once_for_a_distractor():
    sure, unsure, distracted = (0.9, 0.0), (0.11, 0.0), (0.9, 0.7 * 0.9 + 0.01)
    options = {"update_every": 3, "distractor": 0.7, "rest": 2}
    assert learn_events([sure] * 7, **options)[0] == learn_events([unsure] * 7, **options)[0] == [3, 6]
    assert learn_events([sure, distracted, sure, sure], **options)[0] == [2, 3]
    assert learn_events([distracted] * 7, **options)[0] == [1, 3, 5, 6]  # a crowd: after a rest, and every third frame
    assert learn_events([sure, distracted, sure], online_update=False, **options)[0] == []
    events, support = learn_events([sure, unsure, sure], **options)
    assert support.entered == 3
    events, support = learn_events([sure, unsure, sure], accept=0.8, **options)
    assert events == [3] and support.entered == 2
    assert learn_events([sure] * 3, online_update=False, **options)[1].entered == 0


def test_where_every_score_is_below_a_tenth_the_box_stays_and_the_frame_is_skipped():
    one = tracker(Scripted, update_every=1)
    box = (100.0, 60.0, 40.0, 30.0)
    one.init(noise(), box)
    theta, elsewhere = one.theta, corners(crop_around(box, one.recipe), (120, 70, 60, 20))
    one.answer(elsewhere, score=0.02, highest=0.0999)
    assert one.track(noise(1)) == (box, pytest.approx(0.0999))
    assert one.theta is theta and one.support.entered == 0 and one.updates == 0
    one.answer(elsewhere, score=0.02, highest=0.1001)  # one that the penalty and the window kept from being chosen
    assert one.track(noise(2))[0] != box and one.support.entered == 1 and one.updates == 1


def test_what_joins_the_support_set_is_the_crop_with_the_interpolated_box():
    one = tracker(Scripted)
    box = (100.0, 60.0, 40.0, 30.0)
    one.init(noise(), box)
    crop = crop_around(box, one.recipe)
    found = corners(crop, (104, 66, 50, 20))
    one.answer(found, score=0.9)
    now, _ = one.track(noise(1))
    kept = Crops(*(x[3] for x in one.support.filled()))
    np.testing.assert_allclose(kept.box_xyxy, corners(crop, now), rtol=1e-5)
    assert not np.allclose(kept.box_xyxy, found, rtol=1e-2)  # the size follows slowly
    pixels = crops.to_tensor(cut(noise(1), crop))[None]
    torch.testing.assert_close(kept.x, one.maml.detector.features(pixels)[0].detach())


def test_the_first_frame_is_learned_by_the_given_number_of_steps_and_zooms():
    frame, box = noise(), (100, 60, 40, 30)
    for steps, zoom in ((0, 1.08), (5, 1.08), (2, 1.0)):
        one = tracker(first_steps=steps, zoom=zoom)
        one.init(frame, box)
        support = one.support.filled()
        assert len(support.x) == (1 if zoom == 1 else 3)
        expected = one.maml.adapt(support, steps)
        assert same(one.theta, expected) and same(expected, one.maml.theta_0()) == (steps == 0)


def test_a_tracker_forgets_the_last_target_and_leaves_the_network_alone():
    one = tracker(hold=0.0, update_every=2, distractor=2.0)
    weights = {name: value.clone() for name, value in one.maml.state_dict().items()}

    def follow(seed):
        one.init(noise(seed), (100, 60, 40, 30))
        return [one.track(noise(seed + i)) for i in range(1, 5)]

    first = follow(0)
    follow(50)
    assert follow(0) == first and one.updates == 2
    assert all(torch.equal(value, weights[name]) for name, value in one.maml.state_dict().items())


def test_a_compiled_tracker_leaves_the_network_to_others():
    one = tracker(speed="compile")
    plain = one.maml.objective
    others = [MAMLTracker(one.maml, dataclasses.replace(TINY, speed=speed), WORLD) for speed in ("compile", "eager")]
    assert "objective" not in vars(one.maml) and one.maml.objective == plain == others[1].objective
    assert one.objective != plain and others[0].objective != one.objective


@pytest.mark.slow
def test_compiled_equals_eager():
    small = {"head": "fcos", "head_width": 8, "head_depth": 1, "crop_px": 63, "anchor_px": 16, "window": 0.9}
    eager, compiled = (tracker(speed=speed, buffer=3, **small) for speed in ("eager", "compile"))
    box, frame = (100, 60, 40, 30), noise()
    for one in (eager, compiled):
        one.init(frame, box)
    for name, parameter in eager.theta.items():
        torch.testing.assert_close(compiled.theta[name], parameter, rtol=1e-3, atol=1e-5)
    (found, score), (expected, wanted) = compiled.track(noise(1)), eager.track(noise(1))
    assert found == pytest.approx(expected, abs=0.05) and score == pytest.approx(wanted, rel=1e-2)


# The claim, in miniature ----------------------------------------------------------------------------------


def squares(rng, recipe):
    """Ds and Dt of a video: a red and a blue square that move; one of them is the target, and only Ds says which."""
    colours, sets = rng.permutation([(230, 60, 40), (40, 90, 220)]), []
    side, square = recipe.crop_px, recipe.anchor_px
    for _ in range(2):
        frame = np.full((side, side, 3), 128, np.uint8) + rng.integers(-8, 8, (side, side, 3)).astype(np.uint8)
        columns = rng.permutation(3)[:2] * square + rng.integers(2, 14, 2)
        for colour, x, y in zip(colours[::-1], columns[::-1], rng.integers(4, side - square - 4, 2)):
            frame[y : y + square, x : x + square] = colour
        truth = torch.tensor([[x, y, x + square, y + square]]).float()
        sets.append(Crops(crops.to_tensor(frame)[None], truth, torch.ones(1).bool(), torch.ones(1)))
    return sets


def test_a_few_outer_steps_make_gradient_steps_tell_the_target_from_its_distractor():
    torch.manual_seed(0)
    recipe = dataclasses.replace(TINY, head_width=16, head_depth=1, crop_px=63, anchor_px=16)
    maml, rng = build(recipe), np.random.default_rng(0)
    detector, rates = ({"params": part.parameters()} for part in (maml.detector, maml.rates))
    optimizer = torch.optim.Adam([detector, rates | {"lr": 2e-3}], lr=3e-3)
    for _ in range(120):  # as in training, a detector first: it finds both squares
        _, targets = zip(*(squares(rng, recipe) for _ in range(8)))
        optimizer.zero_grad()
        maml(None, Crops(*map(torch.cat, zip(*targets))), torch.ones(1)).backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.5e-3
    gamma = multi_step_weights("uniform", 2)
    for _ in range(60):
        optimizer.zero_grad()
        for _ in range(4):
            (maml(*squares(rng, recipe), gamma) * gamma).sum().backward()
        optimizer.step()
        maml.clamp_rates()
    found = {0: [], 3: []}
    for _ in range(30):
        support, target = (maml.prepare(maml.detector, each) for each in squares(rng, recipe))
        for steps, overlaps in found.items():
            boxes, scores = maml.call(maml.adapt(support, steps), Detector.predict, target.x)
            overlaps.append(box_iou(boxes[0, scores[0].argmax()][None], target.box_xyxy).item())
    overlap = {steps: np.mean(overlaps) for steps, overlaps in found.items()}
    assert overlap[3] > overlap[0] + 0.2 and overlap[3] > 0.65, overlap
