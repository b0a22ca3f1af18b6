"""The authors' checkpoints -> this model, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError
from common.run.resize import fitted
from papers.smlpnet.model import NAMES, VARIANTS, SMLPNet, checkpoint_filter_fn

# The authors' keywords -> ours, where they differ.
KEYWORDS = {"dim": "embed_dim", "image_size": "img_size", "dp_rate": "drop_path_rate"}


# Ours -> theirs outside the blocks.
THEIRS = [
    (r"^patch_embed\.proj\.", "to_patch_embedding.0.0."),
    (r"^stages\.(\d+)\.downsample\.", r"to_patch_embedding.\1.0."),
    (r"^norm\.", "batch_norm."),
    (r"^head\.fc\.", "mlp_head.0."),
]


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (dim, depths, alpha, patch_size, image_size, in_chans, num_classes, dp_rate); weights of another
    image size are interpolated with resize_mixers=True. Unexpected, missing or misshaped tensors are one error that
    lists them all.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    interpolate = config.pop("resize_mixers", False)
    model = timm.create_model(variant, **{KEYWORDS.get(key, key): value for key, value in config.items()})
    weights = fitted(checkpoint_filter_fn(state_dict, model), model, interpolate=interpolate)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def to_official(model: SMLPNet) -> dict[str, torch.Tensor]:
    """The network's tensors under the names, and in the shapes, that the authors' code loads."""
    first = [0]  # number of each stage's first block: they count blocks over the whole network
    for stage in model.stages:
        first.append(first[-1] + len(stage.blocks))
    weights = {}
    for name, tensor in model.state_dict().items():
        if found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            block, inner = first[int(found[1])] + int(found[2]), name[found.end():]
            theirs, ours = next((theirs, ours) for theirs, ours in NAMES.items() if inner.startswith(ours))
            kind, _, place = theirs.partition(".")
            name = f"{kind}_mix.{block}.{place}{inner.removeprefix(ours)}"
            if inner in ("smlp.mix_row.weight", "smlp.mix_col.weight"):
                tensor = tensor[..., None, None]  # convolutions, there
        else:
            for pattern, theirs in THEIRS:
                name = re.sub(pattern, theirs, name)
        weights[name] = tensor
    return weights
