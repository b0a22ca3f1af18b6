"""Speed of the tracker at batch 1, and what each of its parts costs: ``python -m papers.dualtfr.bench``.

Whole frames go through `tracker.DualTFRTracker` end to end; then every part is timed by itself on the inputs it gets
there. Before anything is timed, the parts put together must give what the network gives (common/run/bench.py). The
record goes to results/bench/, named after the variant and the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from common import run
from common.run import bench
from papers.dualtfr.evaluate import build, crop_shapes
from papers.dualtfr.model import CAB, DualTFR, Prediction
from papers.dualtfr.recipes import RECIPES, Recipe
from papers.dualtfr.tracker import DualTFRTracker, best_token

VARIANTS = {"dualtfr": "got10k", "dualtfr_micro": "tiny"}  # and the recipe whose crops they take
FRAME, BOX = (360, 640), (280.0, 140.0, 80.0, 60.0)  # height and width; x, y, w, h


@dataclass
class Arguments:
    variant: Literal[tuple(VARIANTS)] = "dualtfr"
    out: Path = run.ROOT / "papers" / "dualtfr" / "results" / "bench"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seconds: float = 2.0
    """Spent on each row."""
    threads: int = torch.get_num_threads()
    compile: bool = True
    """Also through torch.compile, which takes minutes to start on a CPU."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.dualtfr.bench", description=__doc__)
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    bench.prepare(args.threads)
    torch.manual_seed(0)
    recipe = replace(RECIPES[VARIANTS[args.variant]], init=None)
    model = build(recipe).eval()
    flops = frame_multiply_adds(model, recipe)
    records = []
    with torch.inference_mode():
        for case in cases(model.to(world.device), recipe, world, args.compile):
            bench.check_parity(case)
            records.append(bench.measure(case, args.seconds))
    tables = [bench.table(its) for its in (records[:1], records[1:2], records[2:])]  # ways of three kinds
    text = "\n".join(tables)
    print(text)
    stamp = (
        f"{args.variant}, {flops / 1e6:,.0f} M multiply-adds a frame, frames of {FRAME[1]}x{FRAME[0]}, batch 1, "
        f"{'bf16' if world.amp else 'fp32'}, {args.threads} threads; the paper: 40 frames/s on a GPU that is not named"
    )
    bench.write_record(args.out, args.variant, world.device.type, records, text, stamp=stamp)


def frame_multiply_adds(model: DualTFR, recipe: Recipe) -> int:
    """Of one frame: the template's part is computed once per sequence, and not among them."""
    template, search = crop_shapes(recipe)
    alone = torch.nn.Sequential(*encoder(model))
    return run.multiply_adds(model, template, search) - run.multiply_adds(alone, template)


def encoder(model: DualTFR) -> list[torch.nn.Module]:
    layers = model.layers()
    return layers[: next((i for i, layer in enumerate(layers) if isinstance(layer, CAB)), len(layers))]


def cases(model: DualTFR, recipe: Recipe, world: run.World, compiled: bool) -> Iterator[bench.Case]:
    """Whole frames, the network, then each part on what the parts before it made."""
    kinds = ("eager", "compile") if compiled else ("eager",)
    dtype = world.amp or torch.float32
    trackers = {kind: DualTFRTracker(model, replace(recipe, speed=kind), dtype) for kind in kinds}
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    for tracker in trackers.values():
        tracker.init(frame, BOX)

    def whole_frame(tracker: DualTFRTracker) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            tracker.box = BOX  # an untrained network would walk away
            return torch.tensor(tracker.track(frame)[0])
        return step

    yield bench.Case("whole frame", {kind: whole_frame(tracker) for kind, tracker in trackers.items()}, tolerance=1e-3)

    eager = trackers["eager"]
    model, z = eager.model, eager.z
    _, template = eager.crop(frame, BOX, recipe.template_factor, recipe.template_px)
    _, search = eager.crop(frame, BOX, recipe.search_factor, recipe.search_px)
    stages = {
        f"stage {number}, {len(stage.blocks)} {type(stage.blocks[0]).__name__}": stage
        for number, stage in enumerate(model.backbone.stages, 1)
    }
    parts = {
        "patch embedding": model.backbone.patch_embed, **stages,
        f"position and {len(model.cabs)} CABs": lambda x: model.fuse(z, model.position(x)), "head": model.head,
    }

    def part_by_part() -> Prediction:
        x = search
        for part in parts.values():
            x = part(x)
        return x

    yield bench.Case("network", {
        "template cached": lambda: model.predict(z, search), "template anew": lambda: model(template, search),
        "part by part": part_by_part,
    }, tolerance=1e-5 if dtype == torch.float32 else 2e-2)

    def crop() -> torch.Tensor:
        return eager.crop(frame, BOX, recipe.search_factor, recipe.search_px)[1]

    yield bench.Case("crop", {"eager": crop}, tolerance=0.0)
    x = search
    for name, part in parts.items():
        yield bench.Case(name, {"eager": part}, (x,), tolerance=0.0)
        x = part(x)
    logits, boxes = (y[0] for y in x)
    yield bench.Case(
        "best token", {"eager": lambda: torch.tensor(best_token(logits, boxes, eager.window, recipe.window).tolist())},
        tolerance=0.0,
    )


if __name__ == "__main__":
    run.main(main)
