"""What meta-training and tracking cost at a recipe's size: ``make bench PAPER=maml_tracker [ARGS="fcos"]``.

Memory and time of one video's outer step, with and without checkpointing (a batch is one video after another, so it
needs no more), and the parts of tracking at batch 1. Inputs are noise: neither time nor memory depends on what a crop
shows. Writes results/bench/maml_tracker_<recipe>_<hardware>.{json,md}.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from common import run
from papers.maml_tracker.data import corners, crop_around, cut, zooms
from papers.maml_tracker.maml import MAML, multi_step_weights
from papers.maml_tracker.model import Crops, build
from papers.maml_tracker.recipes import RECIPES, Recipe
from papers.maml_tracker.tracker import MAMLTracker

FRAME, BOX = (360, 480), (200.0, 150.0, 60.0, 45.0)  # height and width; x, y, w, h
INNER_LOOPS = {
    "second order, checkpointed": {"checkpointing": True},
    "second order, whole graph": {"checkpointing": False},
    "first order, whole graph": {"checkpointing": False, "second_order": False},
}
Rows = dict[str, tuple[float, str]]


@dataclass
class Arguments:
    recipe: Annotated[str, tyro.conf.Positional] = "retina"
    turns: int = 3
    """Each time is the fastest of this many; the parts take turns."""
    compile: bool = False
    """Track through torch.compile; on a GPU with CUDA graphs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory that tensors made by `function` take at one time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        function()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def fastest(parts: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Seconds of each part, all of which have run before: compilers and libraries are ready."""
    seconds = dict.fromkeys(parts, float("inf"))
    for _ in range(turns):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def outer_steps(recipe: Recipe, world: run.World) -> dict[str, Callable[[], None]]:
    """One video's outer step, forward and backward, for each kind of inner loop."""
    middle, half = recipe.crop_px / 2, recipe.anchor_px / 2
    box = torch.tensor([middle - half, middle - half, middle + half, middle + half])

    def noise(count: int) -> Crops:
        images = torch.randint(256, (count, 3, recipe.crop_px, recipe.crop_px)).to(torch.uint8)
        parts = images, box.expand(count, 4), torch.ones(count).bool(), torch.ones(count)
        return Crops(*(part.to(world.device) for part in parts))

    support, target = noise(len(zooms(recipe))), noise(1)
    gamma = multi_step_weights(recipe.multi_step, recipe.inner_steps)
    steps = {}
    for label, changes in INNER_LOOPS.items():
        maml = build(replace(recipe, **changes)).to(world.device).train()

        def step(maml: MAML = maml) -> None:
            maml.zero_grad(set_to_none=True)
            with world.autocast():
                losses = maml(support, target, gamma)
            (losses * gamma.to(losses)).sum().backward()

        steps[label] = step
    return steps


def tracking(recipe: Recipe, world: run.World) -> dict[str, Callable[[], Any]]:
    """The parts of tracking, on a full buffer."""
    tracker = MAMLTracker(build(recipe).to(world.device).eval(), recipe, world)
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    tracker.init(frame, BOX)
    crop, theta = crop_around(BOX, recipe), tracker.theta
    seen = tracker.prepare(frame, [crop], [corners(crop, BOX)])
    for _ in range(recipe.buffer):
        tracker.support.put(seen)
    zoomed = [crop_around(BOX, recipe, zoom) for zoom in zooms(recipe)]
    first = tracker.prepare(frame, zoomed, [corners(each, BOX) for each in zoomed])
    last = torch.tensor([30.0, 30.0], device=world.device)
    return {
        "crop": lambda: cut(frame, crop),
        "crop and offline layers": lambda: tracker.prepare(frame, [crop], [corners(crop, BOX)]),
        "online layers and choice of the box": lambda: tracker.detect(theta, seen.x, last).tolist(),
        "first frame's gradient steps": lambda: tracker.learn(first, recipe.first_steps, theta),
        "update on a full support set": lambda: tracker.learn(tracker.support.slots, recipe.update_steps, theta),
    }


def measure(recipe: Recipe, world: run.World, turns: int) -> Rows:
    steps = outer_steps(recipe, world)
    rows: Rows = {}
    for label, step in steps.items():
        rows[f"outer step of one video, {label}: peak"] = peak_bytes(step) / 2**30, "GiB"
    for label, seconds in fastest(steps, turns).items():
        rows[f"outer step of one video, {label}: time"] = seconds, "s"
    elements = sum(p.numel() for p in build(recipe).parameters())
    rows["weights, gradients, momentum, DDP's buckets, in float32"] = 4 * 4 * elements / 2**30, "GiB"
    parts = tracking(recipe, world)
    for part in parts.values():
        part()
    seconds = fastest(parts, turns)
    rows |= {f"tracking, {name}": (1000 * value, "ms") for name, value in seconds.items()}
    _, prepare, detect, _, update = seconds.values()
    rows["tracking without updates"] = 1 / (prepare + detect), "frames/s"
    regular = prepare + detect + update / recipe.update_every
    rows[f"tracking with an update every {recipe.update_every} frames"] = 1 / regular, "frames/s"
    return rows


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.maml_tracker.bench", description=__doc__)
    if args.recipe not in RECIPES:
        raise run.UserError(f"no recipe {args.recipe!r}; there are {', '.join(RECIPES)}")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    recipe = replace(RECIPES[args.recipe], speed="compile" if args.compile else "eager")
    rows = measure(recipe, world, args.turns)
    environment = run.environment()
    stamp = (
        f"recipe {args.recipe}, {world.amp or 'float32'}, tracking {recipe.speed}, {environment['hardware']}, "
        f"{environment['threads']} threads, torch {torch.__version__}, revision {environment['git']}"
    )
    table = "\n".join(f"| {name} | {value:.3g} {unit} |" for name, (value, unit) in rows.items())
    text = f"{stamp}\n\n| | |\n|---|---:|\n{table}\n"
    print(text)
    name = re.sub(r"[^a-z0-9]+", "_", f"maml_tracker {args.recipe} {environment['hardware']}".lower()).strip("_")
    path = run.ROOT / "papers" / "maml_tracker" / "results" / "bench" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    run.write_json(path, {"environment": environment, "stamp": stamp, "rows": rows})
    path.with_suffix(".md").write_text(f"`{environment['command']}`\n\n{text}")
    print(f"written: {path} and .md")


if __name__ == "__main__":
    run.main(main)
