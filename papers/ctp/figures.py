"""Pictures of a run: its curves, games with predicted boxes, and what a recogniser says of test videos."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from common.data.video import Videos, write_video
from common.run import drawing
from papers.ctp import data, evaluate
from papers.ctp.model import decode, iou
from papers.ctp.recipes import Recipe

COLORS = [(255, 80, 80), (80, 220, 80), (90, 150, 255), (250, 200, 60), (230, 100, 230)]


def draw(folder: Path, model: torch.nn.Module, val: Videos, recipe: Recipe) -> None:
    if recipe.method == "ctp":
        drawing.curves(folder, [["loss", "centre", "size"], ["val/iou", "val/iou_hidden", "val/iou_still"], ["lr"]])
        clips = data.training_clips(val, recipe, seed=1)
        samples = [clips[i][0] for i in drawing.evenly_spaced(len(val), 4)]
        rows = [track(model, sample, recipe) for sample in samples]
        frames = [np.concatenate(time[:3], 1) for time in zip(*rows)]
        write_video(folder / "tracks.gif", frames, fps=4)
        write_video(folder / "tracks.mp4", frames, fps=4)
        strips = [np.concatenate(row[:: max(1, len(row) // 4)], 1) for row in rows]
        Image.fromarray(np.concatenate(strips)).save(folder / "tracks.png")
    else:
        drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
    if recipe.method == "recognize":
        answers(folder / "answers.png", model, val, recipe)


def picture(clip_3THW: torch.Tensor) -> np.ndarray:
    """A normalised clip -> frames (T, H, W, 3), uint8."""
    pixels = clip_3THW.permute(1, 2, 3, 0).cpu().numpy() * data.STD + data.MEAN
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def track(model: torch.nn.Module, sample: dict[str, torch.Tensor], recipe: Recipe) -> list[np.ndarray]:
    """Enlarged frames of a game: where each patch is (thin), where the network says it is (thick, with its path).

    A patch that is hidden in a frame has no thin box there.
    """
    device = next(model.parameters()).device
    paths, query = sample["trajectories"], sample["trajectories"][:, 0]
    with torch.inference_mode():
        predictions = model.eval()(sample["clip"][None].to(device), query[None].to(device))[0].float().cpu()
    predicted, visible = decode(predictions, query, evaluate.targets(recipe)), sample["visible"]
    overlap = iou(predicted, paths).mean(0)
    zoom = max(2, 224 // sample["clip"].shape[-1])
    drawn = []
    for t, frame in enumerate(picture(sample["clip"])):
        H, W = frame.shape[:2]
        canvas = cv2.resize(frame, (W * zoom, H * zoom), interpolation=cv2.INTER_CUBIC)
        for p, color in zip(range(len(paths)), COLORS * len(paths)):
            truth, guess = (np.rint(boxes[p] * zoom).int().tolist() for boxes in (paths[:, t], predicted[:, t]))
            if visible[p, t]:
                cv2.rectangle(canvas, truth[:2], truth[2:], (255, 255, 255), 1)
            cv2.rectangle(canvas, guess[:2], guess[2:], color, 2)
            centers = ((predicted[p, : t + 1, :2] + predicted[p, : t + 1, 2:]) / 2 * zoom).round().int()
            cv2.polylines(canvas, [centers.numpy().reshape(-1, 1, 2)], False, color, 1)
        cv2.putText(canvas, f"{t}  IoU {overlap[t]:.2f}", (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 0), 1)
        drawn.append(canvas)
    return drawn


def answers(path: Path, model: torch.nn.Module, val: Videos, recipe: Recipe, count: int = 24) -> None:
    """Middle frames of test videos with the class a recogniser gives them, wrong ones in red with the right class."""
    device = next(model.parameters()).device
    clips = data.testing_clips(val, recipe)
    pictures, captions, colors = [], [], []
    for i in drawing.evenly_spaced(len(val), count):
        clip, label = clips[i]
        with torch.inference_mode():
            probabilities = model.eval()(clip[None].to(device)).float().mean(1).softmax(1)[0]
        guess = int(probabilities.argmax())
        pictures.append(picture(clip[len(clip) // 2])[recipe.frames // 2])
        wrong = "" if guess == label else f" ({val.classes[label]})"
        captions.append(f"{val.classes[guess]} {probabilities[guess]:.0%}{wrong}")
        colors.append("red" if wrong else "green")
    drawing.gallery(path, pictures, captions, colors, columns=6)
