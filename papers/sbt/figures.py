"""Pictures of a run: its curves, tracked frames, and where the search tokens see the target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from common import run
from common.data import crops, images, pairs, tracking
from common.metrics import trackers
from common.run import drawing
from papers.sbt.recipes import Pretrain, Recipe


def draw(folder: Path, model: torch.nn.Module, data: pairs.Data, recipe: Recipe, world: run.World) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["iou", "val/iou"], ["lr"]])
    if data.test:
        trackers.draw_tracks(folder / "tracks.png", data.test[:8], folder / "tracking")
        draw_scores(folder / "scores.png", model.eval(), data.test[:6], recipe, world)


def draw_classifier(folder: Path, model: torch.nn.Module, val: images.Images, recipe: Pretrain) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
    samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)


@torch.inference_mode()
def draw_scores(
    path: Path, model: torch.nn.Module, sequences: list[tracking.Sequence], recipe: Recipe, world: run.World
) -> None:
    """For the middle frame of each sequence: template, search crop with the best token's box, the tokens' scores.

    The crop is taken around the true box and moved aside, so that the middle is not the answer.
    """
    figure, axes = drawing.plt.subplots(3, len(sequences), figsize=(1.8 * len(sequences), 5.4), layout="constrained")
    for column, sequence in zip(np.reshape(axes, (3, -1)).T, sequences):
        number = sequence.middle()
        first, frame = (tracking.read_frame(sequence.frames[i]) for i in (0, number))
        box = sequence.boxes[number]
        aside = box + (0.8 * box[2], -0.6 * box[3], 0, 0)
        z = crops.cut(first, crops.around(sequence.boxes[0], recipe.template_factor, recipe.template_px))
        crop = crops.around(aside, recipe.search_factor, recipe.search_px)
        x = crops.cut(frame, crop)
        inputs = (crops.normalize(crops.to_tensor(pixels)).to(world.device)[None] for pixels in (z, x))
        logits, boxes = model(*inputs)
        score = logits[0].float().softmax(1)[:, 0].cpu()
        cx, cy, w, h = boxes[0, score.argmax()].float().cpu() * recipe.search_px
        for axis, picture in zip(column, (z, x, score.view(model.grid, model.grid))):
            axis.imshow(picture, **({"vmin": 0, "vmax": 1} if picture is not z and picture is not x else {}))
            axis.set(xticks=[], yticks=[])
        drawing.outline(column[1], crop.to_crop(box), trackers.COLORS["truth"])
        drawing.outline(column[1], (cx - w / 2, cy - h / 2, w, h), trackers.COLORS["tracker"])
        column[2].set_title(f"up to {score.max():.2f}", fontsize=8)
    drawing.save(figure, path)
