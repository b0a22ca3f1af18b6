"""Weights a branch can start from: ImageNet's in Swin-T's names, the classifier of the recipe `pretrain`, a tracker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import timm
import torch

from common import run
from common.run import UserError
from papers.dualtfr.model import DualTFRBackbone

TABLE = "relative_position_bias_table"


def convert(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Swin's tensors under our names, in timm's form or in that of Swin's authors; other names pass unchanged.

    timm's stages begin with the patch merging, the authors' end with it.
    """
    ends_with_merging = "layers.0.downsample.reduction.weight" in state_dict

    def rename(name: str) -> str:
        if ends_with_merging:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        return re.sub(r"^layers\.", "stages.", name)

    derived = ("relative_position_index", "attn_mask")
    return {rename(name): tensor for name, tensor in state_dict.items() if not name.endswith(derived)}


def widen(table: torch.Tensor, entries: int) -> torch.Tensor:
    """A table of offsets, (n * n, heads), for another largest offset: (entries, heads).

    What both know stays what it was, offset by offset; a farther offset takes the nearest one's value.
    """
    old, new = round(len(table) ** 0.5), round(entries**0.5)
    near = (torch.arange(new) - new // 2).clamp(-(old // 2), old // 2) + old // 2
    return table.view(old, old, -1)[near[:, None], near].reshape(entries, -1)


def load_backbone(backbone: DualTFRBackbone, state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Starts a branch from trained weights; returns the names that stay as they were initialised.

    What the branch has not is left behind: Swin's fourth stage, the classes, a tracker's fusion and head. Tables of
    offsets are widened (`widen`) where a GAB takes the place of a Swin block. `UserError` if a tensor has another
    shape, or none fits at all.
    """
    weights = {name.removeprefix("backbone."): tensor for name, tensor in convert(state_dict).items()}
    own = backbone.state_dict()
    found = {name: tensor for name, tensor in weights.items() if name in own and not name.startswith("head.")}
    if "norm.weight" in found and found["norm.weight"].shape != own["norm.weight"].shape:  # of Swin's fourth stage
        found = {name: tensor for name, tensor in found.items() if not name.startswith("norm.")}
    for name, tensor in found.items():
        if name.endswith(TABLE) and tensor.shape[1:] == own[name].shape[1:]:
            found[name] = widen(tensor, len(own[name]))
    wrong = [
        f"{name} {list(tensor.shape)}, expected {list(own[name].shape)}" for name, tensor in found.items()
        if tensor.shape != own[name].shape
    ]
    if wrong or not found:
        reason = "; ".join(wrong[:5]) if wrong else f"it has names such as {', '.join(list(state_dict)[:3])}"
        raise UserError(f"these weights do not fit the branch: {reason}")
    backbone.load_state_dict(found, strict=False)
    return [name for name in own if name not in found]


def init_weights(source: str) -> dict[str, torch.Tensor]:
    """A state dict from a run folder (its newest weights), a file, or a timm model, whose weights timm fetches."""
    path = Path(source)
    if path.is_dir():
        return run.load_run(path, dict)[1]["model"]
    if path.suffix:
        return run.load_weights(path)
    if not timm.is_model(source):
        raise UserError(f"--init {source}: expected a run folder, a file of weights or the name of a timm model")
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # whatever a hub client raises without a network
        raise UserError(
            f"timm could not fetch the weights of {source} ({type(error).__name__}); give a file or a run folder with "
            "--init, or start at random with --init None"
        ) from None
