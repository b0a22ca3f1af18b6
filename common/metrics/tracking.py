"""Single-object tracking, measured as each benchmark measures itself: OTB, UAV123, LaSOT, TrackingNet, GOT-10k.

Boxes are (N, 4) arrays of x, y, w, h: pixels, top-left origin, continuous rectangles. Scores and curves are percent.
Some toolkits look at the coordinates themselves (is x positive, where does the image end, rounding), so boxes are
to be given as the benchmark's files have them.

    rule              success           precision     normalised precision    frames             mean over
    otb               IoU > t, AUC      at 20 px      -                       all                sequences
    lasot             IoU > t, AUC      at 20 px      at 0.2                  absent ones fail   sequences
    lasot_pytracking  the same under PyTracking's idea of a valid box: most published LaSOT figures since 2019
    uav123            IoU > t, AUC      at 20 px      at 0.2                  all                sequences
    trackingnet       IoU >= t, area    area to 50    area to 0.5             all, rounded       sequences
    got10k            AO, SR50, SR75    -             -                       visible, not the   frames
                      (IoU > t)                                               first, clipped

What every rule does where its toolkit stops or answers NaN: a prediction longer than the ground truth is cut, a
shorter one continued with empty boxes (an error under both LaSOT rules), and NaN where a box is due is a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

OVERLAPS = np.linspace(0, 1, 21)
GOT10K_OVERLAPS = np.linspace(0, 1, 101)
PIXELS = np.arange(51.0)
NORMALISED = np.linspace(0, 0.5, 51)
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Track:
    """A tracker's answer to one sequence. Under got10k, several of one name are repetitions and pooled."""

    name: str
    truth: np.ndarray
    """(N, 4), NaN where the target is absent or not annotated"""
    prediction: np.ndarray
    """(M, 4), the given box first"""
    visible: np.ndarray | None = None
    """(N,) bool: GOT-10k's cover > 0; LaSOT's neither fully occluded nor out of view. None: all."""
    size: tuple[int, int] | None = None
    """(width, height) of the frames; got10k clips boxes to it"""


@dataclass(frozen=True)
class Summary:
    """Scores over all sequences and of each."""

    rule: str
    scores: dict[str, float]
    """auc, precision, norm_precision; or ao, sr50, sr75: percent"""
    curves: Curves
    """success, precision, norm_precision -> (thresholds, percent of frames)"""
    sequences: dict[str, dict[str, float]]
    """name -> its scores"""


def iou(a: np.ndarray, b: np.ndarray, bound: tuple[int, int] | None = None) -> np.ndarray:
    """(N,) intersection over union in [0, 1] of boxes (N, 4); 0 for an empty union, NaN where a box has NaN.

    `bound` (width, height) clips both to the image as GOT-10k does: first x, y into the image, then w, h to what is
    left of it. So what sticks out on the left or top is not cut off: the box slides inwards.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if bound is not None:
        a, b = _clipped(a, bound), _clipped(b, bound)
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    intersection = np.maximum(high - low, 0).prod(1)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - intersection
    # Clipped, because equal boxes with fractions can come out a rounding above 1, and "above 1" is a threshold.
    return np.clip(np.divide(intersection, union, out=np.zeros_like(union), where=union != 0), 0, 1)


def _clipped(boxes: np.ndarray, bound: tuple[int, int]) -> np.ndarray:
    corner = np.clip(boxes[:, :2], 0, bound)
    return np.concatenate([corner, np.clip(boxes[:, 2:], 0, bound - corner)], 1)


def centre_error(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) distance of the centres in pixels."""
    return np.linalg.norm(_offset(prediction, truth), axis=1)


def norm_centre_error(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) distance of the centres, x in units of the true width and y of the true height; not finite if these are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.linalg.norm(_offset(prediction, truth) / np.asarray(truth)[:, 2:], axis=1)


def _offset(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return (a[:, :2] + a[:, 2:] / 2) - (b[:, :2] + b[:, 2:] / 2)


# Rules ----------------------------------------------------------------------------------------------------


def otb(tracks: Iterable[Track]) -> Summary:
    """One-pass evaluation: success AUC and precision at 20 px, the first box taken from the ground truth."""
    curves = {}
    for track in _distinct(tracks):
        truth, boxes = _aligned(track)
        boxes[0] = truth[0]
        curves[track.name] = {
            "success": _share(iou(boxes, truth), np.greater, OVERLAPS),
            "precision": _share(centre_error(boxes, truth), np.less_equal, PIXELS),
        }
    return _averaged("otb", curves, _at_thresholds)


def lasot(tracks: Iterable[Track]) -> Summary:
    """LaSOT's toolkit.

    A true box is valid if x, y, w, h are all positive; at an invalid one every prediction fails in success and hits
    in both precisions, unless the target is flagged absent: then it always fails. An invalid prediction (NaN, or no
    positive size) takes the box of the frame before. Curves that are zero throughout are left out of the mean.
    """
    curves = {t.name: _robust(t, slice(0, 4), invalid_error=-1, pad=False) for t in _distinct(tracks)}
    return _averaged("lasot", curves, _at_thresholds, drop_empty=True)


def pytracking(tracks: Iterable[Track], rule: str) -> Summary:
    """PyTracking's evaluation for `rule` lasot_pytracking or uav123.

    A true box is valid if w and h are positive. Otherwise every prediction fails in success and precision (uav123:
    hits in precision) and hits in normalised precision, unless the target is flagged absent: then it always fails.
    Here too an invalid prediction takes the box of the frame before (PyTracking refuses NaN and negative sizes).
    """
    error, pad = (-1 if rule == "uav123" else np.inf), rule != "lasot_pytracking"
    curves = {t.name: _robust(t, slice(2, 4), invalid_error=error, pad=pad) for t in _distinct(tracks)}
    return _averaged(rule, curves, _at_thresholds)


def trackingnet(tracks: Iterable[Track]) -> Summary:
    """TrackingNet's development kit: everything rounded to integers, areas under all three curves."""
    curves = {}
    for track in _distinct(tracks):
        truth, boxes = (np.round(x) for x in _aligned(track))
        curves[track.name] = {
            "success": _share(iou(boxes, truth), np.greater_equal, OVERLAPS),
            "precision": _share(centre_error(boxes, truth), np.less_equal, 50 * OVERLAPS),
            "norm_precision": _share(norm_centre_error(boxes, truth), np.less_equal, OVERLAPS / 2),
        }
    return _averaged("trackingnet", curves, _areas)


def got10k(tracks: Iterable[Track]) -> Summary:
    """GOT-10k: AO, SR50, SR75 over all frames of all sequences and runs, but first ones and those with cover 0."""
    overlaps: dict[str, list[np.ndarray]] = {}
    for track in tracks:
        if track.size is None:
            raise ValueError(f"{track.name}: GOT-10k clips boxes to the image, whose size is not given")
        truth, boxes = _aligned(track)
        values = np.nan_to_num(iou(boxes, truth, bound=track.size))
        counted = np.ones(len(truth), bool) if track.visible is None else np.array(track.visible, bool)
        counted[0] = False
        overlaps.setdefault(track.name, []).append(values[counted])
    pooled = {name: np.concatenate(runs) for name, runs in overlaps.items()}
    everything = np.concatenate([*pooled.values()]) if pooled else np.empty(0)
    if not len(everything):
        raise ValueError("no sequence with a visible target after its first frame")
    curves = {"success": _share(everything, np.greater, GOT10K_OVERLAPS)}
    sequences = {name: _ao_sr(values) for name, values in pooled.items() if len(values)}
    return Summary("got10k", _ao_sr(everything), curves, sequences)


RULES: dict[str, Callable[[Iterable[Track]], Summary]] = {
    "otb": otb, "lasot": lasot, "trackingnet": trackingnet, "got10k": got10k,
    **{name: functools.partial(pytracking, rule=name) for name in ("lasot_pytracking", "uav123")},
}


def _distinct(tracks: Iterable[Track]) -> list[Track]:
    tracks = list(tracks)
    names = [track.name for track in tracks]
    if not names or len({*names}) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"this rule takes each sequence once, got {', '.join(twice)} repeatedly" if names else
                         "no sequences to score")
    return tracks


def _aligned(track: Track, pad: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(truth, prediction) of one length, as float64 copies."""
    truth, boxes = (np.array(x, dtype=np.float64).reshape(-1, 4) for x in (track.truth, track.prediction))
    boxes[~np.isfinite(boxes)] = np.nan
    if track.visible is not None and len(track.visible) != len(truth):
        raise ValueError(f"{track.name}: {len(truth)} true boxes, but {len(track.visible)} visibility flags")
    if not len(truth) or (len(truth) > 1 and np.isnan(truth[1:]).any(1).all()):
        raise ValueError(f"{track.name} has no ground truth after its first frame: it cannot be scored here")
    if (missing := len(truth) - len(boxes)) > 0:
        if not pad:
            raise ValueError(f"{track.name}: {len(boxes)} predicted boxes for {len(truth)} frames")
        boxes = np.concatenate([boxes, np.zeros((missing, 4))])
    return truth, boxes[:len(truth)]


def _robust(track: Track, positive: slice, invalid_error: float, pad: bool) -> Curves:
    """Curves with invalid boxes on either side taken care of; `positive`: what must be > 0 in a valid true box."""
    truth, boxes = _aligned(track, pad)
    annotated = ~np.isnan(truth).any(1)
    for i in np.flatnonzero(annotated & ~((boxes[:, 2:] > 0).all(1) & ~np.isnan(boxes).any(1))):
        boxes[i] = boxes[max(i - 1, 0)]
    boxes[0] = truth[0]
    valid = (truth[:, positive] > 0).all(1) & annotated
    visible = np.ones(len(truth), bool) if track.visible is None else np.asarray(track.visible, bool)
    errors = np.where(valid, centre_error(boxes, truth), invalid_error)
    norm_errors = np.where(valid, norm_centre_error(boxes, truth), -1)
    errors[~visible] = norm_errors[~visible] = np.inf
    return {
        "success": _share(np.where(valid & visible, iou(boxes, truth), -1), np.greater, OVERLAPS),
        "precision": _share(errors, np.less_equal, PIXELS),
        "norm_precision": _share(norm_errors, np.less_equal, NORMALISED),
    }


def _share(values: np.ndarray, passes: np.ufunc, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds, percent of the values that pass each); NaN never passes."""
    return thresholds, 100 * passes(values[:, None], thresholds).mean(0)


def _averaged(
    rule: str, curves: Mapping[str, Curves], read: Callable[[Curves], dict[str, float]], drop_empty: bool = False
) -> Summary:
    """Curves averaged over sequences; `read` turns curves into scores."""
    mean = {}
    for kind, (thresholds, first) in next(iter(curves.values())).items():
        rows = [each[kind][1] for each in curves.values()]
        rows = [row for row in rows if row.any()] if drop_empty else rows
        mean[kind] = thresholds, np.mean(rows, 0) if rows else np.zeros_like(first)
    return Summary(rule, read(mean), mean, {name: read(each) for name, each in curves.items()})


def _at_thresholds(curves: Curves) -> dict[str, float]:
    scores = {"auc": curves["success"][1].mean(), "precision": curves["precision"][1][20]}
    if "norm_precision" in curves:
        scores["norm_precision"] = curves["norm_precision"][1][20]
    return {name: float(value) for name, value in scores.items()}


def _areas(curves: Curves) -> dict[str, float]:
    names = {"success": "auc", "precision": "precision", "norm_precision": "norm_precision"}
    return {names[kind]: float(np.trapezoid(y, x / x[-1])) for kind, (x, y) in curves.items()}


def _ao_sr(overlaps: np.ndarray) -> dict[str, float]:
    ao, sr50, sr75 = overlaps.mean(), (overlaps > 0.5).mean(), (overlaps > 0.75).mean()
    return {"ao": 100 * float(ao), "sr50": 100 * float(sr50), "sr75": 100 * float(sr75)}
