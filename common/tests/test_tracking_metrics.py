"""Tracking scores against what the public toolkits computed, and against cases worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.metrics import tracking
from common.metrics.tracking import Track

FIXTURES = Path(__file__).parent / "fixtures" / "tracking_metrics"
PRIMITIVES, EXPECTED, SEQUENCES = (
    json.loads((FIXTURES / f"{name}.json").read_text()) for name in ("primitives", "expected", "sequences")
)
A, B = (np.array(PRIMITIVES[key]) for key in ("box_a", "box_b"))


def tracks(flag=None, run="prediction"):
    """The fixture's sequences; `flag`: which visibility they are to have."""
    visible = {None: lambda s: None, "cover": lambda s: np.array(s["cover"]) > 0,
               "absent": lambda s: np.array(s["absent"]) == 0}[flag]
    return [
        Track(s["name"], np.array(s["groundtruth"]), np.array(s[run]), visible(s), (s["width"], s["height"]))
        for s in SEQUENCES["sequences"] if run in s
    ]


def equal(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours) / 100, theirs, rtol=0, atol=1e-6)


def test_primitives():
    np.testing.assert_allclose(tracking.iou(A, B), PRIMITIVES["iou_values"], atol=1e-9)
    before = A.copy(), B.copy()
    bounded = tracking.iou(A, B, bound=tuple(PRIMITIVES["bound_width_height"]))
    np.testing.assert_allclose(bounded, PRIMITIVES["iou_values_bounded"], atol=1e-9)
    np.testing.assert_array_equal((A, B), before)
    np.testing.assert_allclose(tracking.center_error(A, B), PRIMITIVES["center_error"], atol=1e-9)


def test_otb_equals_its_toolkit():
    ours, theirs = tracking.otb(tracks()), EXPECTED["otb"]
    equal([ours.scores["auc"], ours.scores["precision"]], [theirs["success_auc"], theirs["precision_20px"]])
    equal(ours.curves["success"][1], theirs["success_curve_21"])
    equal(ours.curves["precision"][1], theirs["precision_curve_51"])
    for name, scores in theirs["per_sequence"].items():
        equal(list(ours.sequences[name].values()), list(scores.values()))


@pytest.mark.parametrize("rule, block", [
    ("lasot", "official_toolkit"), ("lasot_wh_valid", "pytracking_convention"),
])
def test_lasot_equals_its_toolkit_and_pytracking(rule, block):
    ours, theirs = tracking.RULES[rule](tracks("absent")), EXPECTED["lasot"][block]
    for key, name in (("auc", "success_auc"), ("precision", "precision_20px"),
                      ("norm_precision", "normalised_precision_020")):
        equal(ours.scores[key], theirs[name])
    if rule == "lasot":
        equal(ours.curves["success"][1], theirs["success_curve_21"])
        equal(ours.curves["precision"][1], theirs["precision_curve_51"])
        equal(ours.curves["norm_precision"][1], theirs["normalised_precision_curve_51"])


def test_trackingnet_equals_its_devkit():
    ours, theirs = tracking.trackingnet(tracks()).scores, EXPECTED["trackingnet"]
    expected = [theirs[key] for key in ("success", "precision", "normalised_precision")]
    np.testing.assert_allclose([ours[key] for key in ("auc", "precision", "norm_precision")], expected, atol=1e-6)


def test_got10k_equals_its_toolkit():
    ours, theirs = tracking.got10k(tracks("cover") + tracks("cover", "prediction_run2")[:1]), EXPECTED["got10k"]
    equal([ours.scores[key] for key in ("ao", "sr50", "sr75")], [theirs["overall"][k] for k in ("ao", "sr50", "sr75")])
    equal(ours.curves["success"][1], theirs["overall"]["success_curve_101"])
    for name, scores in theirs["per_sequence"].items():
        equal([ours.sequences[name]["ao"], ours.sequences[name]["sr50"]], [scores["ao"], scores["sr50"]])


# By hand ----------------------------------------------------------------------------------------------------

SQUARE = [10.0, 10.0, 20.0, 20.0]
FAR = [200.0, 200.0, 20.0, 20.0]
NAN = [np.nan] * 4


def track(truth, prediction, name="a", **more):
    return Track(name, np.array(truth, float), np.array(prediction, float), size=(320, 240), **more)


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    a, b = (np.concatenate([rng.integers(0, 12, (50, 2)), rng.integers(0, 9, (50, 2))], 1) for _ in "ab")
    for box, other, value in zip(a, b, tracking.iou(a, b)):
        drawn = np.zeros((2, 24, 24), bool)
        for canvas, (x, y, w, h) in zip(drawn, (box, other)):
            canvas[y:y + h, x:x + w] = True
        assert value == pytest.approx(drawn.all(0).sum() / max(drawn.any(0).sum(), 1))
    np.testing.assert_array_equal(tracking.iou(a, b), tracking.iou(b, a))


def test_a_box_left_of_the_image_slides_in():
    # 20 px wide, 15 of them outside: not cut to 5, but moved to x = 0 at its full width
    assert tracking.iou(np.array([[-15.0, 0, 20, 20]]), np.array([[0.0, 0, 20, 20]]), bound=(100, 100)) == 1
    assert tracking.iou(np.array([[90.0, 0, 20, 20]]), np.array([[90.0, 0, 10, 20]]), bound=(100, 100)) == 1


@pytest.mark.parametrize("rule, best", [
    ("otb", 2000 / 21), ("lasot", 2000 / 21), ("lasot_wh_valid", 2000 / 21), ("trackingnet", 100), ("got10k", 100),
])
def test_a_perfect_tracker(rule, best):
    truth = np.random.default_rng(1).uniform(5, 60, (40, 4))
    scores = tracking.RULES[rule]([track(truth, truth)]).scores
    assert scores.pop("ao" if rule == "got10k" else "auc") == pytest.approx(best, abs=1e-9)
    assert set(scores.values()) == {100.0}


@pytest.mark.parametrize("rule", tracking.RULES)
def test_where_a_prediction_is_nan(rule):
    """Two of four frames: failures, except under LaSOT's rules, where the box of the frame before stands in."""
    scores = tracking.RULES[rule]([track([SQUARE] * 4, [SQUARE, SQUARE, NAN, [np.inf, *SQUARE[1:]]])]).scores
    main = scores["ao" if rule == "got10k" else "auc"]
    whole = {"otb": 2000 / 21, "uav123": 2000 / 21, "trackingnet": 100, "got10k": 100}
    share = {"otb": 2 / 4, "uav123": 2 / 4, "trackingnet": 2 / 4, "got10k": 1 / 3}
    assert main == pytest.approx(whole[rule] * share[rule] if rule in whole else 2000 / 21)


@pytest.mark.parametrize("rule, hits", [("otb", 2), ("trackingnet", 2), ("got10k", 1)])
def test_a_short_prediction_goes_on_with_empty_boxes(rule, hits):
    summary = tracking.RULES[rule]([track([SQUARE] * 4, [SQUARE] * 2)])
    frames = 3 if rule == "got10k" else 4
    assert summary.curves["success"][1][10] == pytest.approx(100 * hits / frames)
    longer = tracking.RULES[rule]([track([SQUARE] * 4, [SQUARE] * 4 + [FAR] * 9)])
    assert longer.curves["success"][1][10] == 100


@pytest.mark.parametrize("rule", ["lasot", "lasot_wh_valid"])
def test_a_short_prediction_is_an_error_on_lasot(rule):
    with pytest.raises(ValueError, match="2 predicted boxes for 4 frames"):
        tracking.RULES[rule]([track([SQUARE] * 4, [SQUARE] * 2)])


def test_lasot_and_pytracking_differ_in_what_a_valid_box_is():
    """Frame 2: a true box at x = 0. Frame 3: an empty one. Frame 4: flagged absent. The tracker is far off in all."""
    truth = [SQUARE, [0, *SQUARE[1:]], [10, 10, 0, 20], SQUARE]
    one = track(truth, [SQUARE, FAR, FAR, FAR], visible=np.array([True, True, True, False]))
    official, pytracking = tracking.lasot([one]), tracking.lasot_wh_valid([one])
    assert official.scores == pytest.approx({"auc": 2000 / 21 / 4, "precision": 75, "norm_precision": 75})
    assert pytracking.scores == pytest.approx({"auc": 2000 / 21 / 4, "precision": 25, "norm_precision": 50})
    exact = track(truth, truth, visible=one.visible)
    assert tracking.lasot([exact]).scores["auc"] == pytest.approx(2000 / 21 / 4)  # x = 0 cannot succeed
    assert tracking.lasot_wh_valid([exact]).scores["auc"] == pytest.approx(2000 / 21 / 2)


def test_lasot_leaves_out_curves_that_are_zero_throughout():
    lost = track([[0, *SQUARE[1:]]] * 3, [FAR] * 3, "lost")  # even the first box, at x = 0, does not succeed
    good = track([SQUARE] * 3, [SQUARE] * 3, "good")
    assert tracking.lasot([lost, good]).scores["auc"] == pytest.approx(2000 / 21)
    assert tracking.lasot([lost]).scores["auc"] == 0
    assert tracking.lasot([lost, good]).sequences["lost"]["auc"] == 0
    assert tracking.lasot_wh_valid([lost, good]).scores["auc"] == pytest.approx(2000 / 21 * (1 / 3 + 1) / 2)


def test_an_empty_prediction_on_lasot_takes_the_box_before():
    """Also over several frames, and from the tracker's own first box, which itself is not scored."""
    truth = [SQUARE] * 4
    assert tracking.lasot([track(truth, [SQUARE, FAR, [1, 1, 0, 5], [1, 1, 5, -5]])]).scores["precision"] == 25
    assert tracking.lasot([track(truth, [FAR, [1, 1, 0, 5], SQUARE, SQUARE])]).scores["precision"] == 75


def test_trackingnet_rounds_half_to_even_and_counts_equality():
    summary = tracking.trackingnet([track([SQUARE] * 2, [SQUARE, [10.5, 9.5, 20.5, 19.5]])])
    assert summary.scores == pytest.approx({"auc": 100, "precision": 100, "norm_precision": 100})
    half = tracking.trackingnet([track([SQUARE] * 2, [[10, 10, 20, 10]] * 2)])  # IoU exactly 0.5
    assert half.curves["success"][1][10] == 100 and half.curves["success"][1][11] == 0


def test_got10k_pools_frames_and_leaves_out_hidden_ones():
    long = track([SQUARE] * 7, [SQUARE] * 7, "long", visible=np.array([1, 1, 1, 1, 1, 1, 0], bool))
    short = track([SQUARE] * 3, [SQUARE, FAR, NAN], "short")
    summary = tracking.got10k([long, short])
    assert summary.scores["ao"] == pytest.approx(100 * 5 / 7)  # not the mean over sequences, 50
    assert [s["ao"] for s in summary.sequences.values()] == [100, 0]
    hidden = track([SQUARE] * 3, [FAR] * 3, "hidden", visible=np.zeros(3, bool))
    assert tracking.got10k([long, short, hidden]).scores == summary.scores


@pytest.mark.parametrize("rule, given, message", [
    ("otb", [], "no sequences"),
    ("got10k", [], "no sequence has a visible target"),
    ("otb", [track([SQUARE], [SQUARE])] * 2, "came twice"),
    ("trackingnet", [track([SQUARE, NAN, NAN], [SQUARE] * 3)], "no ground truth after its first frame"),
    ("lasot", [track([SQUARE] * 3, [SQUARE] * 3, visible=np.ones(2, bool))], "3 true boxes, but 2 visibility flags"),
    ("got10k", [Track("a", np.array([SQUARE] * 2), np.array([SQUARE] * 2))], "whose size is not given"),
])
def test_what_cannot_be_scored(rule, given, message):
    with pytest.raises(ValueError, match=message):
        tracking.RULES[rule](given)
