"""Pictures of a run: its curves, sample predictions, and what each mixing sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter

from common.data import images
from common.run import drawing
from papers.spach.model import SPACH, MixingBlock, SpatialMLP
from papers.spach.recipes import Recipe

STYLES = {
    "conv": {"color": "tab:green", "fmt": "-o"},
    "attn": {"color": "tab:blue", "fmt": "-o"}, "attn_bare": {"color": "tab:blue", "fmt": ":^"},
    "mlp": {"color": "tab:red", "fmt": "-o"}, "mlp_bare": {"color": "tab:red", "fmt": ":^"},
    "mlp_shared": {"color": "tab:orange", "fmt": "--s"},
}


def draw(folder: Path, model: torch.nn.Module, val: images.Images, recipe: Recipe) -> None:
    drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
    drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)
    if isinstance(model, SPACH):
        draw_receptive_field(folder / "receptive_field.png", {"": model}, inputs(val, recipe))


def inputs(val: images.Images, recipe: Recipe, count: int = 16) -> torch.Tensor:
    """Evenly spread images, ready for the model."""
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    return torch.stack([transform(val[len(val) * i // count][0]) for i in range(count)])


def draw_battle(path: Path, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The paper's figure: test accuracy, and how far it falls behind training, against parameters.

    `rows` are a comparison's metrics by "<network>-<width>", and by name.
    """
    figure, axes = drawing.plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for axis, key, label in zip(axes, ("top1", "gap"), ("test accuracy, %", "training - test accuracy, points")):
        for network in dict.fromkeys(label.split("-")[0] for label in rows):
            points = [row for label, row in rows.items() if label.split("-")[0] == network]
            sizes, values = ([row[k]["value"] for row in points] for k in ("params", key))
            spread = [row[key].get("spread", 0) for row in points]
            axis.errorbar(sizes, values, spread, **STYLES[network], capsize=3, label=network)
        axis.set(xscale="log", xlabel="parameters", ylabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    drawing.save(figure, path)


def draw_receptive_field(path: Path, models: Mapping[str, SPACH], x: torch.Tensor) -> None:
    """What the token in the middle of the map sees, for each model and stage.

    First, how strongly each pixel of the image moves it at the end of the stage: gradient energy, averaged over the
    images, logarithmic from the strongest pixel down to a millionth; the norm in the downsampling layers lets all
    pixels have a faint influence. Second, what the spatial mixing of the stage's last block alone weighs each token
    with (see `weights`).
    """
    stages = max(len(model.stages) for model in models.values())
    rows, columns = (2, stages) if len(models) == 1 else (len(models), 2 * stages)
    figure, axes = drawing.plt.subplots(
        rows, columns, figsize=(2 * columns + 0.5, 2.25 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for line, (name, model) in zip(axes.reshape(len(models), 2 * stages), models.items()):
        line[0].set_ylabel(f"{name}\npixels that move\nthe middle token".strip(), fontsize=9)
        line[stages].set_ylabel("tokens that the\nlast mixing weighs", fontsize=9)
        for s, (energy, block, weight) in enumerate(receptive_field(model, x)):
            line[s].imshow(energy / energy.max(), cmap="magma", norm=LogNorm(1e-6, 1, clip=True))
            line[s].set_title(f"stage {s + 1}", fontsize=9)
            line[stages + s].imshow(weight, cmap="viridis", vmin=0, vmax=weight.max() or 1)
            line[stages + s].set_title(describe(block) + f", {' x '.join(map(str, weight.shape))}", fontsize=8)
    drawing.save(figure, path)


def describe(block: MixingBlock) -> str:
    if block.mixer is None:
        return "conv" if block.bypass else "no mixing"
    kind = "mlp" if isinstance(block.mixer, SpatialMLP) else "attn"
    return f"{kind}, |gamma| {block.gamma.abs().mean():.2g}"


def receptive_field(model: SPACH, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, MixingBlock, torch.Tensor]]:
    """For each stage: gradient energy of its middle token over the pixels (H, W); its last block; that block's
    `weights`."""
    x = x.to(next(model.parameters()).device).requires_grad_()
    maps = model.eval().stem(x)
    for stage in model.stages:
        maps = stage.downsample(maps)
        H, W = maps.shape[2:]
        before = stage.blocks[:-1](maps.permute(0, 2, 3, 1))
        maps = stage.blocks[-1](before).permute(0, 3, 1, 2)
        (gradient,) = torch.autograd.grad(maps[:, :, H // 2, W // 2].sum(), x, retain_graph=True)
        block = stage.blocks[-1]
        yield gradient.square().mean((0, 1)).cpu(), block, weights(block, before.detach().flatten(1, 2), H, W).cpu()


def weights(block: MixingBlock, tokens_BNC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(H, W): weight of every token in what a block's spatial mixing makes of the middle one, without the bypass.

    Convolution: its kernels' absolute values, averaged over the channels. Attention: the first head's attention,
    averaged over the images. MLP: the absolute values of its Jacobian's row, averaged over images and channels.
    """
    seen = torch.zeros(height, width, device=tokens_BNC.device)
    middle = height // 2 * width + width // 2
    if block.mixer is None and block.bypass is None:  # convolution without the bypass, which is the convolution
        return seen
    if block.mixer is None:
        kernel = block.bypass.weight.detach().abs().mean((0, 1))
        for i in range(3):
            for j in range(3):
                y, x = height // 2 + i - 1, width // 2 + j - 1
                if 0 <= y < height and 0 <= x < width:
                    seen[y, x] = kernel[i, j]
        return seen
    tokens = block.norm1(tokens_BNC).detach()
    if isinstance(block.mixer, SpatialMLP):
        tokens.requires_grad_()
        (row,) = torch.autograd.grad(block.mixer(tokens)[:, middle].sum(), tokens)  # channels do not mix: exact
        return row.abs().mean((0, 2)).view(height, width)
    shape = (*tokens.shape[:2], 3, block.mixer.num_heads, -1)
    query, key, _ = block.mixer.qkv(tokens).view(shape).permute(2, 0, 3, 1, 4).detach()
    attention = (query[:, 0, middle, None] @ key[:, 0].mT * block.mixer.scale).softmax(-1)
    return attention.mean((0, 1)).view(height, width)
