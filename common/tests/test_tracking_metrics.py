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
    np.testing.assert_allclose(tracking.centre_error(A, B), PRIMITIVES["center_error"], atol=1e-9)


def test_otb_equals_its_toolkit():
    ours, theirs = tracking.otb(tracks()), EXPECTED["otb"]
    equal([ours.scores["auc"], ours.scores["precision"]], [theirs["success_auc"], theirs["precision_20px"]])
    equal(ours.curves["success"][1], theirs["success_curve_21"])
    equal(ours.curves["precision"][1], theirs["precision_curve_51"])
    for name, scores in theirs["per_sequence"].items():
        equal(list(ours.sequences[name].values()), list(scores.values()))


@pytest.mark.parametrize("rule, block", [
    ("lasot", "official_toolkit"), ("lasot_pytracking", "pytracking_convention"),
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
