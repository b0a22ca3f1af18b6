"""Pictures of a run: its curves, sample predictions, and the mixing matrices before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.data import images
from common.run import drawing
from papers.smlpnet.model import SMLPNet, SparseMLP
from papers.smlpnet.recipes import Recipe

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


def draw(folder: Path, model: torch.nn.Module, initial: Matrices, val: images.Images, recipe: Recipe) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
    drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)
    if initial:
        draw_mixing(folder / "mixing_matrices.png", initial, mixing_matrices(model))


def mixing_matrices(model: torch.nn.Module) -> Matrices:
    """Copies of the row and the column matrix of the first and the last block of each stage, by place.

    Empty for a model without matrices that all rows and columns share.
    """
    found = {}
    for s, stage in enumerate(model.stages if isinstance(model, SMLPNet) else [], 1):
        for b in sorted({0, len(stage.blocks) - 1}):
            mixer = stage.blocks[b].smlp
            if isinstance(mixer, SparseMLP):
                pair = (m.weight.detach().float().cpu().clone() for m in (mixer.mix_row, mixer.mix_col))
                found[f"stage {s}, block {b + 1}"] = tuple(pair)
    return found


def draw_mixing(path: Path, before: Matrices, after: Matrices) -> None:
    """Row j of a matrix holds what output position j takes from each input position; blue is negative, red positive.

    Initial and trained matrix share their colors. What training has added is often fainter: it has its own.
    """
    figure, axes = drawing.plt.subplots(
        6, len(after), figsize=(1.5 * len(after) + 0.5, 10.5), squeeze=False, layout="constrained"
    )
    for column, (place, trained) in zip(axes.T, after.items()):
        column[0].set_title(place, fontsize=9)
        for first, start, end in zip((0, 3), before[place], trained):
            change, both = end - start, torch.cat([start, end])
            for axis, matrix, scale in zip(column[first : first + 3], (start, end, change), (both, both, change)):
                limit = scale.abs().max().item()
                axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(f"{len(matrix)} x {len(matrix)}, ±{limit:.2g}", fontsize=8)
    for i, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(("row matrix", "column matrix")[i // 3] + ("\ninitial", "\ntrained", "\nchange")[i % 3])
    drawing.save(figure, path)


def draw_sharing(path: Path, rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Accuracy on training and on test images, and parameters, of a comparison's metrics by mixing and by name."""
    figure, (left, right) = drawing.plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", width_ratios=(2, 1))
    for shift, key, label in ((-0.18, "train_top1", "training images"), (0.18, "top1", "test images")):
        values, spread = ([row[key].get(k, 0) for row in rows.values()] for k in ("value", "spread"))
        places = [i + shift for i in range(len(rows))]
        bars = left.bar(places, values, 0.34, yerr=spread, capsize=4, label=label)
        left.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    lowest = min(row["top1"]["value"] - row["top1"].get("spread", 0) for row in rows.values()) - 1e-3
    left.set(xticks=range(len(rows)), xticklabels=rows, ylabel="accuracy, %")
    bottom = max(0.0, lowest - (100 - lowest) * 0.5)
    left.set_ylim(bottom, 100 + (100 - lowest) * 0.25)
    left.set_yticks([tick for tick in left.get_yticks() if bottom <= tick <= 100])
    left.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    bars = right.bar(range(len(rows)), [row["params"]["value"] / 1e3 for row in rows.values()], 0.5, color="gray")
    right.bar_label(bars, fmt="%.0f k", fontsize=8)
    right.margins(y=0.1)
    right.set(xticks=range(len(rows)), xticklabels=rows, ylabel="thousand parameters")
    drawing.save(figure, path)
