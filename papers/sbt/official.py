"""The authors' checkpoints, and PVTv2's from timm, -> this model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from common import run
from common.run import UserError
from papers.sbt.model import PVT_NAMES, VARIANTS, checkpoint_filter_fn, create_tracker, renamed

# The authors' configuration -> our arguments, where they differ.
KEYWORDS = {"cross_blocks_1based": "cross_blocks"}


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' tracking network with these weights, in eval mode.

    `variant` is base, large or huge (or any other of `model.VARIANTS`, with or without "sbt_"), with "_mlp_head"
    for the head without spatial mixing. `config` overrides its hyper-parameters under the authors' keywords (depths,
    cross_blocks_1based, embed_dims, num_heads, mlp_ratios, sr_ratios, strides, qkv_bias, drop_path_rate, head "mixer"
    or "mlp", head_tokens, in_chans). The network does as the published code does where that errs, as the weights ask
    for; `authors_errors=False` corrects it. Unexpected, missing or misshaped tensors are one error that lists them all.
    """
    name = f"sbt_{variant.removeprefix('sbt_').removesuffix('_mlp_head')}"
    if name not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(v.removeprefix('sbt_') for v in VARIANTS)}")
    config = {KEYWORDS.get(key, key): value for key, value in config.items()}
    if variant.endswith("_mlp_head"):
        config.setdefault("head", "mlp")
    strides = config.get("strides", VARIANTS[name]["strides"][:3])
    if tokens := config.pop("head_tokens", None):
        config["search_size"] = round(tokens**0.5) * torch.tensor(strides).prod().item()
    model = create_tracker(name, **{"authors_errors": True} | config)
    model.load_state_dict(checkpoint_filter_fn(state_dict), strict=True)
    return model.eval()


def load_backbone(backbone: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Starts a tracker's backbone from pre-trained weights; returns the names that stay as they were initialised.

    Takes the classifier that the recipe `pretrain` makes (its fourth stage and classes are left behind), a tracker of
    ours or the authors', and timm's PVTv2 (its surplus blocks are left behind: a base has 10 of B3's 18 in stage 3); a
    `correlation.Siamese` takes those of its own timm network.
    `UserError` if a tensor has another shape, or no tensor fits at all.
    """
    weights = {renamed(name, PVT_NAMES): tensor for name, tensor in checkpoint_filter_fn(state_dict).items()}
    own = backbone.state_dict()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    if "body" in dict(backbone.named_children()):  # correlation.Siamese keeps timm's network under that name
        weights = {f"body.{name.removeprefix('body.')}": tensor for name, tensor in weights.items()}
    found = {name: tensor for name, tensor in weights.items() if name in own and not name.startswith("head.")}
    wrong = [
        f"{name} {list(tensor.shape)}, expected {list(own[name].shape)}" for name, tensor in found.items()
        if tensor.shape != own[name].shape
    ]
    if wrong or not found:
        reason = "; ".join(wrong[:5]) if wrong else f"it has names such as {', '.join(list(state_dict)[:3])}"
        raise UserError(f"these weights do not fit the backbone: {reason}")
    backbone.load_state_dict(found, strict=False)
    return [name for name in own if name not in found]


def init_weights(source: str, variant: str) -> dict[str, torch.Tensor]:
    """A state dict for `load_backbone` from a file, the run folder of a pre-training, or a model of timm by name, whose
    ImageNet weights timm then takes from its cache or fetches; "pvt_v2" is the one that fits `variant`."""
    if source == "pvt_v2":
        source = {"sbt_light": "pvt_v2_b1", "sbt_small": "pvt_v2_b2"}.get(variant, "pvt_v2_b3")
    path = Path(source)
    if path.is_dir():
        return run.load_run(path, dict)[1]["model"]
    if path.suffix or not timm.is_model(source):
        return run.load_weights(path)
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:  # RuntimeError: timm has no weights of that name
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"timm could not fetch the weights of {source} ({reason}); give a file of them with --init, or "
            "--init None to start at random"
        ) from None
