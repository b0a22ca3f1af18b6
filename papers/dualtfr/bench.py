"""Speed of the tracker at batch 1, and what each of its parts costs: ``python -m papers.dualtfr.bench``.

Whole frames go through `tracker.DualTFRTracker` end to end; then every part is timed by itself on the inputs it gets
there. Before anything is timed, the parts put together must give what the network gives. Writes
results/bench/dualtfr_<variant>_<hardware>_<threads>.{json,md}.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from common import run
from common.data import crops
from papers.dualtfr.evaluate import build
from papers.dualtfr.model import CAB, DualTFR
from papers.dualtfr.recipes import RECIPES, Recipe
from papers.dualtfr.tracker import DualTFRTracker, decode

PAPER_FPS = 40.0
VARIANTS = {"dualtfr": "got10k", "dualtfr_micro": "tiny"}  # and the recipe whose crops they take


@dataclass
class Arguments:
    variant: str = "dualtfr"
    """dualtfr or dualtfr_micro."""
    out: Path = run.ROOT / "papers" / "dualtfr" / "results" / "bench"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seconds: float = 2.0
    """Time given to each measurement."""
    threads: int = 0
    """Of the CPU; 0: torch's choice."""
    compile: bool = True
    """Also through torch.compile, which takes minutes to start on a CPU."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.dualtfr.bench", description=__doc__)
    if args.variant not in VARIANTS:
        raise run.UserError(f"no variant {args.variant!r}; there are {', '.join(VARIANTS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    recipe = replace(RECIPES[VARIANTS[args.variant]], weights=None)
    rows = measure(recipe, world, args.seconds, ("eager", "compile") if args.compile else ("eager",))
    environment, threads = run.environment(), torch.get_num_threads()
    hardware = environment["hardware"]
    stamp = (
        f"{args.variant}, {frame_flops(build(recipe), recipe) / 1e6:,.0f} M multiply-adds a frame, frames of 640x360, "
        f"batch 1, {'bf16' if world.amp else 'fp32'}, {hardware}, {world.device.type}, {threads} threads, "
        f"torch {torch.__version__}, revision {environment['git']}, {environment['time']}"
    )
    table = "\n".join(f"| {row['name']} | {row['value']:.3g} {row['unit']} |" for row in rows)
    text = f"{stamp}\n\n| | |\n|---|---:|\n{table}\n"
    print(text)
    path = args.out / (re.sub(r"[^a-z0-9]+", "_", f"{args.variant} {hardware} {threads}".lower()) + ".json")
    args.out.mkdir(parents=True, exist_ok=True)
    run.write_json(path, {"environment": environment, "stamp": stamp, "rows": rows})
    path.with_suffix(".md").write_text(f"`{environment['command']}`\n\n{text}")
    print(f"written: {path} and .md")


def frame_flops(model: DualTFR, recipe: Recipe) -> int:
    """Multiply-adds of one frame: the template's share is computed once per sequence, and not among them."""
    template, search = (torch.zeros(1, 3, px, px) for px in (recipe.template_px, recipe.search_px))
    alone = torch.nn.Sequential(*encoder(model))
    return run.multiply_adds(model, template, search) - run.multiply_adds(alone, template)


def encoder(model: DualTFR) -> list[torch.nn.Module]:
    layers = model.layers()
    return layers[: next((i for i, layer in enumerate(layers) if isinstance(layer, CAB)), len(layers))]


@torch.inference_mode()
def measure(recipe: Recipe, world: run.World, seconds: float, kinds: tuple[str, ...]) -> list[dict]:
    """Rows as `run.metric` makes them: frames per second, then milliseconds of each part."""
    torch.manual_seed(0)
    model = build(recipe).to(world.device).eval()
    trackers = {
        kind: DualTFRTracker(model, replace(recipe, speed=kind), world.amp or torch.float32)
        for kind in kinds
    }
    frame = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    box = (280.0, 140.0, 80.0, 60.0)
    for tracker in trackers.values():
        tracker.init(frame, box)

    eager = trackers["eager"]
    place = crops.around(box, recipe.search_factor, recipe.search_px)
    template = eager.cut(frame, crops.around(box, recipe.template_factor, recipe.template_px))
    z, search = eager.z, eager.cut(frame, place)
    expected = eager.model(template, search)

    def frame_by_frame(tracker: DualTFRTracker) -> Callable:
        def step():
            tracker.box = box  # an untrained network would walk away
            return tracker.track(frame)
        return step

    backbone = eager.model.backbone
    parts: dict[str, Callable] = {"crop": lambda: eager.cut(frame, place)}
    x = search
    x = timed_part(parts, "patch embedding", backbone.patch_embed, x)
    for number, stage in enumerate(backbone.stages, 1):
        kind = type(stage.blocks[0]).__name__
        x = timed_part(parts, f"stage {number}, {len(stage.blocks)} {kind}", stage, x)
    cabs = f"position and {len(eager.model.cabs)} CABs"
    x = timed_part(parts, cabs, lambda x: eager.model.fuse(z, eager.model.position(x)), x)
    prediction = timed_part(parts, "head", eager.model.head, x)
    for own, whole in zip(prediction, expected):
        torch.testing.assert_close(own, whole, rtol=0, atol=1e-5 if whole.dtype == torch.float32 else 2e-2)
    parts["choice of the box"] = lambda: decode(prediction, eager.window, recipe.window).tolist()

    rows = []
    for kind, tracker in trackers.items():
        ms = milliseconds(frame_by_frame(tracker), world, seconds)
        rows.append(run.metric(f"fps, {kind}", 1000 / ms, "frames/s"))
    rows[0] |= {"paper_value": PAPER_FPS, "paper_source": "abstract, one GPU that is not named"}

    def both_images():
        decode(eager.model(template, search), eager.window, recipe.window).tolist()
    rows.append(run.metric("network, template anew in every frame", milliseconds(both_images, world, seconds), "ms"))
    rows.append(run.metric(
        "network, template cached", milliseconds(lambda: eager.step(z, search).tolist(), world, seconds), "ms"
    ))
    rows += [run.metric(f"part: {name}", milliseconds(part, world, seconds), "ms") for name, part in parts.items()]
    return rows


def timed_part(parts: dict[str, Callable], name: str, part: Callable, x):
    """Enters a part to be timed; returns what it makes of x."""
    parts[name] = lambda: part(x)
    return part(x)


def milliseconds(function: Callable, world: run.World, seconds: float) -> float:
    """Time of the fastest call: what else runs on the machine can only slow one down."""
    def call() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(call())
    return 1000 * min(times)


if __name__ == "__main__":
    run.main(main)
