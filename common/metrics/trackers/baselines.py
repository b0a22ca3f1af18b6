"""Trackers that learn nothing beforehand, for others to be measured against. As `protocol.Tracker` has it.

`static` and `ncc` are the floor; KCF and CSRT, OpenCV's as they are, what a user would otherwise take.
"""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np

from common.metrics.trackers.protocol import Box, Tracker
from common.run import UserError

# Searched sizes relative to the last one, and what their correlation is multiplied with. Ours, chosen by hand; SiamFC's
# three are 1.0375 apart, at 0.9745.
SCALES = ((1, 1), (1 / 1.03, 0.98), (1.03, 0.98))


class StaticBox:
    """Baseline: the first box, in every frame."""

    folder = "static_box"

    def init(self, frame: np.ndarray, box: Box) -> None:
        self.box = box

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        return self.box, 1.0


class NCC:
    """Baseline: the first frame's patch, found again by normalised cross-correlation of gray values (OpenCV).

    The patch is kept as it is and looked for up to half the box's mean side from its last place, near ones preferred
    (Gaussian window), at the last size and 3 % smaller and larger (at a cost of 2 %). Its score is the correlation, at
    most 1.
    """

    folder = "ncc"

    def init(self, frame: np.ndarray, box: Box) -> None:
        self.box = np.array(box, dtype=np.float64)
        center, self.first_size = self.box[:2] + self.box[2:] / 2, self.box[2:].copy()
        w, h = np.maximum(np.round(self.first_size), 2).astype(int).tolist()
        left, top = np.round(center - (w / 2, h / 2)).astype(int).tolist()
        self.template = _patch(_gray(frame), left, top, w, h)
        self.rest = center - (left + w / 2, top + h / 2)  # what the rounding took

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        if self.template.min() == self.template.max():  # nothing to correlate with
            return tuple(self.box.tolist()), 0.0
        gray, center, best = _gray(frame), self.box[:2] + self.box[2:] / 2, -2.0
        reach = max(round(self.box[2:].mean() / 2), 2)
        window = cv2.getGaussianKernel(2 * reach + 1, reach / 2)
        window = window @ window.T / window.max() ** 2
        for scale, weight in SCALES:
            size = np.clip(self.box[2:] * scale, self.first_size / 5, self.first_size * 5)
            w, h = np.maximum(np.round(size), 2).astype(int).tolist()
            left, top = np.round(center - self.rest - (w / 2 + reach, h / 2 + reach)).astype(int).tolist()
            template = cv2.resize(self.template, (w, h), interpolation=cv2.INTER_LINEAR)
            region = _patch(gray, left, top, w + 2 * reach, h + 2 * reach)
            correlation = cv2.matchTemplate(region, template, cv2.TM_CCOEFF_NORMED)
            _, peak, _, (dx, dy) = cv2.minMaxLoc(weight * window * correlation)
            if peak > best:
                best, score = peak, float(correlation[dy, dx])
                middle, new_size = self.rest + (left + dx + w / 2, top + dy + h / 2), size
        middle = np.clip(middle, -new_size / 2, frame.shape[1::-1] + new_size / 2)
        self.box = np.concatenate([middle - new_size / 2, new_size])
        return tuple(self.box.tolist()), score


def _gray(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB -> (H, W), both uint8."""
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def _patch(gray: np.ndarray, left: int, top: int, w: int, h: int) -> np.ndarray:
    """(h, w) window of an image (H, W), continued beyond its border by the border's pixels."""
    rows, columns = (np.clip(np.arange(a, a + n), 0, m - 1) for a, n, m in zip((top, left), (h, w), gray.shape))
    return gray[rows[:, None], columns]


class OpenCV:
    """A tracker of OpenCV's with its own settings. It takes and gives whole pixels; where it says that the target is
    lost, the last box stays, with score 0."""

    name: ClassVar[str]
    """KCF for cv2.TrackerKCF."""

    def init(self, frame: np.ndarray, box: Box) -> None:
        make: Any = getattr(cv2, f"Tracker{self.name}_create", None)
        if make is None:
            raise UserError(
                f"this OpenCV has no {self.name} tracker: pip install -c constraints.txt "
                "opencv-contrib-python-headless, and uninstall opencv-python-headless before"
            )
        self.tracker, self.box = make(), tuple(float(v) for v in box)
        height, width = frame.shape[:2]
        x, y = (min(max(round(v), 0), side - 2) for v, side in zip(box[:2], (width, height)))
        w, h = (min(max(round(v), 2), side - at) for v, side, at in zip(box[2:], (width, height), (x, y)))
        self.tracker.init(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), (x, y, w, h))

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        found, box = self.tracker.update(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        if found:
            self.box = tuple(float(v) for v in box)
        return self.box, float(found)


class KCF(OpenCV):
    """Kernelized correlation filters, Henriques et al., TPAMI 2015: no change of size."""

    folder = "kcf"
    name = "KCF"


class CSRT(OpenCV):
    """Correlation filters with channel and spatial reliability, Lukezic et al., CVPR 2017."""

    folder = "csrt"
    name = "CSRT"


BASELINES: dict[str, type[Tracker]] = {
    "static box": StaticBox, "template matching (NCC)": NCC, "KCF (OpenCV)": KCF, "CSRT (OpenCV)": CSRT,
}
FLOOR = ("static box", "template matching (NCC)")
"""Those that run at the end of every training."""
WORDS = {"static": "static box", "ncc": FLOOR[1], "kcf": "KCF (OpenCV)", "csrt": "CSRT (OpenCV)"}
"""What they are called on command lines."""
# What older records call them.
OLD_LABELS = {"still": "static box", "correlation": "template matching (NCC)"}
