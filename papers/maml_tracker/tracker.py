"""The meta-trained detector as a tracker: it learns the target from the first frame, and goes on learning.

Boxes of frames are x, y, w, h, those of crops x1, y1, x2, y2; both in pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from common.data import crops
from common.metrics.trackers import Box, hann_window
from common.run import World
from papers.maml_tracker.data import corners, crop_around, cut, support_crops
from papers.maml_tracker.maml import MAML
from papers.maml_tracker.model import Crops, Detector
from papers.maml_tracker.recipes import Recipe


class SupportSet:
    """Ds in tracking, as prepared crops: the first frame's, which stay, and a buffer whose oldest entry leaves first.

    Its slots are allocated once, so that a compiled update always sees the same shapes; empty ones weigh nothing.
    """

    def __init__(self, first: Crops, buffer: int):
        self.fixed, self.buffer, self.entered = len(first.x), buffer, 0
        self.slots = Crops(*(torch.cat([x, x[:1].repeat(buffer, *(1,) * (x.ndim - 1))]) for x in first))
        self.slots.weight[self.fixed :] = 0

    def put(self, crop: Crops) -> None:
        if self.buffer:
            slot = self.fixed + self.entered % self.buffer
            for own, new in zip(self.slots, crop):
                own[slot] = new[0]
            self.entered += 1

    def filled(self) -> Crops:
        count = self.fixed + min(self.entered, self.buffer)
        return Crops(*(x[:count] for x in self.slots))


class MAMLTracker:
    """A `common.metrics.trackers.Tracker` of a meta-trained detector."""

    def __init__(self, maml: MAML, recipe: Recipe, world: World):
        self.maml, self.recipe, self.world = maml, recipe, world
        self.detect, self.objective = self._detect, maml.objective
        self.window = hann_window(maml.detector.grid).to(world.device)
        if recipe.speed == "compile":
            mode = "reduce-overhead" if world.device.type == "cuda" else "default"
            self.detect = torch.compile(self._detect, mode=mode, fullgraph=True, dynamic=False)
            self.objective = torch.compile(maml.objective, mode=mode, dynamic=False)

    def init(self, frame: np.ndarray, box: Box) -> None:
        self.box = tuple(float(v) for v in box)
        copies = support_crops(box, self.recipe, np.random.default_rng(0))
        first = self.prepare(frame, copies, [corners(crop, box) for crop in copies])
        self.support = SupportSet(first, self.recipe.buffer)
        self.frame, self.updates, self.rested = 0, 0, self.recipe.rest
        self.learn(first, self.recipe.first_steps, self.maml.theta_0())

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        """Lines 4 to 16 of the paper's Algorithm 1."""
        recipe = self.recipe
        self.frame, self.rested = self.frame + 1, self.rested + 1
        crop = crop_around(self.box, recipe)
        seen = self.prepare(frame, [crop], [corners(crop, self.box)])
        last = crops.send(torch.tensor([side * crop.scale for side in self.box[2:]]), self.world.device)
        *found, penalty, score, rival, highest = self.detect(self.theta, seen.x, last).tolist()
        if not np.isfinite([*found, penalty, score]).all():
            return self.box, 0.0
        if highest < recipe.hold:
            return self.box, highest
        self.box = self._move(frame, crop, np.array(found), confidence=penalty * score)
        if recipe.online_update and score >= recipe.accept:
            seen.box_xyxy[0] = crops.send(torch.from_numpy(corners(crop, self.box)).float(), self.world.device)
            self.support.put(seen)
        distracted = rival >= recipe.distractor * score and self.rested >= recipe.rest
        if recipe.online_update and (self.frame % recipe.update_every == 0 or distracted):
            # Among the crops is this one: where it shows a distractor, it is a hard negative.
            support = self.support.slots if recipe.speed == "compile" else self.support.filled()
            self.learn(support, recipe.update_steps, self.theta)
            self.updates, self.rested = self.updates + 1, 0
        return self.box, score

    @torch.no_grad()
    def prepare(self, frame: np.ndarray, around: list[crops.Crop], boxes: list[np.ndarray]) -> Crops:
        """Crops of one frame, sent through the layers that do not change online."""
        pixels = crops.send(torch.stack([crops.to_tensor(cut(frame, crop)) for crop in around]), self.world.device)
        ones = torch.ones(len(around), device=self.world.device)
        box_xyxy = crops.send(torch.from_numpy(np.stack(boxes)).float(), self.world.device)
        with self.world.autocast():
            return self.maml.prepare(self.maml.detector, Crops(pixels, box_xyxy, ones.bool(), ones))

    def learn(self, support: Crops, steps: int, theta) -> None:
        with self.world.autocast():
            self.theta = self.maml.adapt(support, steps, theta, self.objective)

    @torch.no_grad()
    def _detect(self, theta, x: torch.Tensor, last_wh: torch.Tensor) -> torch.Tensor:
        """(8,): the best box x1, y1, x2, y2; its penalty; its score; the best score of cells outside that box; the
        highest score of all."""
        with self.world.autocast():
            boxes, scores = self.maml.call(theta, Detector.predict, x)
        boxes, scores = boxes[0], scores[0]
        penalty = change_penalty(boxes[:, 2:] - boxes[:, :2], last_wh, self.recipe.penalty_k)
        penalised = scores * penalty * (1 - self.recipe.window) + self.window * self.recipe.window
        best = penalised.argmax(keepdim=True)
        box, penalty, score = (values.index_select(0, best) for values in (boxes, penalty, scores))
        anchors = self.maml.detector.head.anchors
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        outside = ((centers < box[:, :2]) | (centers > box[:, 2:])).any(1)
        rival = (scores * outside).amax(0, keepdim=True)
        return torch.cat([box[0], penalty, score, rival, scores.amax(0, keepdim=True)])

    def _move(self, frame: np.ndarray, crop: crops.Crop, found: np.ndarray, confidence: float) -> Box:
        """The new box: at the found center, its size interpolated between the old and the found one."""
        height, width = frame.shape[:2]
        cx, cy, *_ = crop.to_frame([*(found[:2] + found[2:]) / 2, 0, 0])
        lr = self.recipe.size_lr * confidence
        w, h = (1 - lr) * np.array(self.box[2:]) + lr * (found[2:] - found[:2]) / crop.scale
        cx, cy = min(max(cx, 0.0), width), min(max(cy, 0.0), height)
        w, h = (min(max(side, self.recipe.min_side_px), length) for side, length in ((w, width), (h, height)))
        return float(cx - w / 2), float(cy - h / 2), float(w), float(h)


def change_penalty(boxes_wh: torch.Tensor, last_wh: torch.Tensor, k: float) -> torch.Tensor:
    """exp(-k (r s - 1)), (N,): r and s, at least 1, are the changes of aspect ratio and of size, as in SiamRPN."""

    def change(ratio: torch.Tensor) -> torch.Tensor:
        return torch.maximum(ratio, 1 / ratio)

    def size(wh: torch.Tensor) -> torch.Tensor:
        margin = wh.sum(-1) / 2
        return ((wh[..., 0] + margin) * (wh[..., 1] + margin)).sqrt()

    aspect = change((boxes_wh[:, 0] / boxes_wh[:, 1]) / (last_wh[0] / last_wh[1]))
    return (-k * (aspect * change(size(boxes_wh) / size(last_wh)) - 1)).exp()
