"""What meta-training and tracking cost at a recipe's size: ``make bench PAPER=maml_tracker [ARGS=fcos]``.

Memory and time of one video's outer step, with and without checkpointing (a batch is one video after another, so it
needs no more), and the parts of tracking at batch 1; subject "compiled" is tracking with torch.compile beside it.
Inputs are noise: neither time nor memory depends on what a crop shows. Peak memory stands in the record.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import run
from common.run import bench
from papers.maml_tracker.data import corners, crop_around, cut, support_crops, zooms
from papers.maml_tracker.evaluate import build
from papers.maml_tracker.maml import multi_step_weights
from papers.maml_tracker.model import Crops
from papers.maml_tracker.recipes import RECIPES, Recipe
from papers.maml_tracker.tracker import MAMLTracker

FRAME, BOX = (360, 480), (200.0, 150.0, 60.0, 45.0)  # height and width; x, y, w, h
CHECKPOINTED, WHOLE = {"checkpointing": True}, {"checkpointing": False}
# Sums in another order, and kernels that compute in bf16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most memory that tensors made by `function` take at one time."""
    if torch.device(device).type == "cuda":
        return bench.peak_bytes(function, device)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        function()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def outer_steps(recipe: Recipe, world: run.World, tolerance: float) -> Iterator[bench.Case]:
    """One video's outer step, forward and backward, for each kind of inner loop: losses, and gradients of theta_0."""
    middle, half = recipe.crop_px / 2, recipe.anchor_px / 2
    box = torch.tensor([middle - half, middle - half, middle + half, middle + half])

    def noise(count: int) -> Crops:
        images = torch.randint(256, (count, 3, recipe.crop_px, recipe.crop_px)).to(torch.uint8)
        parts = images, box.expand(count, 4), torch.ones(count).bool(), torch.ones(count)
        return Crops(*(part.to(world.device) for part in parts))

    support, target = noise(len(zooms(recipe))), noise(1)
    gamma = multi_step_weights(recipe.multi_step, recipe.inner_steps).to(world.device)
    weights = build(recipe).state_dict()

    def step(**changes: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
        maml = build(replace(recipe, **changes)).to(world.device).train()
        maml.load_state_dict(weights)
        maml.detector.backbone.requires_grad_(False)  # as in meta-training

        def once() -> tuple[torch.Tensor, ...]:
            maml.zero_grad(set_to_none=True)
            with world.autocast():
                losses = maml(support, target, gamma)
            (losses * gamma.to(losses)).sum().backward()
            return losses, *(p.grad for p in maml.theta_0().values())

        return once

    for name, ways in {
        "second order": {"checkpointed": step(**CHECKPOINTED), "whole graph": step(**WHOLE)},
        "first order": {"whole graph": step(second_order=False, **WHOLE)},
    }.items():
        peaks = {way: peak_bytes(once, world.device) for way, once in ways.items()}
        about = {"peak_bytes": peaks}
        yield bench.Case(f"outer step of one video, {name}", ways, tolerance=tolerance, about=about)


def tracking(recipe: Recipe, world: run.World, tolerance: float, speeds: tuple[str, ...]) -> Iterator[bench.Case]:
    """The parts of tracking, on a full support set; those that can be compiled, in each of `speeds`."""
    maml = build(recipe).to(world.device).eval()
    trackers = {speed: MAMLTracker(maml, replace(recipe, speed=speed), world) for speed in speeds}
    frame = np.random.default_rng(0).integers(0, 256, (*FRAME, 3), dtype=np.uint8)
    crop, first = crop_around(BOX, recipe), next(iter(trackers.values()))
    for tracker in trackers.values():
        tracker.init(frame, BOX)
        for _ in range(recipe.buffer):
            tracker.support.put(tracker.prepare(frame, [crop], [corners(crop, BOX)]))
    theta, seen = maml.theta_0(), first.prepare(frame, [crop], [corners(crop, BOX)])
    copies = support_crops(BOX, recipe, np.random.default_rng(0))
    few = first.prepare(frame, copies, [corners(each, BOX) for each in copies])
    last = torch.tensor([30.0, 30.0], device=world.device)

    def adapted(tracker: MAMLTracker, support: Crops, steps: int) -> tuple[torch.Tensor, ...]:
        tracker.learn(support, steps, theta)
        return tuple(tracker.theta.values())

    def case(name: str, function: Callable[..., object], *args: object) -> bench.Case:
        ways = {speed: partial(function, tracker, *args) for speed, tracker in trackers.items()}
        return bench.Case(f"tracking, {name}", ways, tolerance=tolerance)

    yield bench.Case("tracking, crop", {"eager": lambda: torch.from_numpy(cut(frame, crop))})
    yield bench.Case("tracking, crop and frozen layers", {
        "eager": lambda: first.prepare(frame, [crop], [corners(crop, BOX)]).x
    }, tolerance=tolerance)
    yield case("online layers and choice of the box", lambda tracker: tracker.detect(theta, seen.x, last))
    yield case("first frame's gradient steps", adapted, few, recipe.first_steps)
    yield case("update on a full support set", adapted, first.support.slots, recipe.update_steps)


def everything(recipe: Recipe, device: str, dtype: torch.dtype, _batch: int) -> Iterator[bench.Case]:
    world = run.World(0, 1, torch.device(device), None if dtype == torch.float32 else dtype)
    yield from outer_steps(recipe, world, TOLERANCE[dtype])
    yield from tracking(recipe, world, TOLERANCE[dtype], ("eager",))


def compiled(device: str, dtype: torch.dtype, _batch: int) -> Iterator[bench.Case]:
    world = run.World(0, 1, torch.device(device), None if dtype == torch.float32 else dtype)
    yield from tracking(RECIPES["retina"], world, TOLERANCE[dtype], ("eager", "compile"))


SUBJECTS = {name: partial(everything, RECIPES[name]) for name in ("retina", "fcos", "tiny")} | {"compiled": compiled}

if __name__ == "__main__":
    folder = Path(__file__).parent / "results" / "bench"
    run.main(lambda: bench.main("papers.maml_tracker.bench", SUBJECTS, folder, dict.fromkeys(SUBJECTS, 1)))
