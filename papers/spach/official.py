"""The authors' checkpoints -> this model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError
from papers.spach.model import VARIANTS, checkpoint_filter_fn

# The authors' keywords -> ours, where they differ.
KEYWORDS = {
    "stem_type": "stem", "hidden_dim": "embed_dim", "net_arch": "stages", "channel_ratio": "mlp_ratio",
    "cpe": "bypass", "shared_spatial_func": "share_mixers",
}


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (img_size, patch_size, in_chans, num_classes, stem_type, hidden_dim, net_arch, num_heads, qkv_bias, channel_ratio,
    token_ratio, cpe, shared_spatial_func, drop_path_rate; multi_stage may be given and follows from net_arch).
    Unexpected, missing or misshaped tensors are one error that lists them all.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    config.pop("multi_stage", None)
    if "net_arch" in config:
        config["net_arch"] = _stages(config["net_arch"])
    model = timm.create_model(variant, **{KEYWORDS.get(key, key): value for key, value in config.items()})
    model.load_state_dict(checkpoint_filter_fn(state_dict, model), strict=True)
    return model.eval()


def _stages(net_arch: list) -> list:
    """Their [[mixer, blocks], ...] of a single stage, or a list of such lists, with "pass" for our "conv"."""
    stages = [net_arch] if isinstance(net_arch[0][0], str) else net_arch
    return [[("conv" if mixer == "pass" else mixer, blocks) for mixer, blocks in stage] for stage in stages]
