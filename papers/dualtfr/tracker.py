"""DualTFR as a tracker: the template of the first frame for ever, and the box of the most credible search token."""

from __future__ import annotations

import copy

import numpy as np
import torch

from common.data import crops
from common.metrics.trackers import Box, hann_window, keep_inside, smoothed
from common.run import UserError
from papers.dualtfr.model import DualTFR
from papers.dualtfr.recipes import Recipe


def best_token(logits: torch.Tensor, boxes: torch.Tensor, window: torch.Tensor, weight: float) -> torch.Tensor:
    """Of one crop's tokens, logits (N, 2) and boxes (N, 4), the best by score and window (N), which counts `weight`.

    (5,): its cx, cy, w, h as fractions of the crop; its score.
    """
    score = logits.float().softmax(1)[:, 0]
    best = ((1 - weight) * score + weight * window).argmax(0, keepdim=True)  # a tensor: torch.compile's fullgraph
    return torch.cat([boxes[best].float().flatten(), score[best]])


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
            raise UserError(f"no --speed {recipe.speed!r}; there are eager and compile")
        if recipe.speed == "compile":
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    def _step(self, z: torch.Tensor, search: torch.Tensor) -> torch.Tensor:
        """Everything that runs on the device for a frame: `best_token`'s five numbers."""
        logits, boxes = self.model.predict(z, search)
        return best_token(logits[0], boxes[0], self.window, self.recipe.window)

    def crop(self, frame: np.ndarray, box: Box, factor: float, size: int) -> tuple[crops.Crop, torch.Tensor]:
        """A crop around a box x, y, w, h (px), and its pixels as the network takes them, (1, 3, size, size)."""
        crop = crops.around(box, factor, size)
        pixels = crops.send(crops.to_tensor(crops.cut(frame, crop)), self.device)
        return crop, crops.normalize(pixels)[None].to(self.precision)

    @torch.inference_mode()
    def init(self, frame: np.ndarray, box: Box) -> None:
        """Takes the template around the box x, y, w, h (px) of a frame (H, W, 3) uint8 RGB."""
        _, template = self.crop(frame, box, self.recipe.template_factor, self.recipe.template_px)
        self.z, self.box = self.model.encode(template), tuple(float(v) for v in box)

    @torch.inference_mode()
    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        """The box x, y, w, h (px) in the next frame, and the best token's score; where the network's answer is not
        finite, the last box and 0."""
        crop, search = self.crop(frame, self.box, self.recipe.search_factor, self.recipe.search_px)
        cx, cy, w, h, score = self.step(self.z, search).tolist()
        box = crop.to_frame(np.array([cx - w / 2, cy - h / 2, w, h]) * crop.size)
        if not np.isfinite([*box, score]).all():
            return self.box, 0.0
        self.box = keep_inside(smoothed(box, self.box, self.recipe.size_lr), frame.shape[1], frame.shape[0])
        return self.box, score
