"""The authors' checkpoints -> this model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch

from common.run import UserError
from papers.smlpnet.model import VARIANTS, checkpoint_filter_fn

# The authors' keywords -> ours, where they differ.
KEYWORDS = {"dim": "embed_dim", "image_size": "img_size", "dp_rate": "drop_path_rate"}


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `model.VARIANTS`; `config` overrides its hyper-parameters under the authors' keywords
    (dim, depths, alpha, patch_size, image_size, in_chans, num_classes, dp_rate). Unexpected, missing or misshaped
    tensors are one error that lists them all.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    model = timm.create_model(variant, **{KEYWORDS.get(key, key): value for key, value in config.items()})
    model.load_state_dict(checkpoint_filter_fn(state_dict, model), strict=True)
    return model.eval()
