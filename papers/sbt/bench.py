"""Times a frame of SBT's tracking at batch 1 beside the authors' formulation: ``make bench PAPER=sbt``.

    python -m papers.sbt.bench                        base, on the GPU if there is one, else on the CPU
    python -m papers.sbt.bench --variant large --threads 2

A way is timed only after it has given the authors' logits and boxes (common/run/bench.py). The record goes to
results/bench/, named after the variant and the hardware.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from common import run
from common.data import crops
from common.run import bench
from papers.sbt.evaluate import crop_shapes
from papers.sbt.model import SBT, VARIANTS, EoCBlock, create_tracker
from papers.sbt.recipes import RECIPES
from papers.sbt.tracker import CudaGraph, SBTTracker, best_token

AUTHORS = "authors' formulation"
FRAME, BOX = (360, 480), (200.0, 150.0, 60.0, 45.0)  # height and width; x, y, w, h: the crops lie inside the frame
RECIPE = RECIPES["authors_base"]
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # of the largest logit and box; bf16's own rounding is 4e-3


# The authors' formulation: PVTv2's way with tokens, written out. Tokens are (B, N, C); every convolution gets a
# contiguous map; attention is two matrix products around a softmax; both images go through all blocks in every frame.


def _to_map(x_BNC: torch.Tensor, side: int) -> torch.Tensor:
    B, _, C = x_BNC.shape
    return x_BNC.permute(0, 2, 1).reshape(B, C, side, side)


def _attention(block: EoCBlock, x: torch.Tensor, source: torch.Tensor, side: int) -> torch.Tensor:
    attn = block.attn
    B, N, C = x.shape
    q = attn.q(x).reshape(B, N, attn.num_heads, -1).permute(0, 2, 1, 3)
    if attn.sr is not None:
        source = attn.norm(attn.sr(_to_map(source, side)).reshape(B, C, -1).permute(0, 2, 1))
    kv = attn.kv(source).reshape(B, -1, 2, attn.num_heads, C // attn.num_heads).permute(2, 0, 3, 1, 4)
    k, v = kv[0], kv[1]
    weights = ((q @ k.transpose(-2, -1)) * (C // attn.num_heads) ** -0.5).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


def _mlp(block: EoCBlock, x: torch.Tensor, side: int) -> torch.Tensor:
    x = block.mlp.fc1(x)
    x = block.mlp.dwconv(_to_map(x, side).contiguous()).flatten(2).transpose(1, 2)
    return block.mlp.fc2(F.gelu(x))


def authors(model: SBT, template: torch.Tensor, search: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network as the authors' code computes it, with the weights of `model` (made with authors_errors=True)."""
    z, x = template, search
    for stage in model.backbone.stages:
        maps = [stage.patch_embed.proj(image) for image in (z, x)]
        zs, xs = (m.shape[-1] for m in maps)
        z, x = (stage.patch_embed.norm(m.flatten(2).transpose(1, 2)) for m in maps)
        for block in stage.blocks:
            nz, nx = block.norm1(z), block.norm1(x)
            if block.cross:
                z, x = z + _attention(block, nz, nx, xs), x + _attention(block, nx, nz, zs)
            else:
                z, x = z + _attention(block, nz, nz, zs), x + _attention(block, nx, nx, xs)
            z, x = z + _mlp(block, block.norm2(z), zs), x + _mlp(block, block.norm2(x), xs)
        if stage is not model.backbone.stages[-1]:
            z, x = _to_map(z, zs).contiguous(), _to_map(x, xs).contiguous()
    prediction = model.head(stage.norm(x).unflatten(1, (xs, xs)))
    return prediction.logits, prediction.boxes


class Way(NamedTuple):
    """A way to compute a frame's network: `network(z, search)` gives logits and boxes."""

    network: Callable
    z: torch.Tensor
    search: torch.Tensor

    def __call__(self):
        return self.network(self.z, self.search)


def ways(
    model: SBT, half: SBT, template: torch.Tensor, search: torch.Tensor, compiled: bool = True
) -> dict[str, dict[str, Way]]:
    """By type; `half` is the model in bf16."""
    cuda = template.device.type == "cuda"
    first = {AUTHORS: Way(partial(authors, model), template, search)}
    found = {"fp32": first | {"ours, template every frame": Way(model, template, search)}, "bf16": dict(first)}
    for (kind, its), network in zip(found.items(), (model, half)):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        inputs = network.encode(template.to(dtype)), search.to(dtype)
        its["ours"] = Way(network.predict, *inputs)
        if compiled:
            mode = {"mode": "reduce-overhead"} if cuda else {}
            its["compiled"] = Way(torch.compile(network.predict, dynamic=False, fullgraph=True, **mode), *inputs)
        if cuda:
            its["CUDA graph"] = Way(CudaGraph(network.predict, *inputs), *inputs)
    return found


def frame_of(way: Way, tracker: SBTTracker, frame: np.ndarray) -> Callable[[], torch.Tensor]:
    """() -> the box of the whole frame, from the picture on, when `tracker` computes its network in this way."""
    tracker.init(frame, BOX)
    tracker.z = way.z
    tracker.step = lambda z, x: best_token(*(y[0] for y in way.network(z, x)), tracker.window, tracker.recipe.window)

    def track() -> torch.Tensor:
        tracker.box = BOX  # an untrained network would walk away
        return torch.tensor(tracker.track(frame)[0])

    return track


def parts(model: SBT, tracker: SBTTracker, frame: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Of a frame's work."""
    tracker.init(frame, BOX)
    z, crop = tracker.z, partial(tracker.crop, frame, BOX, tracker.recipe.search_factor, tracker.recipe.search_px)
    search = crop()[1]
    x = model.backbone.encode(search)
    features = model.backbone.correlate(z, x)
    logits, boxes = model.head(features)

    def start() -> torch.Tensor:
        tracker.init(frame, BOX)
        return tracker.z

    return {
        "template, once a sequence: crop and network": start,
        "crop, normalize": lambda: crop()[1],
        "network before the first EoC-CA block": lambda: model.backbone.encode(search),
        "network from there on": lambda: model.backbone.correlate(z, x),
        "head": lambda: model.head(features),
        "best token": lambda: torch.tensor(best_token(logits[0], boxes[0], tracker.window, 0.49).tolist()),
    }


@dataclass
class Arguments:
    variant: Literal[tuple(name.removeprefix("sbt_") for name in VARIANTS)] = "base"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = torch.get_num_threads()
    compile: bool = True
    """Also time what torch.compile makes of it; compiling takes minutes on a CPU."""
    seconds: float = 6.0
    """Spent on each row."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.sbt.bench", description=__doc__)
    world = run.start_world(run.Options(device=args.device))
    bench.prepare(args.threads)
    torch.manual_seed(0)

    # Random weights with lively norms and biases: the time does not depend on them.
    model = create_tracker(f"sbt_{args.variant}", authors_errors=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    flops = run.multiply_adds(model, *crop_shapes(RECIPE))
    model.to(world.device)
    recipe = replace(RECIPE, model=f"sbt_{args.variant}")
    trackers = {"fp32": SBTTracker(model, recipe), "bf16": SBTTracker(model, recipe, torch.bfloat16)}
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    sides = recipe.template_px, recipe.search_px
    template, search = (crops.normalize(torch.rand(1, 3, px, px, device=world.device) * 255) for px in sides)
    with torch.inference_mode():
        cases = []
        found = ways(model, trackers["bf16"].model, template, search, args.compile)
        for kind, its in found.items():
            frames = {
                name: frame_of(way, copy.copy(trackers["fp32" if name == AUTHORS else kind]), frame)
                for name, way in its.items()
            }
            tolerance = math.inf if kind == "bf16" else 1e-3  # of two tokens of nearly one score rounding may choose
            cases.append(bench.Case(f"network, {kind}", its, tolerance=TOLERANCES[kind]))
            cases.append(bench.Case(f"whole frame, {kind}", frames, tolerance=tolerance))
        records = [timed(case, args.seconds) for case in cases]
        of_parts = [
            timed(bench.Case(name, {"ours": part}, tolerance=0.0), args.seconds / 4)
            for name, part in parts(model, trackers["fp32"], frame).items()
        ]
    text = f"{bench.table(records)}\nWhere the time of ours goes, fp32, uncompiled:\n\n{bench.table(of_parts)}"
    print(text)
    stamp = f"SBT-{args.variant}, {flops / 1e9:.1f} G multiply-adds, batch 1, {args.threads} threads"
    folder = run.ROOT / "papers" / "sbt" / "results" / "bench"
    bench.write_record(folder, f"sbt {args.variant}", world.device.type, records + of_parts, text, stamp=stamp)


def timed(case: bench.Case, seconds: float) -> dict[str, Any]:
    case.about["off_by"] = bench.check_parity(case)
    return bench.measure(case, seconds)


if __name__ == "__main__":
    run.main(main)
