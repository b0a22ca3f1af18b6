"""Pictures of a run: its curves, sample predictions, and what the shift does to a stage's receptive field."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from timm.layers import GroupNorm1
from torch import nn

from common.data import images
from common.run import drawing
from papers.shiftvit.model import ShiftStage, ShiftViT
from papers.shiftvit.recipes import Recipe


def draw(folder: Path, model: torch.nn.Module, val: images.Images, recipe: Recipe) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
    drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)
    if isinstance(model, ShiftViT):
        receptive_field(folder / "receptive_field.png")


def receptive_field(path: Path, depths: tuple[int, ...] = (1, 2, 4, 6), size: int = 15, dim: int = 96) -> None:
    """How strongly each position moves the centre after a number of blocks, with the shift and without it.

    A stage of freshly initialised blocks on noise, gradient energy on a logarithmic scale. Without the shift what
    is left is the faint, even influence of GroupNorm, whose statistics run over the whole map.
    """
    figure, axes = drawing.plt.subplots(2, len(depths), figsize=(2.3 * len(depths), 5), layout="constrained")
    for row, (n_div, label) in enumerate(((12, "with shift"), (dim + 1, "without shift"))):
        for axis, depth in zip(axes[row], depths):
            torch.manual_seed(0)
            stage = ShiftStage(
                dim, [0.0] * depth, merge=False, norm_layer=GroupNorm1, n_div=n_div, mlp_ratio=2.0, act_layer=nn.GELU
            )
            x = torch.randn(8, dim, size, size, requires_grad=True)
            stage(x)[:, :, size // 2, size // 2].sum().backward()
            energy = x.grad.square().mean((0, 1))
            axis.imshow(energy / energy.max(), norm=LogNorm(1e-8, 1), cmap="magma")
            axis.set_title(f"{label}, {depth} block{'s' * (depth > 1)}", fontsize=9)
            axis.axis("off")
    drawing.save(figure, path)
