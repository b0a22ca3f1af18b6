"""The authors' checkpoints -> this model, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError
from papers.shiftvit.model import VARIANTS, ShiftViT, checkpoint_filter_fn

# Values of the authors' configuration -> timm's names.
LAYERS = {"GN1": "groupnorm1", "BN": "batchnorm2d", "GELU": "gelu", "RELU": "relu"}


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (embed_dim, depths, mlp_ratio, n_div, patch_size, patch_norm, in_chans, num_classes, norm_layer "GN1" or "BN",
    act_layer "GELU" or "RELU", drop_path_rate). Unexpected, missing or misshaped tensors are one error that lists
    them all.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    for key in ("norm_layer", "act_layer"):
        if key in config:
            config[key] = LAYERS.get(config[key], config[key])
    model = timm.create_model(variant, **config)
    model.load_state_dict(checkpoint_filter_fn(state_dict), strict=True)
    return model.eval()


# Ours -> theirs: `model.NAMES` the other way.
THEIRS = [
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"layers.\1.blocks.\2.norm2."),
    (r"^stages\.(\d+)\.blocks\.", r"layers.\1.blocks."),
    (r"^head\.fc\.", "head."),
]


def to_official(model: ShiftViT) -> dict[str, torch.Tensor]:
    """The network's tensors under the names that the authors' code loads."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for pattern, theirs in THEIRS:
            name, found = re.subn(pattern, theirs, name)
            if found:
                break
        weights[name] = tensor
    return weights
