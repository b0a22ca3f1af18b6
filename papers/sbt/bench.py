"""Times a frame of SBT's tracking at batch 1 beside the authors' formulation: ``make bench PAPER=sbt``.

    python -m papers.sbt.bench                        base, on the GPU if there is one, else on the CPU
    python -m papers.sbt.bench --variant large --threads 2

A way is timed only after it has given the authors' logits and boxes; one that does not stops the run. Ways take turns,
so that a slow spell of the machine meets all of them, and each keeps its fastest turn. Result: a JSON and a
Markdown file in results/bench/, named after the variant and the hardware.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from common import run
from common.data import crops
from papers.sbt.model import SBT, VARIANTS, EoCBlock, create_tracker
from papers.sbt.tracker import CudaGraph, SBTTracker, best_token

AUTHORS = "authors' formulation"
FRAME, BOX = (360, 480), (200.0, 150.0, 60.0, 45.0)  # height and width; x, y, w, h: the crops lie inside the frame


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
    """The network as the authors' code computes it, with the weights of `model` (made with published=True)."""
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
) -> dict[str, Way]:
    """`half` is the model in bf16."""
    cuda = template.device.type == "cuda"
    fp32 = model.encode(template), search
    bf16 = half.encode(template.bfloat16()), search.bfloat16()
    found = {
        AUTHORS: Way(partial(authors, model), template, search),
        "ours, template every frame": Way(model, template, search),
        "ours": Way(model.predict, *fp32),
        "ours, bf16": Way(half.predict, *bf16),
    }
    for suffix, network, inputs in (("", model, fp32), (", bf16", half, bf16)):
        modes = {"mode": "reduce-overhead"} if cuda else {}
        if compiled:
            function = torch.compile(network.predict, dynamic=False, fullgraph=True, **modes)
            found[f"compiled{suffix}"] = Way(function, *inputs)
        if cuda:
            found[f"CUDA graph{suffix}"] = Way(CudaGraph(network.predict, *inputs), *inputs)
    return found


def frame_of(way: Way, follower: SBTTracker, frame: np.ndarray) -> Callable:
    """() -> the box of the whole frame, from the picture on, when `follower` computes its network in this way."""
    follower.init(frame, BOX)
    follower.z = way.z
    follower.step = lambda z, x: best_token(*(y[0] for y in way.network(z, x)), follower.window, 0.49)

    def track():
        follower.box = BOX  # an untrained network would walk away
        return follower.track(frame)

    return track


def check_parity(found: dict[str, Way]) -> dict[str, float]:
    """Largest difference of each way's logits and boxes from the authors', over their largest value. Stops the run
    above 1e-4, or 5e-2 in bf16 (whose own rounding is 4e-3)."""
    expected = found[AUTHORS]()
    off = {}
    for name, way in found.items():
        differences = [
            ((ours.float() - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in zip(way(), expected)
        ]
        off[name] = max(differences)
        if not off[name] <= (5e-2 if "bf16" in name else 1e-4):
            raise SystemExit(f"{name} is off by {off[name]:.2g} of the largest value; not timed")
    return off


def measure(found: dict[str, Callable], seconds: float, turns: int = 6) -> dict[str, float]:
    """Seconds of each row."""
    timers = {
        name: Timer("row()", globals={"row": row}, num_threads=torch.get_num_threads()) for name, row in found.items()
    }
    repeats = {name: timer.blocked_autorange(min_run_time=seconds / turns).number_per_run
               for name, timer in timers.items()}
    times = dict.fromkeys(timers, float("inf"))
    for _ in range(turns):
        times = {name: min(times[name], timer.timeit(repeats[name]).mean) for name, timer in timers.items()}
    return times


def breakdown(model: SBT, follower: SBTTracker, frame: np.ndarray) -> dict[str, Callable]:
    """The parts of a frame's work, each () -> anything."""
    follower.init(frame, BOX)
    _, search = follower._crop(frame, BOX, 5.0, follower.search_size)
    x = model.backbone.encode(search)
    features = model.backbone.correlate(follower.z, x)
    logits, boxes = model.head(features)
    return {
        "template, once a sequence: crop and network": lambda: follower.init(frame, BOX),
        "crop, normalise": lambda: follower._crop(frame, BOX, 5.0, follower.search_size),
        "network before the first EoC-CA block": lambda: model.backbone.encode(search),
        "network from there on": lambda: model.backbone.correlate(follower.z, x),
        "head": lambda: model.head(features),
        "best token": lambda: best_token(logits[0], boxes[0], follower.window, 0.49).tolist(),
    }


def tables(network: dict[str, float], frames: dict[str, float], off: dict[str, float], parts: dict[str, float]) -> str:
    """Markdown: a row for each way, then a row for each part."""
    lines = ["| | network, ms | times faster | off by | whole frame, frames/s | times faster |", "|---|" + "---:|" * 5]
    for name, time in network.items():
        faster, frame_faster = (f"{times[AUTHORS] / times[name]:.2f}" for times in (network, frames))
        frame = f"{1 / frames[name]:.3g} | {frame_faster}"
        lines.append(f"| {name} | {1e3 * time:.3g} | {faster} | {off[name]:.1g} | {frame} |")
    lines += ["", "Where the time of ours goes, fp32, uncompiled:", "", "| | ms |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {1e3 * time:.3g} |" for name, time in parts.items())]) + "\n"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=[name.removeprefix("sbt_") for name in VARIANTS], default="base")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="also time what torch.compile makes of it; compiling takes minutes on a CPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.threads = args.threads
    torch.manual_seed(0)

    # Random weights with lively norms and biases: the time does not depend on them.
    model = create_tracker(f"sbt_{args.variant}", published=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.to(args.device)
    plain = SBTTracker(model, published=True)
    half = SBTTracker(model, published=True, precision=torch.bfloat16)
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    template, search = (
        crops.normalise(torch.rand(1, 3, side, side, device=args.device) * 255) for side in (128, 256)
    )
    environment = run.environment()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else environment["hardware"]
    stamp = (
        f"SBT-{args.variant}, {run.multiply_adds(model, template, search) / 1e9:.1f} G multiply-adds, batch 1, "
        f"{hardware}, {args.device}, {args.threads} thread{'s' * (args.threads > 1)}, torch {torch.__version__}, "
        f"revision {environment['git']}, {environment['time']}"
    )
    print(stamp)
    with torch.inference_mode():
        found = ways(model, half.model, template, search, args.compile)
        off = check_parity(found)
        network = measure(found, args.seconds)
        followers = {name: copy.copy(half if "bf16" in name else plain) for name in found}
        frames = measure({name: frame_of(way, followers[name], frame) for name, way in found.items()}, args.seconds)
        parts = measure(breakdown(model, plain, frame), args.seconds / 4)
    text = f"{stamp}\n\n{tables(network, frames, off, parts)}"
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "_", f"sbt {args.variant} {hardware} {args.threads}".lower()).strip("_")
    folder = run.ROOT / "papers" / "sbt" / "results" / "bench"
    folder.mkdir(exist_ok=True)
    records = {"network": network, "off_by": off, "parts": parts, "frames": frames}
    run.write_json(folder / f"{slug}.json", {"environment": environment, "stamp": stamp, "seconds": records})
    (folder / f"{slug}.md").write_text(f"`{environment['command']}`\n\n{text}")
    print(f"written: {folder / slug}.json and .md")


if __name__ == "__main__":
    main()
