"""Pictures of a run: its curves, tracked frames, and what the search tokens say and attend to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import run
from common.data import crops, images, pairs, tracking
from common.metrics import trackers
from common.run import drawing
from papers.dualtfr.model import DualTFR, Prediction
from papers.dualtfr.recipes import Pretrain, Recipe
from papers.dualtfr.tracker import DualTFRTracker


def draw(folder: Path, model: DualTFR, data: pairs.Data, recipe: Recipe, world: run.World) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["ce", "val/ce"], ["iou", "val/iou"], ["lr"]])
    if data.test:
        trackers.draw_tracks(folder / "tracks.png", data.test[:8], folder / "tracking")
        matches(folder / "matches.png", model.eval(), data.test[:6], recipe, world)


def draw_classifier(folder: Path, model: torch.nn.Module, val: images.Images, recipe: Pretrain) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
    samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)


@torch.inference_mode()
def matches(
    path: Path, model: DualTFR, sequences: list[tracking.Sequence], recipe: Recipe, world: run.World
) -> None:
    """For the middle frame of each sequence: template; search crop with the box of the most credible token; the tokens'
    probabilities; and what that token attends to in the template in the first and the last CAB.

    The crop is taken beside the target, as far as training did, so that the middle is not the answer.
    """
    tracker = DualTFRTracker(model, recipe)
    figure, axes = drawing.plt.subplots(
        5, len(sequences), figsize=(1.8 * len(sequences), 9), squeeze=False, layout="constrained"
    )
    for column, sequence in zip(axes.T, sequences):
        number = sequence.middle()
        first, frame = (tracking.read_frame(sequence.frames[i]) for i in (0, number))
        box = sequence.boxes[number]
        aside = 0.35 * recipe.center_jitter * np.array([box[2], -box[3], 0, 0])
        template, z = tracker.crop(first, sequence.boxes[0], recipe.template_factor, recipe.template_px)
        search, x = tracker.crop(frame, box + aside, recipe.search_factor, recipe.search_px)
        prediction, seen = attention_maps(model, z, x)
        probabilities = prediction.logits[0].softmax(1)[:, 0].cpu()
        best, grid = int(probabilities.argmax()), round(len(probabilities) ** 0.5)
        cx, cy, w, h = (prediction.boxes[0, best].cpu() * recipe.search_px).tolist()
        column[0].imshow(crops.cut(first, template))
        column[1].imshow(crops.cut(frame, search))
        drawing.outline(column[1], search.to_crop(box), trackers.COLORS["truth"])
        drawing.outline(column[1], (cx - w / 2, cy - h / 2, w, h), trackers.COLORS["tracker"])
        column[2].imshow(probabilities.view(grid, grid), vmin=0, vmax=1)
        column[2].set_title(f"probabilities, up to {probabilities[best]:.2f}", fontsize=7)
        for axis, name, attention in zip(column[3:], ("first", "last"), (seen[0], seen[-1]) if seen else ()):
            axis.imshow(attention[best].cpu())
            axis.set_title(f"{name} CAB", fontsize=7)
        for axis in column:
            axis.axis("off")
    drawing.save(figure, path)


def attention_maps(model: DualTFR, z: torch.Tensor, x: torch.Tensor) -> tuple[Prediction, list[torch.Tensor]]:
    """The network's answer to one pair, and for each CAB how much every search token attends to each template token,
    averaged over the heads: (search tokens, H, W)."""
    seen = []

    def record(attention, inputs, _output):
        own, other = inputs
        if own.shape[1] < other.shape[1]:  # the template attends to the search image
            return
        q, k = (
            linear.view(1, -1, attention.num_heads, own.shape[-1] // attention.num_heads).transpose(1, 2)
            for linear in (attention.q(own), F.linear(other, *key_half(attention)))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]
        seen.append(weights.view(-1, *other.shape[1:3]))

    hooks = [cab.attn.register_forward_hook(record) for cab in model.cabs]
    prediction = model(z, x)
    for hook in hooks:
        hook.remove()
    return prediction, seen


def key_half(attention) -> tuple[torch.Tensor, torch.Tensor]:
    dim = attention.q.out_features
    return attention.kv.weight[:dim], attention.kv.bias[:dim]
