"""Pictures of a run: its curves, and where in the key view the features predicted for a masked region are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from common.data import images
from common.run import drawing
from papers.maskco import data
from papers.maskco.model import MaskCo
from papers.maskco.recipes import Recipe

QUERY, KEY = "tab:orange", "tab:blue"


def draw(folder: Path, model: torch.nn.Module, val: images.Images, recipe: Recipe) -> None:
    if recipe.method == "linear":
        drawing.curves(folder, [["loss", "val/loss"], ["top1", "val/top1"], ["lr"]])
        transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
        samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
        drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)
        return
    panels = [["loss", "val/contrast_loss"], ["top1", "val/contrast_top1"], ["val/contrast_rank"], ["lr"]]
    drawing.curves(folder, panels)
    if recipe.method == "maskco":
        pictures = [val[i][0] for i in drawing.evenly_spaced(len(val), 5)]
        regions(folder / "regions.png", model, pictures, recipe)


def regions(path: Path, model: MaskCo, pictures: list[Image.Image], recipe: Recipe, seed: int = 0) -> None:
    """A row for each picture: its two crops; the query view as the network sees it; the key view with the region
    (solid) and same-image negatives (dotted); and there, how like the prediction each place is."""
    figure, axes = drawing.plt.subplots(
        len(pictures), 4, figsize=(9, 2.3 * len(pictures)), squeeze=False, layout="constrained"
    )
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    views = data.Views(recipe)
    titles = ("picture", "query view, masked", "key view", "where the prediction is found")
    for i, (row, picture) in enumerate(zip(axes, pictures)):
        query, key, _ = data.draw_pair(picture, recipe)
        in_query, in_key = data.draw_regions(query, key, recipe)
        others, present = data.draw_negatives(in_key[0], recipe)
        seen = [views.normalize(data.to_tensor(view.of(picture)))[None].to(device) for view in (query, key)]
        boxes, noise = torch.from_numpy(in_query)[None].to(seen[0]), torch.randn_like(seen[0])
        with torch.inference_mode():
            masked = model.masked(seen[0], boxes, noise)
            q = model.eval().queries(seen[0], boxes, noise)[0, 0]
        places, similarity = _search(model, q, seen[1], in_key[0])

        row[0].imshow(picture)
        for view, color in ((query, QUERY), (key, KEY)):
            _box(row[0], view.crop, color)
        for box in query.to_picture(in_query):
            _box(row[0], box, "red")
        row[1].imshow(_pixels(masked))
        row[2].imshow(_pixels(seen[1]))
        for box in in_key:
            _box(row[2], box, "red")
        for box in others[present]:
            _box(row[2], box, "white", ":")
        row[3].imshow(_pixels(seen[1]))
        x, y = places[0, :, 0], places[:, 0, 1]
        row[3].pcolormesh(x, y, similarity, shading="nearest", cmap="inferno", alpha=0.6)
        _box(row[3], in_key[0], "red")
        for axis, title in zip(row, titles):
            axis.set_title("" if i else title, fontsize=9)
            axis.axis("off")
    drawing.save(figure, path)


def _search(
    model: MaskCo, query_D: torch.Tensor, key: torch.Tensor, in_key: np.ndarray, steps: int = 15
) -> tuple[np.ndarray, np.ndarray]:
    """Centers (steps, steps, 2) of boxes of the positive's size all over the key view, and the cosine of their key to
    the query (steps, steps)."""
    size = in_key[2:] - in_key[:2]
    corners = np.stack(np.meshgrid(*(np.linspace(0, key.shape[-1] - side, steps) for side in size)), -1)
    boxes = torch.from_numpy(np.concatenate([corners, corners + size], -1)).reshape(1, -1, 4).to(key)
    with torch.inference_mode():
        similarity = model.eval().keys(key, boxes)[0] @ query_D
    return corners + size / 2, similarity.reshape(steps, steps).cpu().numpy()


def _box(axis, box: np.ndarray, color: str, style: str = "-") -> None:
    (x1, y1, x2, y2) = np.asarray(box) - 0.5  # imshow centres pixel i on i
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8, linestyle=style))


def _pixels(view: torch.Tensor) -> np.ndarray:
    """(1, 3, S, S), normalised -> (S, S, 3), 0 to 1."""
    return (view[0].permute(1, 2, 0).cpu().numpy() * IMAGENET_DEFAULT_STD + IMAGENET_DEFAULT_MEAN).clip(0, 1)
