"""Pictures of a run: its curves, what gradient steps do to the loss and to the response map, and tracked frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import run
from common.data import crops, pairs, tracking
from common.metrics import trackers
from common.run import drawing
from papers.maml_tracker.data import corners, crop_around, cut, support_crops
from papers.maml_tracker.evaluate import build, validate
from papers.maml_tracker.maml import MAML
from papers.maml_tracker.model import Crops, Detector
from papers.maml_tracker.recipes import Recipe


def draw(folder: Path, maml: MAML, data: pairs.Data, recipe: Recipe, world: run.World) -> None:
    world = replace(world, rank=0, size=1)  # the other processes do not draw
    k = recipe.inner_steps
    drawing.curves(folder, [["loss"], ["val/after_0", "val/after_1", f"val/after_{k}"], ["rate"]])
    if not data.test:
        return
    stages = {"meta-trained": maml}
    if (folder / "detection.safetensors").exists():
        before = build(recipe).to(world.device)
        before.load_state_dict(run.load_weights(folder / "detection.safetensors"))
        stages = {f"detection alone, rate {recipe.rate}": before, **stages}
    draw_steps(folder / "gradient_steps.png", stages, data, recipe, world)
    draw_responses(folder / "responses.png", stages, data.test[:6], recipe, world)
    trackers.draw_tracks(folder / "tracks.png", data.test[:8], folder / "tracking")


def draw_steps(path: Path, stages: dict[str, MAML], data: pairs.Data, recipe: Recipe, world: run.World) -> None:
    """Mean loss on target images after each gradient step on the support set, with each stage's own rates."""
    figure, axis = drawing.plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for label, maml in stages.items():
        axis.plot(validate(maml, data, recipe, world, steps=2 * recipe.inner_steps), marker=".", label=label)
    axis.axvline(recipe.inner_steps, color="gray", linewidth=0.8, linestyle=":")
    axis.set(xlabel="gradient steps on the support set (dotted: k in training)", ylabel="loss on the target image")
    axis.set_ylim(0, None)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    drawing.save(figure, path)


@torch.no_grad()
def draw_responses(
    path: Path, stages: dict[str, MAML], sequences: list[tracking.Sequence], recipe: Recipe, world: run.World
) -> None:
    """For the middle frame of each sequence: the crop with the true box, then the scores of all cells before and after
    the first frame's gradient steps, of each stage. The crop is moved aside, so that the middle is not the answer."""
    rows = 1 + 2 * len(stages)
    figure, axes = drawing.plt.subplots(
        rows, len(sequences), figsize=(1.8 * len(sequences), 1.9 * rows), squeeze=False, layout="constrained"
    )
    for column, sequence in zip(axes.T, sequences):
        first, frame = (tracking.read_frame(sequence.frames[i]) for i in (0, sequence.middle()))
        box, truth = sequence.boxes[0], sequence.boxes[sequence.middle()]
        around = support_crops(box, recipe, np.random.default_rng(0))
        support = _crops([cut(first, crop) for crop in around], [corners(crop, box) for crop in around], world)
        crop = crop_around(truth, recipe, shift_px=(0.6 * recipe.shift_px, -0.4 * recipe.shift_px))
        pixels = cut(frame, crop)
        column[0].imshow(pixels)
        drawing.outline(column[0], crop.to_crop(truth), trackers.COLORS["truth"])
        column[0].set_title(sequence.name.removeprefix("GOT-10k_"), fontsize=8)
        cells = iter(column[1:])
        for label, maml in stages.items():
            maml.eval()
            x = maml.prepare(maml.detector, _crops([pixels], [corners(crop, truth)], world)).x
            adapted = maml.adapt(maml.prepare(maml.detector, support), recipe.first_steps)
            for when, theta in (("before", maml.theta_0()), (f"after {recipe.first_steps} steps", adapted)):
                _, scores = maml.call(theta, Detector.predict, x)
                axis = next(cells)
                side = recipe.crop_px
                axis.imshow(scores.view(maml.detector.grid, -1).cpu(), vmin=0, vmax=1, extent=(0, side, side, 0))
                drawing.outline(axis, crop.to_crop(truth), trackers.COLORS["truth"])
                axis.set_title(f"{label},\n{when}: up to {scores.max():.2f}", fontsize=6)
        for axis in column:
            axis.set(xticks=[], yticks=[])
    drawing.save(figure, path)


def _crops(pixels: list[np.ndarray], boxes: list[np.ndarray], world: run.World) -> Crops:
    ones = torch.ones(len(pixels), device=world.device)
    images = torch.stack([crops.to_tensor(picture) for picture in pixels]).to(world.device)
    return Crops(images, torch.from_numpy(np.stack(boxes)).float().to(world.device), ones.bool(), ones)
