"""The authors' checkpoints -> this model, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError
from common.run.resize import fitted
from papers.spach.model import SPACH, VARIANTS, checkpoint_filter_fn

# The authors' keywords -> ours, where they differ.
KEYWORDS = {
    "stem_type": "stem", "hidden_dim": "embed_dim", "net_arch": "stages", "channel_ratio": "mlp_ratio",
    "cpe": "bypass", "shared_spatial_func": "share_mixers",
}


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (img_size, patch_size, in_chans, num_classes, stem_type, hidden_dim, net_arch, num_heads, qkv_bias, channel_ratio,
    token_ratio, cpe, shared_spatial_func, drop_path_rate; multi_stage may be given and follows from net_arch);
    weights of another image size are interpolated with resize_mixers=True. Unexpected, missing or misshaped tensors are
    one error that lists them all.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    config.pop("multi_stage", None)
    if "net_arch" in config:
        config["net_arch"] = _stages(config["net_arch"])
    interpolate = config.pop("resize_mixers", False)
    model = timm.create_model(variant, **{KEYWORDS.get(key, key): value for key, value in config.items()})
    weights = fitted(checkpoint_filter_fn(state_dict, model), model, interpolate=interpolate)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _stages(net_arch: list) -> list:
    """Their [[mixer, blocks], ...] of a single stage, or a list of such lists, with "pass" for our "conv"."""
    stages = [net_arch] if isinstance(net_arch[0][0], str) else net_arch
    return [[("conv" if mixer == "pass" else mixer, blocks) for mixer, blocks in stage] for stage in stages]


# Ours -> theirs: `model.NAMES` the other way, applied in this order.
THEIRS = [
    (r"^norm\.", "norm2."),
    (r"^stem\.norm\.", "norm1."),
    (r"^head\.fc\.", "head."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"layer{int(m[1]) + 1}.0.net.1."),
    (r"^stages\.0\.blocks\.", "layer1."),
    # Theirs counts the downsampling layer as the first of a stage's blocks.
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{int(m[2]) + 1}."),
    (r"\.gamma$", ".gamma_1"),
    (r"\.mixer\.", ".spatial_func."),
    (r"\.mlp\.", ".channel_func."),
    (r"\.bypass\.", ".cpe_net.net.1."),
]


def to_official(model: SPACH) -> dict[str, torch.Tensor]:
    """The network's tensors under the names that the authors' code loads; a mixer that blocks share once for each."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if len(model.strides) == 1:
            name = re.sub(r"^stages\.0\.blocks\.", "blocks.", name)
        for pattern, theirs in THEIRS:
            name = re.sub(pattern, theirs, name)
        weights[name] = tensor
    return weights
