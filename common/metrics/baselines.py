"""Two trackers that learn nothing, for others to be measured against. As `trackers.Tracker` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from common.metrics.trackers import Box, Tracker


class Still:
    """Baseline: the first box, held still."""

    def init(self, frame: np.ndarray, box: Box) -> None:
        self.box = box

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        return self.box, 1.0


class Correlation:
    """Baseline: the first frame's patch, found again by normalised cross-correlation of grey values (OpenCV).

    The patch is kept as it is and looked for up to half the box's mean side from its last place, near ones preferred
    (Gaussian window), at the last size and 3 % smaller and larger (at a cost of 2 %). Its score is the correlation.
    """

    def init(self, frame: np.ndarray, box: Box) -> None:
        self.box = np.array(box, dtype=np.float64)
        centre, self.first_size = self.box[:2] + self.box[2:] / 2, self.box[2:].copy()
        w, h = np.maximum(np.round(self.first_size), 2).astype(int).tolist()
        left, top = np.round(centre - (w / 2, h / 2)).astype(int).tolist()
        self.template = _patch(_grey(frame), left, top, w, h)
        self.rest = centre - (left + w / 2, top + h / 2)  # what the rounding took

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        if self.template.min() == self.template.max():  # nothing to correlate with
            return tuple(self.box.tolist()), 0.0
        grey, centre, best = _grey(frame), self.box[:2] + self.box[2:] / 2, -2.0
        reach = max(round(self.box[2:].mean() / 2), 2)
        window = cv2.getGaussianKernel(2 * reach + 1, reach / 2)
        window = window @ window.T / window.max() ** 2
        for scale, weight in ((1, 1), (1 / 1.03, 0.98), (1.03, 0.98)):
            size = np.clip(self.box[2:] * scale, self.first_size / 5, self.first_size * 5)
            w, h = np.maximum(np.round(size), 2).astype(int).tolist()
            left, top = np.round(centre - self.rest - (w / 2 + reach, h / 2 + reach)).astype(int).tolist()
            template = cv2.resize(self.template, (w, h), interpolation=cv2.INTER_LINEAR)
            region = _patch(grey, left, top, w + 2 * reach, h + 2 * reach)
            likeness = cv2.matchTemplate(region, template, cv2.TM_CCOEFF_NORMED)
            _, peak, _, (dx, dy) = cv2.minMaxLoc(weight * window * likeness)
            if peak > best:
                best, score = peak, float(likeness[dy, dx])
                middle, new_size = self.rest + (left + dx + w / 2, top + dy + h / 2), size
        middle = np.clip(middle, -new_size / 2, frame.shape[1::-1] + new_size / 2)
        self.box = np.concatenate([middle - new_size / 2, new_size])
        return tuple(self.box.tolist()), score


def _grey(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def _patch(grey: np.ndarray, left: int, top: int, w: int, h: int) -> np.ndarray:
    """A window of the image, continued beyond its border by the border's pixels."""
    rows, columns = (np.clip(np.arange(a, a + n), 0, m - 1) for a, n, m in zip((top, left), (h, w), grey.shape))
    return grey[rows[:, None], columns]


BASELINES: dict[str, Callable[[], Tracker]] = {"still": Still, "correlation": Correlation}
