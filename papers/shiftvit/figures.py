"""Pictures of a run: its curves, sample predictions, and what the shift does to a stage's receptive field; and of a
comparison: how its members learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from timm.layers import GroupNorm1
from torch import nn

from common import run
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


def draw_learning(path: Path, runs: Mapping[str, Sequence[Path]], steps_per_epoch: int) -> None:
    """Accuracy of each member over epochs and over the processor's seconds: mean over seeds, each seed fainter."""
    figure, axes = drawing.plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for number, (member, homes) in enumerate(runs.items()):
        curves = np.stack([learning(run.read_log(home)) for home in homes])
        steps, seconds, top1 = curves.mean(0)
        for axis, its in zip(axes, (curves[:, 0] / steps_per_epoch, curves[:, 1])):
            axis.plot(its.T, curves[:, 2].T, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes[0].plot(steps / steps_per_epoch, top1, color=f"C{number}", label=member)
        axes[1].plot(seconds, top1, color=f"C{number}")
    axes[0].set(xlabel="epoch", ylabel="top-1 on the validation images, %")
    axes[1].set(xlabel="seconds of one core, training alone")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    drawing.save(figure, path)


def learning(rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    """(3, evaluations): step, processor seconds of training until then, and top-1 in percent, of a run's log."""
    scored = [row for row in rows if "val/top1" in row]
    timed = [row for row in rows if "cpu_s" in row]
    steps = np.array([row["step"] for row in scored])
    seconds = np.interp(steps, [row["step"] for row in timed], [row["cpu_s"] for row in timed])
    return np.stack([steps, seconds, [row["val/top1"] for row in scored]])


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
