"""DualTFR as a tracker: the template of the first frame for ever, and the box of the most credible search token."""

from __future__ import annotations

import copy

import numpy as np
import torch

from common.data import crops
from common.metrics.trackers import Box, hann_window, keep_inside
from common.run import UserError
from papers.dualtfr.model import DualTFR, Prediction
from papers.dualtfr.recipes import Recipe


def decode(prediction: Prediction, window: torch.Tensor, weight: float) -> torch.Tensor:
    """Of one crop's tokens the best one's box and score: (5,) cx, cy, w, h as shares of the crop, chance of target.

    `window` (N) takes the share `weight` in the choice.
    """
    chance = prediction.logits[0].float().softmax(1)[:, 0]
    best = ((1 - weight) * chance + weight * window).argmax(0, keepdim=True)
    return torch.cat([prediction.boxes[0, best].float().flatten(), chance[best]])


def to_frame(box_cxcywh, crop: crops.Crop) -> np.ndarray:
    """A box as shares of the crop -> x, y, w, h in pixels of the frame, (4,) float64."""
    cx, cy, w, h = box_cxcywh
    return crop.to_frame(np.array([cx - w / 2, cy - h / 2, w, h]) * crop.size)


class DualTFRTracker:
    """A `common.metrics.trackers.Tracker` of a network in eval mode, with the crops and the window of a recipe.

    The template's branch runs once, in `init`, up to the first CAB. Each frame: a crop around the last box, the search
    branch, the CABs, the head. `precision` is the type of weights and activations.
    """

    def __init__(self, model: DualTFR, recipe: Recipe, precision: torch.dtype = torch.float32):
        weights = next(model.parameters())
        self.device, self.precision, self.recipe = weights.device, precision, recipe
        self.model = model if weights.dtype == precision else copy.deepcopy(model).to(precision)
        self.window = hann_window(recipe.search_px // model.backbone.reduction).to(self.device)
        self.step = self._step
        if recipe.speed not in ("eager", "compile"):
            raise UserError(f"--speed {recipe.speed}: expected eager or compile")
        if recipe.speed == "compile":
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    def _step(self, z: torch.Tensor, search: torch.Tensor) -> torch.Tensor:
        return decode(self.model.predict(z, search), self.window, self.recipe.window)

    def cut(self, frame: np.ndarray, crop: crops.Crop) -> torch.Tensor:
        """A crop's pixels as the network takes them, (1, 3, size, size)."""
        pixels = crops.to_tensor(crops.cut(frame, crop)).to(self.device)
        return crops.normalise(pixels)[None].to(self.precision)

    @torch.inference_mode()
    def init(self, frame: np.ndarray, box: Box) -> None:
        crop = crops.around(box, self.recipe.template_factor, self.recipe.template_px)
        self.z, self.box = self.model.encode(self.cut(frame, crop)), tuple(float(v) for v in box)

    @torch.inference_mode()
    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        crop = crops.around(self.box, self.recipe.search_factor, self.recipe.search_px)
        *found, score = self.step(self.z, self.cut(frame, crop)).tolist()
        box = to_frame(found, crop)
        if not np.isfinite([*box, score]).all():
            return self.box, 0.0
        self.box = keep_inside(box, frame.shape[1], frame.shape[0])
        return self.box, score
