"""Times a frame of SBT's tracking at batch 1 beside the authors' formulation: ``make bench PAPER=sbt``.

    python -m papers.sbt.bench                        base, on the GPU if there is one, else on the CPU
    python -m papers.sbt.bench --variant large --threads 2

A row is timed only after it has given the authors' logits and boxes; a row that does not stops the run. Rows take
turns, so that a slow spell of the machine meets all of them, and each keeps its fastest turn. Result: a JSON and a
Markdown file in benchmarks/, named after the variant and the hardware.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from common import run
from common.data import crops
from papers.sbt.model import SBT, VARIANTS, EoCBlock, tracker
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


class AuthorsTracker(SBTTracker):
    """The authors' loop: the template through the network with every frame."""

    def init(self, frame, box):
        self.z, self.box = self._crop(frame, box, self.template_factor, self.template_size)[1], box

    def _step(self, z, search):
        logits, boxes = authors(self.model, z, search)
        return best_token(logits[0], boxes[0], self.window, self.window_weight)


def rows(model: SBT, half: SBT, template: torch.Tensor, search: torch.Tensor) -> dict[str, Callable]:
    """Ways to compute a frame's network, each () -> (logits, boxes). `half` is the model in bf16."""
    device = template.device.type
    half_z, half_x = half.encode(template.bfloat16()), search.bfloat16()
    z = model.encode(template)
    modes = {"mode": "reduce-overhead"} if device == "cuda" else {}
    found: dict[str, Callable] = {
        AUTHORS: lambda: authors(model, template, search),
        "ours, template every frame": lambda: model(template, search),
        "ours": lambda: model.predict(z, search),
        "ours, bf16": lambda: half.predict(half_z, half_x),
    }
    for name, network, inputs in (("compiled", model, (z, search)), ("compiled, bf16", half, (half_z, half_x))):
        compiled = torch.compile(network.predict, dynamic=False, fullgraph=True, **modes)
        found[name] = lambda compiled=compiled, inputs=inputs: compiled(*inputs)
    if device == "cuda":
        for name, network, inputs in (("graph", model, (z, search)), ("graph, bf16", half, (half_z, half_x))):
            graph = CudaGraph(network.predict, *inputs)
            found[f"CUDA {name}"] = lambda graph=graph, inputs=inputs: graph(*inputs)
    return found


def check_parity(found: dict[str, Callable]) -> dict[str, float]:
    """Largest difference of each row's logits and boxes from the authors', over their largest value. Stops the run
    above 1e-4, or 5e-2 in bf16 (whose own rounding is 4e-3)."""
    expected = found[AUTHORS]()
    off = {}
    for name, row in found.items():
        differences = [
            ((ours.float() - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in zip(row(), expected)
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


def table(times: dict[str, float], off: dict[str, float] | None = None) -> str:
    base = times.get(AUTHORS)
    lines = ["| | ms | times faster | off by |", "|---|---:|---:|---:|"] if off else ["| | ms |", "|---|---:|"]
    for name, time in times.items():
        more = f" {base / time:.2f} | {off.get(name, 0):.1g} |" if off else ""
        lines.append(f"| {name} | {1e3 * time:.3g} |{more}")
    return "\n".join(lines) + "\n"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=[name.removeprefix("sbt_") for name in VARIANTS], default="base")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.threads = args.threads
    torch.manual_seed(0)

    # Random weights with lively norms and biases: the time does not depend on them.
    model = tracker(f"sbt_{args.variant}", published=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.to(args.device)
    plain, theirs = (kind(model, published=True) for kind in (SBTTracker, AuthorsTracker))
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
        found = rows(model, half.model, template, search)
        off = check_parity(found)
        network = measure(found, args.seconds)
        for follower in (theirs, plain, half):
            follower.init(frame, BOX)
        whole = {
            AUTHORS: lambda: theirs.track(frame), "ours": lambda: plain.track(frame),
            "ours, bf16": lambda: half.track(frame),
        }
        frames = measure(whole, args.seconds)
        parts = measure(breakdown(model, plain, frame), args.seconds / 4)
    fps = "".join(f"- {name}: {1 / time:.2f} frames/s\n" for name, time in frames.items())
    text = (
        f"{stamp}\n\nThe network of one frame:\n\n{table(network, off)}\nWhere the time of ours goes, uncompiled:\n\n"
        f"{table(parts)}\nWhole frames, from the picture to the box, uncompiled:\n\n{fps}"
    )
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "_", f"sbt {args.variant} {hardware} {args.threads}".lower()).strip("_")
    folder = run.ROOT / "benchmarks"
    folder.mkdir(exist_ok=True)
    records = {"network": network, "off_by": off, "parts": parts, "frames": frames}
    run.write_json(folder / f"{slug}.json", {"environment": environment, "stamp": stamp, "seconds": records})
    (folder / f"{slug}.md").write_text(f"`{environment['command']}`\n\n{text}")
    print(f"written: {folder / slug}.json and .md")


if __name__ == "__main__":
    main()
