"""SBT as a tracker: frames in, the box of the most credible token out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from common.data import crops
from common.metrics.trackers import Box, hann_window, keep_inside
from common.run import UserError


def best_token(logits: torch.Tensor, boxes: torch.Tensor, window: torch.Tensor, weight: float) -> torch.Tensor:
    """Of one crop's tokens, logits (N, 2) and boxes (N, 4), the one of the highest score once the window has its share.

    (7,): cx, cy, w, h; the token's score; its score with the window; its index.
    """
    score = logits.float().softmax(1)[:, 0]
    penalised = (1 - weight) * score + weight * window
    best = penalised.argmax()
    return torch.cat([boxes[best].float(), score[best, None], penalised[best, None], best[None].float()])


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
    """A `common.metrics.trackers.Tracker` of a network in eval mode that has `encode`, `predict` and `grid`: `SBT`.

    The template is cut from the first frame and never changes; of its computation, what the search does not enter is
    done once. In every frame: a crop around the last box, the network, the box of the best token.

    `precision` is the type of weights and activations. `speed` "compile" sends each frame's network through
    torch.compile (on a GPU with CUDA graphs); "graph" captures the uncompiled network as a CUDA graph. `published`
    maps boxes and treats borders as the authors' code does: half a pixel and one column off.
    """

    def __init__(
        self, model: torch.nn.Module, *, template_size: int = 128, search_size: int = 256,
        template_factor: float = 2.0, search_factor: float = 5.0, window: float = 0.49,
        precision: torch.dtype = torch.float32, speed: Literal["eager", "compile", "graph"] = "eager",
        published: bool = False,
    ):
        if speed not in ("eager", "compile", "graph"):
            raise UserError(f"no --speed {speed!r}; there are eager, compile and graph")
        weights = next(model.parameters())
        if speed == "graph" and weights.device.type != "cuda":
            raise UserError("--speed graph is a CUDA graph and needs a GPU; there are eager and compile")
        self.device, self.precision = weights.device, precision
        self.model = model if weights.dtype == precision else copy.deepcopy(model).to(precision)
        self.template_size, self.template_factor = template_size, template_factor
        self.search_size, self.search_factor = search_size, search_factor
        self.window, self.window_weight = hann_window(model.grid).to(self.device), window
        self.published = published
        self.speed, self.step = speed, self._step
        if speed == "compile":
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    def _step(self, z: torch.Tensor, search: torch.Tensor) -> torch.Tensor:
        """Everything that runs on the device for a frame: `best_token`'s seven numbers."""
        logits, boxes = self.model.predict(z, search)
        return best_token(logits[0], boxes[0], self.window, self.window_weight)

    def _crop(self, frame: np.ndarray, box: Box, factor: float, size: int) -> tuple[crops.Crop, torch.Tensor]:
        crop = crops.around(box, factor, size, centre_at=size / 2 if self.published else None)
        pixels = crops.to_tensor(crops.cut(frame, crop, spare=int(self.published))).to(self.device)
        return crop, crops.normalise(pixels)[None].to(self.precision)

    @torch.inference_mode()
    def init(self, frame: np.ndarray, box: Box) -> None:
        _, template = self._crop(frame, box, self.template_factor, self.template_size)
        self.z, self.box = self.model.encode(template), tuple(float(v) for v in box)

    @torch.inference_mode()
    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        crop, search = self._crop(frame, self.box, self.search_factor, self.search_size)
        if self.speed == "graph" and not isinstance(self.step, CudaGraph):
            self.step = CudaGraph(self._step, self.z, search)
        cx, cy, w, h, score, *_ = self.step(self.z, search).tolist()
        box = crop.to_frame(np.array([cx - w / 2, cy - h / 2, w, h]) * crop.size)
        if not np.isfinite([*box, score]).all():
            return self.box, 0.0
        self.box = keep_inside(box, frame.shape[1], frame.shape[0])
        return self.box, score
