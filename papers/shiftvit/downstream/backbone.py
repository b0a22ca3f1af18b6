"""ShiftViT as a backbone of mmdetection and mmsegmentation: importing this file registers it with both."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import GroupNorm1
from torch import Tensor, nn

from common import run
from papers.shiftvit import model  # noqa: F401 (registers with timm)
from papers.shiftvit.model import checkpoint_filter_fn


@MODELS.register_module(name="ShiftViT")
class Backbone(BaseModule):
    """(B, 3, H, W) -> maps at strides 4, 8, 16, 32, each normalised, as Swin's dense models do.

    `checkpoint` is a file of weights, the authors' or ours; its classifier and last norm are left behind. Further
    arguments are the network's.
    """

    def __init__(
        self, variant: str, checkpoint: str = "", out_indices: Sequence[int] = (0, 1, 2, 3), with_cp: bool = False,
        **model_args,
    ):
        super().__init__()
        network = timm.create_model(variant, num_classes=0, **model_args)
        if checkpoint:
            weights = checkpoint_filter_fn(run.load_weights(checkpoint))
            network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
        network.set_grad_checkpointing(with_cp)
        self.patch_embed, self.stages = network.patch_embed, network.stages
        self.out_indices = out_indices
        self.norms = nn.ModuleList(GroupNorm1(network.feature_info[i]["num_chs"]) for i in out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.patch_embed(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(self.norms[len(maps)](x))
        return tuple(maps)
