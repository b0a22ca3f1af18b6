"""The authors' checkpoints -> this model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError

# Theirs -> ours, applied in this order.
NAMES = [
    (r"^norm1\.", "stem.norm."),
    (r"^norm2\.", "norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^blocks\.", "stages.0.blocks."),
    (r"^layer1\.", "stages.0.blocks."),
    # Theirs counts the downsampling layer as the first of a stage's blocks.
    (r"^layer(\d+)\.0\.net\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^layer(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
    (r"\.gamma_1$", ".gamma"),
    (r"\.spatial_func\.", ".mixer."),
    (r"\.channel_func\.", ".mlp."),
    (r"\.cpe_net\.net\.1\.", ".bypass."),
]
# The authors' keywords -> ours, where they differ.
KEYWORDS = {
    "stem_type": "stem", "hidden_dim": "embed_dim", "net_arch": "stages", "channel_ratio": "mlp_ratio",
    "cpe": "bypass", "shared_spatial_func": "share_mixers",
}


def rename(name: str) -> str:
    """Our name of the authors' tensor; a name that is not theirs is returned unchanged."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def convert(state_dict: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The authors' tensors under our names. `UserError` if copies of what `model` shares differ.

    A mixer that blocks share is listed once per block, here as there.
    """
    weights = {rename(name): tensor for name, tensor in state_dict.items()}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        origin = first.setdefault(id(parameter), name)
        if name in weights and origin in weights and not torch.equal(weights[name], weights[origin]):
            raise UserError(
                f"{name} differs from {origin}, but this model shares them; build it without shared mixers "
                "(shared_spatial_func=False) or check the file"
            )
    return weights


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (img_size, patch_size, in_chans, num_classes, stem_type, hidden_dim, net_arch, num_heads, qkv_bias, channel_ratio,
    token_ratio, cpe, shared_spatial_func, drop_path_rate; multi_stage may be given and follows from net_arch).
    Unexpected, missing or misshaped tensors are one error that lists them all.
    """
    from .model import VARIANTS

    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    config.pop("multi_stage", None)
    if "net_arch" in config:
        config["net_arch"] = _stages(config["net_arch"])
    model = timm.create_model(variant, **{KEYWORDS.get(key, key): value for key, value in config.items()})
    model.load_state_dict(convert(state_dict, model), strict=True)
    return model.eval()


def _stages(net_arch: list) -> list:
    """Their [[mixer, blocks], ...] of a single stage, or a list of such lists, with "pass" for our "conv"."""
    stages = [net_arch] if isinstance(net_arch[0][0], str) else net_arch
    return [[("conv" if mixer == "pass" else mixer, blocks) for mixer, blocks in stage] for stage in stages]
