"""The authors' checkpoints -> this model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError

# Theirs -> ours, after "token_mix.{j}" and "channel_mix.{j}" have become a block. Their proj_h mixes along the width:
# it is the row mixer. (Exchanging the two goes unnoticed by shapes alone.)
NAMES = {
    "token.0.conv_merge.BN.": "local.norm.",
    "token.0.conv_merge.Conv.": "local.conv.",
    "token.1.BN.": "smlp.norm.",
    "token.1.proj_h.": "smlp.mix_row.",
    "token.1.proh_w.": "smlp.mix_col.",
    "token.1.fuse.": "smlp.fuse.",
    "channel.1.": "norm.",
    "channel.2.net.0.": "mlp.fc1.",
    "channel.2.net.3.": "mlp.fc2.",
}
# The authors' keywords -> ours, where they differ.
KEYWORDS = {"dim": "embed_dim", "image_size": "img_size", "dp_rate": "drop_path_rate"}


def rename(name: str, model: torch.nn.Module) -> str:
    """Our name of the authors' tensor; a name that is not theirs is returned unchanged."""
    blocks = [f"stages.{s}.blocks.{b}." for s, stage in enumerate(model.stages) for b in range(len(stage.blocks))]
    if found := re.match(r"(token|channel)_mix\.(\d+)\.", name):  # they count blocks over the whole network
        kind, block = found[1], int(found[2])
        inner = f"{kind}.{name[found.end():]}"
        for theirs, ours in NAMES.items():
            if inner.startswith(theirs) and block < len(blocks):
                return blocks[block] + ours + inner.removeprefix(theirs)
    name = re.sub(r"^to_patch_embedding\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^to_patch_embedding\.(\d+)\.0\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^batch_norm\.", "norm.", name)
    return re.sub(r"^mlp_head\.0\.", "head.fc.", name)


def convert(state_dict: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The authors' tensors under the names of `model`, their S x S x 1 x 1 mixing kernels as matrices."""
    weights = {rename(name, model): tensor for name, tensor in state_dict.items()}
    for name, tensor in weights.items():
        if name.endswith(("mix_row.weight", "mix_col.weight")) and tensor.shape[2:] == (1, 1):
            weights[name] = tensor.flatten(1)
    return weights


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (dim, depths, alpha, patch_size, image_size, in_chans, num_classes, dp_rate). Unexpected, missing or misshaped
    tensors are one error that lists them all.
    """
    from .model import VARIANTS

    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    model = timm.create_model(variant, **{KEYWORDS.get(key, key): value for key, value in config.items()})
    model.load_state_dict(convert(state_dict, model), strict=True)
    return model.eval()
