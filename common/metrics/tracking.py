"""Single-object tracking, measured as each benchmark measures itself.

Boxes are (N, 4) arrays of x, y, w, h: pixels, top-left origin, continuous rectangles. Scores and curves are percent.
Toolkits look at the coordinates themselves (is x positive, where does the image end, rounding), so give boxes as the
benchmark's files have them.

    rule              success          precision    normalised      frames                          mean over
    otb               IoU > t, AUC     at 20 px     -               all                             sequences
    uav123            as otb; without a true box (NaN) a frame fails in success and hits in precision
    lasot             IoU > t, AUC     at 20 px     at 0.2          all; absent ones are failures   sequences
    lasot_wh_valid    as lasot, a true box being valid if w, h > 0: STARK, SBT, OSTrack, most figures since 2020
    lasot_xywh_valid  as that, if x, y, w, h > 0: PyTracking itself
    avist             curves as lasot_wh_valid: AUC, and success at 0.5 and 0.75
    trackingnet       IoU >= t, area   area to 50   area to 0.5     all, rounded to integers        sequences
    got10k            AO, SR50, SR75   -            -               not the first, nor those with   frames
                                                                    cover 0; clipped to the image

Where a toolkit stops or answers NaN, here every rule does the same: a prediction longer than the ground truth is cut,
a shorter one goes on with empty boxes (an error under LaSOT's rules), NaN where a box is due is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

OVERLAPS = np.linspace(0, 1, 21)
GOT10K_OVERLAPS = np.linspace(0, 1, 101)
PIXELS = np.arange(51.0)
NORMALIZED = np.linspace(0, 0.5, 51)
Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # success, precision, norm_precision -> (thresholds, % of frames)


@dataclass(frozen=True)
class Track:
    """A tracker's answer to one sequence. Under got10k several of one name are repetitions, and pooled."""

    name: str
    truth: np.ndarray
    """(N, 4), NaN where there is no box"""
    prediction: np.ndarray
    """(M, 4), the given box first"""
    visible: np.ndarray | None = None
    """(N,) bool: GOT-10k's cover > 0; LaSOT's neither fully occluded nor out of view. None: all."""
    size: tuple[int, int] | None = None
    """(width, height) of the frames; got10k clips boxes to it"""


@dataclass(frozen=True)
class Summary:
    """Scores, by name: auc, precision, norm_precision; or ao, sr50, sr75. All percent."""

    rule: str
    scores: dict[str, float]
    curves: Curves
    sequences: dict[str, dict[str, float]]
    """scores of each sequence alone, by its name"""


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


def center_error(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) distance of the centres in pixels."""
    return np.linalg.norm(_offset(prediction, truth), axis=1)


def norm_center_error(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) distance of the centres, x in true widths and y in true heights; not finite where these are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.linalg.norm(_offset(prediction, truth) / np.asarray(truth)[:, 2:], axis=1)


def _offset(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return (a[:, :2] + a[:, 2:] / 2) - (b[:, :2] + b[:, 2:] / 2)


# Rules ----------------------------------------------------------------------------------------------------


def otb(tracks: Iterable[Track]) -> Summary:
    """One-pass evaluation: success AUC and precision at 20 px, the first box taken from the ground truth."""
    return _averaged("otb", tracks, _one_pass, _at_thresholds)


def uav123(tracks: Iterable[Track]) -> Summary:
    """As `otb`; a frame whose true box is NaN, the target being absent, fails in success and hits in precision."""
    return _averaged("uav123", tracks, lambda track: _one_pass(track, absent_error=-1.0), _at_thresholds)


def _one_pass(track: Track, absent_error: float = np.nan) -> Curves:
    truth, boxes = _aligned(track)
    boxes[0] = truth[0]
    errors = np.where(np.isnan(truth).any(1), absent_error, center_error(boxes, truth))
    return {
        "success": _fraction(iou(boxes, truth), np.greater, OVERLAPS),
        "precision": _fraction(errors, np.less_equal, PIXELS),
    }


def lasot(tracks: Iterable[Track]) -> Summary:
    """LaSOT's toolkit: auc, precision at 20 px, norm_precision at 0.2.

    A true box is valid if x, y, w, h are all positive; at an invalid one any prediction fails in success and hits in
    both precisions, unless the target is flagged absent: then it always fails. An invalid prediction (NaN, or no
    positive size) takes the box of the frame before. Curves that are zero throughout are left out of the mean.
    """
    def curves(track: Track) -> Curves:
        return _robust(track, lambda truth: (truth > 0).all(1), invalid_error=-1)

    return _averaged("lasot", tracks, curves, _at_thresholds, drop_empty=True)


def lasot_wh_valid(tracks: Iterable[Track]) -> Summary:
    """As `lasot`, but a true box is valid if w and h are positive, and every curve counts: the evaluation of STARK,
    SBT, OSTrack and most since, which they call PyTracking's.

    At an invalid one any prediction fails in success and precision, and hits in normalised precision. An invalid
    prediction takes the box of the frame before here too (they refuse NaN and negative sizes).
    """
    return _averaged("lasot_wh_valid", tracks, _wh_valid, _at_thresholds)


def lasot_xywh_valid(tracks: Iterable[Track]) -> Summary:
    """As `lasot_wh_valid`, but a true box is valid if x, y, w and h are positive: PyTracking itself."""
    def curves(track: Track) -> Curves:
        return _robust(track, lambda truth: (truth > 0).all(1), invalid_error=np.inf)

    return _averaged("lasot_xywh_valid", tracks, curves, _at_thresholds)


def avist(tracks: Iterable[Track]) -> Summary:
    """AVisT: auc, and op50 and op75, success at 0.5 and 0.75. Boxes and absent frames as under `lasot_wh_valid`."""
    def read(curves: Curves) -> dict[str, float]:
        success = curves["success"][1]
        return {"auc": float(success.mean()), "op50": float(success[10]), "op75": float(success[15])}

    return _averaged("avist", tracks, _wh_valid, read)


def _wh_valid(track: Track) -> Curves:
    return _robust(track, lambda truth: (truth[:, 2:] > 0).all(1), invalid_error=np.inf)


def trackingnet(tracks: Iterable[Track]) -> Summary:
    """TrackingNet's development kit: everything rounded to integers, areas under all three curves."""
    def curves(track: Track) -> Curves:
        truth, boxes = (np.round(x) for x in _aligned(track))
        return {
            "success": _fraction(iou(boxes, truth), np.greater_equal, OVERLAPS),
            "precision": _fraction(center_error(boxes, truth), np.less_equal, 50 * OVERLAPS),
            "norm_precision": _fraction(norm_center_error(boxes, truth), np.less_equal, OVERLAPS / 2),
        }

    def areas(curves: Curves) -> dict[str, float]:
        area = {kind: float(np.trapezoid(y, x / x[-1])) for kind, (x, y) in curves.items()}
        return {"auc": area.pop("success")} | area

    return _averaged("trackingnet", tracks, curves, areas)


def got10k(tracks: Iterable[Track]) -> Summary:
    """GOT-10k: ao, sr50, sr75 over the frames of all sequences and runs, but first ones and those with cover 0."""
    def scores(overlaps: np.ndarray) -> dict[str, float]:
        counted = {"ao": overlaps, "sr50": overlaps > 0.5, "sr75": overlaps > 0.75}
        return {name: 100 * float(x.mean()) for name, x in counted.items()}

    pooled: dict[str, np.ndarray] = {}
    for track in tracks:
        if track.size is None:
            raise ValueError(f"{track.name}: GOT-10k clips boxes to the image, whose size is not given")
        truth, boxes = _aligned(track)
        counted = np.ones(len(truth), bool) if track.visible is None else np.array(track.visible, bool)
        counted[0] = False
        overlaps = np.nan_to_num(iou(boxes, truth, bound=track.size))[counted]
        pooled[track.name] = np.append(pooled.get(track.name, np.empty(0)), overlaps)
    everything = np.concatenate([np.empty(0), *pooled.values()])
    if not len(everything):
        raise ValueError("no sequence has a visible target after its first frame")
    curves = {"success": _fraction(everything, np.greater, GOT10K_OVERLAPS)}
    sequences = {name: scores(overlaps) for name, overlaps in pooled.items() if len(overlaps)}
    return Summary("got10k", scores(everything), curves, sequences)


RULES: dict[str, Callable[[Iterable[Track]], Summary]] = {rule.__name__: rule for rule in (
    otb, lasot, lasot_wh_valid, lasot_xywh_valid, trackingnet, got10k, uav123, avist,
)}


def _aligned(track: Track, pad: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(truth, prediction) of one length, as float64 copies, with NaN for what is not finite."""
    truth, boxes = (np.array(x, dtype=np.float64).reshape(-1, 4) for x in (track.truth, track.prediction))
    boxes[~np.isfinite(boxes)] = np.nan
    if track.visible is not None and len(track.visible) != len(truth):
        raise ValueError(f"{track.name}: {len(truth)} true boxes, but {len(track.visible)} visibility flags")
    if not len(truth) or (len(truth) > 1 and np.isnan(truth[1:]).any(1).all()):
        raise ValueError(f"{track.name} has no ground truth after its first frame: it cannot be scored here")
    if (missing := len(truth) - len(boxes)) > 0:
        if not pad:
            raise ValueError(f"{track.name}: {len(boxes)} predicted boxes for {len(truth)} frames")
        boxes = np.append(boxes, np.zeros((missing, 4)), 0)
    return truth, boxes[:len(truth)]


def _robust(track: Track, is_valid: Callable[[np.ndarray], np.ndarray], invalid_error: float) -> Curves:
    """LaSOT's curves, with invalid boxes on either side taken care of."""
    truth, boxes = _aligned(track, pad=False)
    usable = (boxes[:, 2:] > 0).all(1) & ~np.isnan(boxes).any(1)
    for i in np.flatnonzero(~usable[1:] & ~np.isnan(truth[1:]).any(1)) + 1:
        boxes[i] = boxes[i - 1]
    boxes[0] = truth[0]
    valid, visible = is_valid(truth), np.ones(len(truth), bool)
    if track.visible is not None:
        visible = np.asarray(track.visible, bool)
    errors = np.where(valid, center_error(boxes, truth), invalid_error)
    norm_errors = np.where(valid, norm_center_error(boxes, truth), -1)
    errors[~visible] = norm_errors[~visible] = np.inf
    return {
        "success": _fraction(np.where(valid & visible, iou(boxes, truth), -1), np.greater, OVERLAPS),
        "precision": _fraction(errors, np.less_equal, PIXELS),
        "norm_precision": _fraction(norm_errors, np.less_equal, NORMALIZED),
    }


def _fraction(values: np.ndarray, passes: np.ufunc, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds, percent of the values that pass each); NaN never passes."""
    return thresholds, 100 * passes(values[:, None], thresholds).mean(0)


def _averaged(
    rule: str, tracks: Iterable[Track], curves: Callable[[Track], Curves], read: Callable[[Curves], dict[str, float]],
    drop_empty: bool = False,
) -> Summary:
    """Curves averaged over sequences; `read` turns curves into scores."""
    each: dict[str, Curves] = {}
    for track in tracks:
        if track.name in each:
            raise ValueError(f"the rule {rule} takes each sequence once, and {track.name} came twice")
        each[track.name] = curves(track)
    if not each:
        raise ValueError("no sequences to score")
    mean = {}
    for kind, (thresholds, _) in next(iter(each.values())).items():
        rows = np.array([its[kind][1] for its in each.values()])
        kept = rows[rows.any(1)] if drop_empty and rows.any() else rows
        mean[kind] = thresholds, kept.mean(0)
    return Summary(rule, read(mean), mean, {name: read(its) for name, its in each.items()})


def _at_thresholds(curves: Curves) -> dict[str, float]:
    at = {kind: float(curves[kind][1][20]) for kind in ("precision", "norm_precision") if kind in curves}
    return {"auc": float(curves["success"][1].mean())} | at
