"""What is evaluated, on what, and by which rule."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data import tracking as data
from common.run import UserError

Box = tuple[float, float, float, float]
# A data set's own rule, one of `tracking.RULES`. VOT's own measures are its toolkit's (see vot.py).
RULES = {
    **dict.fromkeys(("otb", "otb50", "otb2013", "vot", "nfs", "nfs240"), "otb"), "uav123": "uav123", "uav20l": "uav123",
    "lasot": "lasot", "lasot_ext": "lasot", "tnl2k": "lasot_wh_valid", "avist": "avist", "vid": "lasot_wh_valid",
    "trackingnet": "trackingnet", "got10k": "got10k",
}


class Tracker(typing.Protocol):
    """What is evaluated: given a target's box in one frame, it finds the target in the frames that follow.

    Frames are (H, W, 3) uint8 RGB. Boxes are x, y, w, h in pixels, zero-based: the image is [0, W) x [0, H).
    """

    def init(self, frame: np.ndarray, box: Box) -> None:
        """Starts on a new target; whatever was known of another one is forgotten."""

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        """(box, score) of the target in the next frame; the score is the tracker's own, higher is surer."""


@dataclass(frozen=True)
class Protocol:
    """How the answers to one data set are scored and handed in."""

    dataset: str
    rule: str
    """One of `tracking.RULES`."""
    integers: bool = False
    """Boxes are handed in truncated to integers, as some trackers' published files are."""

    @property
    def name(self) -> str:
        """What its metrics and files are called: "lasot" by the data set's own rule, "lasot-wh_valid" by another,
        so that scores of two rules never stand under one name."""
        if self.rule == RULES[self.dataset]:
            return self.dataset
        return f"{self.dataset}-{self.rule.removeprefix(f'{self.dataset}_')}"


def dataset_of(sequences: Sequence[data.Sequence]) -> str:
    """The one data set that sequences are from."""
    names = sorted({sequence.dataset for sequence in sequences})
    if len(names) != 1:
        raise UserError(f"sequences of one data set are scored together, not of {', '.join(names) or 'none'}")
    return names[0]
