"""SBT: a backbone in which template and search image attend to each other, and two heads that read the search tokens.

Xie et al., "Correlation-Aware Deep Tracking", CVPR 2022, arXiv 2203.01666.
Shapes: B batch, C channels, H x W positions of a map, N = H W tokens, M keys after spatial reduction; images are BCHW,
maps BHWC, boxes (cx, cy, w, h) as fractions of the search crop. z is the template, x the search image, as in the paper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs
from torch import nn

from common.run.timm import Backbone, imagenet_cfg, register


def on_map(conv: nn.Module, x_BHWC: torch.Tensor) -> torch.Tensor:
    """A convolution on a BHWC map; both permutes are views, and the convolution runs channels-last."""
    return conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Overlapping patches: (B, H, W, in_chans) -> (B, H/stride, W/stride, dim)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(on_map(self.proj, x))


class Attention(nn.Module):
    """All tokens of one map attend to the spatially reduced tokens of the same map, or of the other image's."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        else:
            self.sr = None

    def forward(self, query_BHWC, source_BHWC):
        """Maps of any two sizes -> (B, H, W, C), of the queries' size."""
        B, H, W, C = query_BHWC.shape
        if self.sr is not None:
            source_BHWC = self.norm(on_map(self.sr, source_BHWC))
        q = self.q(query_BHWC).view(B, H * W, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(source_BHWC).view(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, H, W, C))


class ConvMlp(nn.Module):
    """Feed-forward layer; its depth-wise convolution is the only position encoding beside the patch embeddings."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.fc2(F.gelu(on_map(self.dwconv, self.fc1(x))))


class EoCBlock(nn.Module):
    """Extract or Correlate. The same parameters make an EoC-SA or an EoC-CA block: `cross` says which this one is."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, qkv_bias: bool, drop_path: float, cross: bool
    ):
        super().__init__()
        self.cross = cross
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, x, other=None):
        """x attends to itself, or to the `other` image's map: (B, H, W, C) -> (B, H, W, C)."""
        if self.grad_checkpointing:
            return checkpoint(self._forward, x, other)
        return self._forward(x, other)

    def _forward(self, x, other):
        queries = self.norm1(x)
        source = queries if other is None else self.norm1(other)
        x = x + self.drop_path(self.attn(queries, source))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patch embedding, blocks, norm, at one resolution. `norm_applied` False: the norm is there but idle."""

    def __init__(self, patch_embed: PatchEmbed, blocks: Sequence[EoCBlock], dim: int, norm_applied: bool):
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.norm.requires_grad_(norm_applied)
        self.norm_applied = norm_applied

    def layers(self) -> list[nn.Module]:
        return [self.patch_embed, *self.blocks, *([self.norm] if self.norm_applied else [])]

    def forward(self, x_BCHW):
        """A single image: every block extracts."""
        x = x_BCHW.permute(0, 2, 3, 1)
        for layer in self.layers():
            x = layer(x)
        return x.permute(0, 3, 1, 2)


class SBTBackbone(Backbone, nn.Module):
    """Stages of EoC blocks with one set of weights for both images; of a single image, a classifier as timm has them.

    `cross_blocks` lists for each stage which of its blocks correlate, counted from 1. A tracker takes the first three
    stages; the classifier it is pre-trained as has a fourth, PVTv2's.

    `authors_errors` does as the authors' code does: the norms after all stages but the last are there, but not applied.
    Its weights need that. PVTv2, whose weights training starts from, applies them; so do we by default.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320),
        depths: Sequence[int] = (3, 4, 10),
        cross_blocks: Sequence[Sequence[int]] = ((), (), (2, 4, 6, 8, 10)),
        num_heads: Sequence[int] = (1, 2, 5),
        mlp_ratios: Sequence[float] = (8, 8, 4),
        sr_ratios: Sequence[int] = (8, 4, 2),
        strides: Sequence[int] = (4, 2, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        authors_errors: bool = False,
    ):
        super().__init__()
        for s, (depth, cross) in enumerate(zip(depths, cross_blocks)):
            if not set(cross) <= set(range(1, depth + 1)):
                raise ValueError(f"cross_blocks {list(cross)} of stage {s + 1}: expected block numbers 1 to {depth}")
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for s, (dim, depth) in enumerate(zip(embed_dims, depths)):
            cross = cross_blocks[s] if s < len(cross_blocks) else ()
            embed = PatchEmbed(embed_dims[s - 1] if s else in_chans, dim, 3 if s else 7, strides[s])
            blocks = [
                EoCBlock(dim, num_heads[s], mlp_ratios[s], sr_ratios[s], qkv_bias, rates[s][i], i + 1 in cross)
                for i in range(depth)
            ]
            stages.append(Stage(embed, blocks, dim, s == len(depths) - 1 or not authors_errors))
        self.stages = nn.Sequential(*stages)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.reduction = math.prod(strides)
        self.feature_info = [
            dict(num_chs=dim, reduction=math.prod(strides[: s + 1]), module=f"stages.{s}")
            for s, dim in enumerate(embed_dims)
        ]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(self._init_weights)

        correlating = [i for i, layer in enumerate(self.layers()) if getattr(layer, "cross", False)]
        self.first_cross = correlating[0] if correlating else len(self.layers())
        self.last_cross = correlating[-1] if correlating else -1

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)

    # Two images ----------------------------------------------------------------------------------------

    def layers(self) -> list[nn.Module]:
        return [layer for stage in self.stages for layer in stage.layers()]

    def encode(self, image_BCHW):
        """What of an image does not depend on the other: its map (B, H, W, C) where the first EoC-CA block begins.

        For the template of a tracker this is computed once per sequence.
        """
        x = image_BCHW.permute(0, 2, 3, 1)
        for layer in self.layers()[: self.first_cross]:
            x = layer(x)
        return x

    def correlate(self, z, x, both: bool = False):
        """`encode`'s maps of template and search image -> the search map (B, H/8, W/8, C), normalised.

        With `both`, the pair (template map, search map); else the template's tokens end where nothing reads them any
        more, which changes no result. Both directions of a block see the maps as they were before it.
        """
        layers = self.layers()
        for i, layer in enumerate(layers[self.first_cross :], self.first_cross):
            needed = both or i < self.last_cross
            if getattr(layer, "cross", False):
                z, x = layer(z, x) if needed else z, layer(x, z)
            else:
                z, x = layer(z) if needed else z, layer(x)
        return (z, x) if both else x

    # One image: what timm asks of a model ---------------------------------------------------------------

    def forward_features(self, x):
        """(B, in_chans, H, W) -> (B, C, H/r, W/r) of the last stage, normalised; every block extracts."""
        return self.stages(x)

    def forward_head(self, x, pre_logits: bool = False):
        """Pools; (B, num_classes), or (B, C) with `pre_logits` or without classes."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for layer in self.layers():
            if isinstance(layer, EoCBlock):
                layer.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [(r"^stages\.(\d+)\.patch_embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                  (r"^stages\.(\d+)\.norm", (99999,))]
        return dict(stem=r"^stages\.0\.patch_embed", blocks=r"^stages\.(\d+)" if coarse else blocks)


# Heads ---------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Mix-MLP: (B, N, C) -> (B, N, out_dim), for exactly `tokens` = N.

    Linear maps over the tokens and over the channels take turns; in between there are C "tokens".
    """

    def __init__(self, dim: int, tokens: int, out_dim: int):
        super().__init__()
        self.spatial = nn.ModuleList([nn.Linear(tokens, dim), nn.Linear(dim, tokens)])
        self.channel = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, out_dim)])

    def forward(self, x_BNC):
        x = F.relu(self.spatial[0](x_BNC.mT)).mT
        x = F.relu(self.channel[0](x))
        x = F.relu(self.spatial[1](x.mT)).mT
        return self.channel[1](x)


class TokenMlp(nn.Module):
    """Without spatial mixing: (B, N, C) -> (B, N, out_dim), each token by itself."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, out_dim)])

    def forward(self, x_BNC):
        return self.layers[1](F.relu(self.layers[0](x_BNC)))


class Prediction(NamedTuple):
    """What every token of the search map says, row by row."""

    logits: torch.Tensor
    """(B, N, 2): target, background."""
    boxes: torch.Tensor
    """(B, N, 4): cx, cy, w, h of the target as fractions of the search crop, from its top left corner."""


def at_least_float(x: torch.Tensor) -> torch.Tensor:
    """A fraction of the crop in bfloat16 is off by up to 1/512 of it: half a pixel of 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SBTHead(nn.Module):
    """Two separate networks over the search tokens: target or background, and the target's box."""

    def __init__(self, dim: int, tokens: int, kind: str):
        super().__init__()
        if kind not in ("mixer", "mlp"):
            raise ValueError(f"head {kind!r}: expected 'mixer' or 'mlp'")
        self.tokens = tokens if kind == "mixer" else None
        self.cls, self.box = (Mixer(dim, tokens, n) if kind == "mixer" else TokenMlp(dim, n) for n in (2, 4))
        for name, weight in self.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(weight)

    def forward(self, x_BHWC) -> Prediction:
        x = x_BHWC.flatten(1, 2)
        if self.tokens not in (None, x.shape[1]):
            raise ValueError(f"this head was built for {self.tokens} search tokens, not {x.shape[1]}")
        return Prediction(self.cls(x), at_least_float(self.box(x)).sigmoid())


class SBT(nn.Module):
    """The tracker's network: `SBTBackbone` without classes, and `SBTHead`.

    `search_size` in pixels fixes the number of search tokens, which is part of the mixer's weights.
    """

    def __init__(self, *, search_size: int = 256, head: str = "mixer", **backbone):
        super().__init__()
        self.backbone = SBTBackbone(num_classes=0, **backbone)
        if search_size % self.backbone.reduction:
            raise ValueError(f"search_size {search_size} is not a multiple of the stride {self.backbone.reduction}")
        self.grid = search_size // self.backbone.reduction  # search tokens per side
        self.head = SBTHead(self.backbone.num_features, self.grid**2, head)

    def encode(self, template_BCHW):
        """The part of the template's computation that its sequence needs only once."""
        return self.backbone.encode(template_BCHW)

    def predict(self, z, search_BCHW) -> Prediction:
        """`encode`'s template and a search crop -> what its tokens say."""
        return self.head(self.backbone.correlate(z, self.backbone.encode(search_BCHW)))

    def forward(self, template, search) -> Prediction:
        """Template (B, 3, 128, 128) and search crop (B, 3, 256, 256), normalised."""
        return self.predict(self.encode(template), search)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


# Variants ------------------------------------------------------------------------------------------------


def _variant(depths: Sequence[int], cross: Sequence[int], **changes) -> dict:
    """PVTv2's widths; `cross` are the EoC-CA blocks of stage 3. The fourth stage is the classifier's alone."""
    return dict(
        embed_dims=(64, 128, 320, 512), depths=tuple(depths), cross_blocks=((), (), tuple(cross)),
        num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1), strides=(4, 2, 1, 2),
    ) | changes


VARIANTS = {
    # Named in the paper, absent from the published code, and reconstructed here: stages 1 to 3 of PVTv2-B1 and -B2,
    # every second block of stage 3 a cross block. The paper's own numbers were not at hand.
    "sbt_light": _variant((2, 2, 2, 2), (2,)),
    "sbt_small": _variant((3, 4, 6, 3), (2, 4, 6)),
    # The published code's.
    "sbt_base": _variant((3, 4, 10, 3), range(2, 11, 2)),
    "sbt_large": _variant((3, 4, 18, 3), range(6, 19, 2)),
    "sbt_huge": _variant((3, 8, 27, 3), range(3, 28, 2)),
    # Not in the paper: for tests and tiny runs. Of small crops it reduces keys and values less.
    "sbt_micro": _variant(
        (1, 1, 4, 1), (2, 4), embed_dims=(32, 48, 64, 96), num_heads=(1, 2, 2, 3), mlp_ratios=(2, 2, 2, 2),
        sr_ratios=(4, 2, 1, 1),
    ),
}


def first_three(variant: str) -> dict:
    """Arguments of a variant's `SBTBackbone` in a tracker, without the classifier's last stage."""
    return {key: value[:3] for key, value in VARIANTS[variant].items()}


def create_tracker(variant: str, **changes) -> SBT:
    """The tracking network of a variant. `changes` are arguments of `SBT`."""
    return SBT(**first_three(variant) | changes)


# Weights -------------------------------------------------------------------------------------------------

# Theirs -> ours. The first group are the authors' names, the second timm's for PVTv2.
NAMES = [
    (r"^(backbone\.)?(patch_embed|norm)(\d)\.", lambda m: f"{m[1] or ''}stages.{int(m[3]) - 1}.{m[2]}."),
    (r"^(backbone\.)?block(\d)\.", lambda m: f"{m[1] or ''}stages.{int(m[2]) - 1}.blocks."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^box_head\.class_head\.", "head.cls."),
    (r"^box_head\.bbox_head\.", "head.box."),
    (r"\.layers_channle\.", ".channel."),  # sic
    (r"\.layers_spatial\.", ".spatial."),
]
PVT_NAMES = [
    (r"^patch_embed\.", "stages.0.patch_embed."),
    (r"^stages\.(\d)\.downsample\.", r"stages.\1.patch_embed."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def renamed(name: str, table: Sequence[tuple]) -> str:
    for pattern, ours in table:
        name = re.sub(pattern, ours, name)
    return name


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], _model: nn.Module | None = None) -> dict:
    """The authors' tensors under our names; names that are not theirs pass unchanged."""
    return {renamed(name, NAMES): tensor for name, tensor in state_dict.items()}


default_cfgs = generate_default_cfgs({
    f"{name}.untrained": imagenet_cfg(224, first_conv="stages.0.patch_embed.proj", license="apache-2.0")
    for name in VARIANTS
})
register(SBTBackbone, VARIANTS, convert=checkpoint_filter_fn)
