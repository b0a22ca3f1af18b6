"""Parameters that have the size of a map, made to fit a map of another size.

A module that holds such parameters says so by two attributes: `grid`, the (H, W) it was built for, and `AXES`, which
names for each of them what its axes run over: "H" rows, "W" columns, "HW" all positions, "N" hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.run.files import UserError

Grid = tuple[int, int]


def resized(weight: Tensor, axes: Sequence[str], old: Grid, new: Grid, hidden: int = 0) -> Tensor:
    """`weight` interpolated linearly along each of its axes, from the grid `old` to `new` and to `hidden` units.

    Bilinear, that is, for a matrix along the rows or along the columns of a map.
    """
    sizes = {"H": new[0], "W": new[1], "N": hidden}
    for k, axis in reversed([*enumerate(axes)]):
        if axis == "HW":
            sides = _along(_along(weight.unflatten(k, old), k, new[0]), k + 1, new[1])
            weight = sides.flatten(k, k + 1)
        else:
            weight = _along(weight, k, sizes[axis])
    return weight


def _along(x: Tensor, axis: int, size: int) -> Tensor:
    if x.shape[axis] == size:
        return x
    rows = x.movedim(axis, -1)
    wide = rows.to(torch.promote_types(x.dtype, torch.float32)).reshape(1, -1, x.shape[axis])
    return F.interpolate(wide, size, mode="linear").view(*rows.shape[:-1], size).movedim(-1, axis).to(x.dtype)


def rescaled(name: str, weight: Tensor, axes: Sequence[str], old: Grid, new: Grid, hidden: int = 0) -> Tensor:
    """`resized`, and of a matrix the entries scaled so that its rows, which are longer or shorter now, sum to what they
    did: a constant input keeps its output."""
    fit = resized(weight, axes, old, new, hidden)
    return fit * (weight.shape[-1] / fit.shape[-1]) if name.endswith("weight") else fit


def sized(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that hold parameters of the size of a map, by name; one that is shared by each name."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if hasattr(m, "AXES")}


def resize(module: nn.Module, grid: Grid) -> None:
    """Fits a module's parameters to another grid; what was frozen stays frozen."""
    hidden = _hidden(module, grid)
    for name, axes in module.AXES.items():
        path, _, leaf = name.rpartition(".")
        owner, old = module.get_submodule(path), module.get_parameter(name)
        new = rescaled(name, old.detach(), axes, module.grid, grid, hidden)
        setattr(owner, leaf, nn.Parameter(new.contiguous(), requires_grad=old.requires_grad))
        if isinstance(owner, nn.Linear) and leaf == "weight":
            owner.out_features, owner.in_features = new.shape
    module.grid = grid


def _hidden(module: nn.Module, grid: Grid) -> int:
    return module.hidden(grid) if hasattr(module, "hidden") else 0


def fitted(weights: Mapping[str, Tensor], model: nn.Module, *, interpolate: bool = False) -> dict[str, Tensor]:
    """Weights of a network for another image size: interpolated to that of `model`, or refused in one line.

    Weights of the same size, and those that do not fit for other reasons, pass unchanged.
    """
    weights, modules = dict(weights), sized(model)
    there = [(prefix, m) for prefix, m in modules.items() if f"{prefix}.{next(iter(m.AXES))}" in weights]
    if not there or _grid(weights, *there[0]) == there[0][1].grid:
        return weights
    if not interpolate:
        old, new = _grid(weights, *there[0]), there[0][1].grid
        raise UserError(
            f"the weights mix maps of {old[0]}x{old[1]} where the network, built for another image size, has "
            f"{new[0]}x{new[1]}; build it for theirs, or pass resize_mixers=True to have them interpolated"
        )
    for prefix, module in there:
        old, hidden = _grid(weights, prefix, module), _hidden(module, module.grid)
        for name, axes in module.AXES.items():
            if (key := f"{prefix}.{name}") in weights:
                weights[key] = rescaled(name, weights[key], axes, old, module.grid, hidden)
    return weights


def _grid(weights: Mapping[str, Tensor], prefix: str, module: nn.Module) -> Grid:
    """(H, W) of the map that a module's weights in a file are for. All positions are taken for those of a square."""
    sides = {}
    for name, axes in module.AXES.items():
        if (weight := weights.get(f"{prefix}.{name}")) is not None and weight.ndim == len(axes):
            sides |= dict(zip(axes, weight.shape))
    if "HW" in sides and sides["HW"] != math.prod(module.grid):
        side = math.isqrt(sides["HW"])
        if side**2 != sides["HW"]:
            raise UserError(f"{prefix} mixes {sides['HW']} positions: not those of a square map, so they stay unknown")
        return side, side
    return sides.get("H", module.grid[0]), sides.get("W", module.grid[1])
