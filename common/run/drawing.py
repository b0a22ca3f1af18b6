"""Pictures that several papers draw: curves of a run's log, images with captions, a classifier's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from common.run.log import read_log

plt.switch_backend("Agg")  # files, never windows
plt.rcParams["text.parse_math"] = False  # a name with two dollar signs is a name


def curves(folder: Path, panels: Sequence[Sequence[str]]) -> None:
    """Writes ``curves.png``: one panel for each group of keys of the run's log, against the step."""
    rows = read_log(folder)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3), squeeze=False, layout="constrained")
    for axis, keys in zip(axes[0], panels):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points) if points else ((), ()), label=key, marker="." if len(points) < 40 else "")
        axis.set_xlabel("step")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    save(figure, folder / "curves.png")


def gallery(
    path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str], colors: Sequence[str], columns: int = 8
) -> None:
    """Writes a grid of pictures (H, W, 3), 0 to 255, each under its caption."""
    rows = -(-len(pictures) // columns)
    size = (1.5 * columns, 1.75 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption, color in zip(axes.flat, pictures, captions, colors):
        axis.imshow(picture)
        axis.set_title(caption, fontsize=8, color=color)
    save(figure, path)


def predictions(
    path: Path, model: torch.nn.Module, samples: Sequence[tuple[Image.Image, int]], classes: Sequence[str],
    transform: Callable[[Image.Image], torch.Tensor],
) -> None:
    """Writes pictures, given with their class indices, under the class that a classifier gives them, wrong ones in red
    with the right class."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model.eval()(torch.stack([transform(image) for image, _ in samples]).to(device))
    probabilities, guesses = (x.tolist() for x in logits.float().softmax(1).max(1))
    right = [guess == label for guess, (_, label) in zip(guesses, samples)]
    captions = [
        f"{classes[guess]} {probability:.0%}" + ("" if ok else f" ({classes[label]})")
        for guess, probability, ok, (_, label) in zip(guesses, probabilities, right, samples)
    ]
    gallery(path, [np.asarray(x) for x, _ in samples], captions, ["green" if ok else "red" for ok in right])


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 to count - 1, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def answer(path: Path, picture: Image.Image, probabilities: Mapping[str, float]) -> None:
    """Writes a picture beside the probabilities of its most likely classes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    left.imshow(np.asarray(picture))
    left.axis("off")
    right.barh(list(probabilities)[::-1], list(probabilities.values())[::-1])
    right.set_xlim(0, 1)
    save(figure, path)


def outline(axis, box: Sequence[float], color: str) -> None:
    """Draws a box x, y, w, h on a picture shown in `axis`; one that is no number is left out."""
    if np.isfinite(box).all():
        axis.add_patch(plt.Rectangle(box[:2], *box[2:], fill=False, edgecolor=color, linewidth=1.2))


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
