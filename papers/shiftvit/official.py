"""The authors' checkpoints -> this model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError

# Theirs -> ours. Their patch merging ends a stage, ours begins the next.
NAMES = [
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm2\.", r"stages.\1.blocks.\2.norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
# Values of the authors' configuration -> timm's names.
LAYERS = {"GN1": "groupnorm1", "BN": "batchnorm2d", "GELU": "gelu", "RELU": "relu"}


def convert(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the authors' tensors; names that are not theirs pass unchanged."""
    weights = {}
    for name, tensor in state_dict.items():
        for pattern, ours in NAMES:
            name, found = re.subn(pattern, ours, name)
            if found:
                break
        weights[name] = tensor
    return weights


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (embed_dim, depths, mlp_ratio, n_div, patch_size, patch_norm, in_chans, num_classes, norm_layer "GN1" or "BN",
    act_layer "GELU" or "RELU", drop_path_rate). Unexpected, missing or misshaped tensors are one error that lists
    them all.
    """
    from .model import VARIANTS

    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    for key in ("norm_layer", "act_layer"):
        if key in config:
            config[key] = LAYERS.get(config[key], config[key])
    model = timm.create_model(variant, **config)
    model.load_state_dict(convert(state_dict), strict=True)
    return model.eval()
