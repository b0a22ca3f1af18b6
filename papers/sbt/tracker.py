"""SBT as a tracker: frames in, the box of the most credible token out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch

from common.data import crops
from common.metrics.trackers import Box, hann_window, keep_inside, smoothed
from common.run import UserError
from papers.sbt.data import authors_around, authors_frame
from papers.sbt.recipes import Recipe


def best_token(logits: torch.Tensor, boxes: torch.Tensor, window: torch.Tensor, weight: float) -> torch.Tensor:
    """Of one crop's tokens, logits (N, 2) and boxes (N, 4), the best by score and window (N), which counts `weight`.

    (7,): its cx, cy, w, h as fractions of the crop; its score; its score with the window; its index.
    """
    score = logits.float().softmax(1)[:, 0]
    windowed = (1 - weight) * score + weight * window
    best = windowed.argmax(0, keepdim=True)  # a tensor: torch.compile's fullgraph
    return torch.cat([boxes[best].float().flatten(), score[best], windowed[best], best.float()])


class CudaGraph:
    """A function of CUDA tensors of fixed shapes, captured once and replayed with one launch. Written for GPUs, and
    not run on one yet. The result is overwritten by the next call."""

    def __init__(self, function: Callable, *examples: torch.Tensor):
        self.inputs = [x.clone() for x in examples]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lets libraries choose and allocate before the capture, which forbids it
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


class SBTTracker:
    """A `common.metrics.trackers.Tracker` of a network in eval mode that has `encode`, `predict` and `grid`, such as
    `SBT`, with the crops and the window of a recipe.

    The template is cut from the first frame and never changes; of its computation, what the search does not enter is
    done once. In every frame: a crop around the last box, the network, the box of the best token.

    `precision` is the type of weights and activations. The recipe's `speed` "compile" sends each frame's network
    through torch.compile (on a GPU with CUDA graphs); "graph" captures the uncompiled network as a CUDA graph. With
    `authors_errors` boxes are mapped and borders treated as in the authors' code: half a pixel and one column off.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, precision: torch.dtype = torch.float32):
        weights = next(model.parameters())
        self.device, self.precision, self.recipe = weights.device, precision, recipe
        self.model = model if weights.dtype == precision else copy.deepcopy(model).to(precision)
        self.window = hann_window(model.grid).to(self.device)
        self.step = self._step
        if recipe.speed not in ("eager", "compile", "graph"):
            raise UserError(f"no --speed {recipe.speed!r}; there are eager, compile and graph")
        if recipe.speed == "graph" and self.device.type != "cuda":
            raise UserError("--speed graph is a CUDA graph and needs a GPU; there are eager and compile")
        if recipe.speed == "compile":
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    def _step(self, z: torch.Tensor, search: torch.Tensor) -> torch.Tensor:
        """Everything that runs on the device for a frame: `best_token`'s seven numbers."""
        logits, boxes = self.model.predict(z, search)
        return best_token(logits[0], boxes[0], self.window, self.recipe.window)

    def crop(self, frame: np.ndarray, box: Box, factor: float, size: int) -> tuple[crops.Crop, torch.Tensor]:
        """A crop around a box x, y, w, h (px), and its pixels as the network takes them, (1, 3, size, size)."""
        if self.recipe.authors_errors:
            crop, frame = authors_around(box, factor, size, size / 2), authors_frame(frame)
        else:
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
        if self.recipe.speed == "graph" and not isinstance(self.step, CudaGraph):
            self.step = CudaGraph(self._step, self.z, search)
        cx, cy, w, h, score, *_ = self.step(self.z, search).tolist()
        box = crop.to_frame(np.array([cx - w / 2, cy - h / 2, w, h]) * crop.size)
        if not np.isfinite([*box, score]).all():
            return self.box, 0.0
        self.box = keep_inside(smoothed(box, self.box, self.recipe.size_lr), frame.shape[1], frame.shape[0])
        return self.box, score
