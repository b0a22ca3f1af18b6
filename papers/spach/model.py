"""SPACH: one framework in which convolution, attention and MLP differ in nothing but how they mix tokens.

Zhao et al., "A Battle of Network Structures: An Empirical Study of CNN, Transformer, and MLP", arXiv 2108.13002.
Shapes: B batch, N tokens (H * W, row by row), C channels; maps are BCHW between stages, tokens BNC inside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from timm.layers import (
    Attention,
    ClassifierHead,
    DropPath,
    GroupNorm1,
    LayerNorm2d,
    Mlp,
    calculate_drop_path_rates,
    to_2tuple,
)
from timm.models import checkpoint_seq, generate_default_cfgs
from torch import nn

from common.run import UserError
from common.run.timm import Backbone, imagenet_cfg, register


class SpatialMLP(Mlp):
    """An MLP over the N tokens, shared by all channels."""

    def forward(self, tokens_BNC):
        return super().forward(tokens_BNC.mT).mT


class DepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution of tokens laid out as a map. Bare: no norm, activation, scale or drop path."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.grid = grid

    def forward(self, tokens_BNC):
        return super().forward(tokens_BNC.mT.unflatten(2, self.grid)).flatten(2).mT


class MixingBlock(nn.Module):
    """u = x + gamma F(LN(x)) + DW(x); y = u + MLP(LN(u)), with F the spatial mixer: "attn", "mlp" or "conv".

    The depthwise convolution DW stands beside every mixer, as the bypass that tells it positions. Where the
    mixing *is* convolution there is no F, and DW alone mixes.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], mixer: str, num_heads: int, qkv_bias: bool, token_ratio: float,
        mlp_ratio: float, bypass: bool, drop_path: float,
    ):
        super().__init__()
        tokens = grid[0] * grid[1]
        if mixer == "conv":
            self.mixer = None
        elif mixer == "attn":
            self.mixer = Attention(dim, num_heads, qkv_bias=qkv_bias)
        elif mixer == "mlp":
            self.mixer = SpatialMLP(tokens, max(1, int(tokens * token_ratio)))
        else:
            raise ValueError(f"mixer {mixer!r}; there are conv, attn and mlp")
        if self.mixer is not None:
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
            # 3-D as in the authors' code: optimizers exempt 1-D parameters from weight decay, and theirs decays gamma.
            self.gamma = nn.Parameter(torch.full((1, 1, dim), 1e-4))
        self.bypass = DepthwiseConv(dim, grid) if bypass else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        u = x
        if self.mixer is not None:
            u = u + self.drop_path(self.gamma * self.mixer(self.norm1(x)))
        if self.bypass is not None:
            u = u + self.bypass(x)
        return u + self.drop_path(self.mlp(self.norm2(u)))


class Stem(nn.Module):
    """Patches to vectors by one convolution, "conv1", or by the deeper "conv4" of the + models, then LayerNorm.

    Refuses images of any other size than its own.
    """

    def __init__(
        self, kind: str, in_chans: int, dim: int, patch_size: int, img_size: tuple[int, int], hidden: int = 64
    ):
        super().__init__()
        self.img_size = img_size
        if kind == "conv1":
            self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        elif kind == "conv4":
            half = patch_size // 2
            self.proj = nn.Sequential(
                nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
                nn.Conv2d(hidden, dim, half, stride=half),
            )
        else:
            raise ValueError(f"stem {kind!r}; there are conv1 and conv4")
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x):
        height, width = x.shape[-2:]
        if (height, width) != self.img_size:
            raise ValueError(
                f"images of {height}x{width} pixels: this model was built for {self.img_size[0]}x{self.img_size[1]}, "
                f"its number of tokens is fixed. Resize them, or build the model with img_size=({height}, {width})"
            )
        return self.norm(self.proj(x))


def merging(dim: int) -> nn.Sequential:
    """Halves the map and doubles the width to `dim`."""
    return nn.Sequential(nn.Conv2d(dim // 2, dim, 2, stride=2, bias=False), GroupNorm1(dim))


class Stage(nn.Module):
    """Merges patches (except in the first stage), then mixes at one resolution.

    With `share` all blocks own one and the same spatial mixer; norms, gamma, bypass and channel MLP stay their own.
    """

    def __init__(
        self, dim: int, mixers: Sequence[str], drop_paths: Sequence[float], *, merge: bool, share: bool, **block
    ):
        super().__init__()
        self.downsample = merging(dim) if merge else nn.Identity()
        self.blocks = nn.Sequential(*(
            MixingBlock(dim, mixer=mixer, drop_path=rate, **block)
            for mixer, rate in zip(mixers, drop_paths, strict=True)
        ))
        if share:
            if len(set(mixers)) > 1 or "conv" in mixers:
                raise ValueError(f"only blocks that all are attn, or all mlp, can share a mixer; here: {mixers}")
            for block in self.blocks:
                block.mixer = self.blocks[0].mixer
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.downsample(x)
        grid = x.shape[2:]
        tokens = x.flatten(2).mT
        if self.grad_checkpointing and not torch.jit.is_scripting():
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return tokens.mT.unflatten(2, grid)


class SPACH(Backbone, nn.Module):
    """Single-stage with one entry in `stages`; multi-stage (MS) with several, of widths C, 2C, ... at strides p, 2p ...

    A stage is a sequence of (mixer, number of blocks). `num_heads`, C / 32 by default, is the same in all stages, so
    heads grow wider. `mlp_ratio` is the paper's R; the spatial MLP has `token_ratio` N hidden units, rounded down.
    The image size is part of the architecture: it sets N; what does not divide is lost. `stem` is "conv1" or "conv4";
    `bypass` the depthwise convolution beside the mixers; `share_mixers` keeps one mixer per stage (MS: from stage 2).
    """

    stem_name = "stem"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem: str = "conv1",
        patch_size: int = 16,
        embed_dim: int = 384,
        stages: Sequence[Sequence[tuple[str, int]]] = ((("attn", 12),),),
        mlp_ratio: float = 2.0,
        token_ratio: float = 0.5,
        num_heads: int | None = None,
        qkv_bias: bool = True,
        bypass: bool = True,
        share_mixers: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        img_size = to_2tuple(img_size)
        smallest = patch_size * 2 ** (len(stages) - 1)
        if min(img_size) < smallest or (stem == "conv4" and any(side % 2 for side in img_size)):
            raise ValueError(f"img_size={img_size}: both sides must be {smallest} or more, and even for the conv4 stem")
        mixers = [[mixer for mixer, count in stage for _ in range(count)] for stage in stages]
        multi_stage = len(stages) > 1
        if multi_stage:
            rates = calculate_drop_path_rates(drop_path_rate, [len(m) for m in mixers], stagewise=True)
        else:
            rates = [[drop_path_rate] * len(mixers[0])]  # the same in every block, unlike MS
        widths = [embed_dim * 2**s for s in range(len(stages))]
        strides = [patch_size * 2**s for s in range(len(stages))]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=stride, module=f"stages.{s}")
            for s, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.stem = Stem(stem, in_chans, embed_dim, patch_size, img_size)
        self.stages = nn.Sequential(*(
            Stage(
                widths[s], mixers[s], rates[s], merge=s > 0, share=share_mixers and (s > 0 or not multi_stage),
                grid=(img_size[0] // stride, img_size[1] // stride), num_heads=num_heads or max(1, embed_dim // 32),
                qkv_bias=qkv_bias, token_ratio=token_ratio, mlp_ratio=mlp_ratio, bypass=bypass,
            )
            for s, stride in enumerate(strides)
        ))
        self.norm = LayerNorm2d(self.num_features, eps=1e-6)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(self._init_weights)
        for parameter in self.head.parameters():  # so the first loss is ln(classes)
            nn.init.zeros_(parameter)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward_features(self, x):
        """(B, in_chans, H, W) -> the last stage's (B, C, H, W), normalised."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x, pre_logits: bool = False):
        """Pools; (B, num_classes), or (B, C) with `pre_logits` or without classes."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


# The authors' tensors --------------------------------------------------------------------------------------

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


def rename(name: str) -> str:
    """Our name of the authors' tensor; a name that is not theirs is returned unchanged."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
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


# Variants --------------------------------------------------------------------------------------------------


def _single(mixer: str, blocks: int) -> tuple:
    return (((mixer, blocks),),)


def _multi(mixer: str, *blocks: int) -> tuple:
    """The first stage always convolves; the mixer is that of the later ones."""
    return (("conv", blocks[0]),), *(((mixer, count),) for count in blocks[1:])


_HYBRID_XS = (("conv", 3),), (("conv", 4),), (("conv", 2), ("attn", 10)), (("conv", 1), ("attn", 2))
_HYBRID_S = (("conv", 3),), (("conv", 2), ("attn", 2)), (("conv", 2), ("attn", 10)), (("conv", 1), ("attn", 2))

# img_size, patch_size, stem, embed_dim, stages, mlp_ratio, the authors' file: the released code. Drop path is left
# to the recipe, as in the authors' code, whose trainer passes 0.1 for all.
VARIANTS = {
    "spach_xxs_patch16_224_conv": (224, 16, "conv1", 384, _single("conv", 12), 2, None),
    "spach_xxs_patch16_224_attn": (224, 16, "conv1", 192, _single("attn", 12), 2, None),
    "spach_xxs_patch16_224_mlp": (224, 16, "conv1", 384, _single("mlp", 12), 2, None),
    "spach_xs_patch16_224_conv": (224, 16, "conv1", 384, _single("conv", 24), 2, None),
    "spach_xs_patch16_224_attn": (224, 16, "conv1", 384, _single("attn", 12), 2, None),
    "spach_xs_patch16_224_mlp": (224, 16, "conv1", 384, _single("mlp", 24), 2, None),
    "spach_s_patch16_224_conv": (224, 16, "conv1", 512, _single("conv", 24), 3, None),
    "spach_s_patch16_224_attn": (224, 16, "conv1", 512, _single("attn", 12), 3, None),
    "spach_s_patch16_224_mlp": (224, 16, "conv1", 512, _single("mlp", 24), 3, None),
    "spach_ms_xxs_patch4_224_conv": (224, 4, "conv1", 64, _multi("conv", 2, 2, 6, 2), 2, "spach_ms_conv_xxs"),
    "spach_ms_xxs_patch4_224_attn": (224, 4, "conv1", 32, _multi("attn", 2, 2, 6, 2), 2, "spach_ms_trans_xxs"),
    "spach_ms_xxs_patch4_224_mlp": (224, 4, "conv1", 64, _multi("mlp", 2, 2, 6, 2), 2, "spach_ms_mlp_xxs"),
    "spach_ms_xs_patch4_224_conv": (224, 4, "conv1", 96, _multi("conv", 3, 4, 12, 3), 2, None),
    "spach_ms_xs_patch4_224_attn": (224, 4, "conv1", 64, _multi("attn", 3, 4, 12, 3), 2, None),
    "spach_ms_xs_patch4_224_mlp": (224, 4, "conv1", 96, _multi("mlp", 3, 4, 12, 3), 2, None),
    "spach_ms_s_patch4_224_conv": (224, 4, "conv1", 128, _multi("conv", 3, 4, 12, 3), 3, "spach_ms_conv_s"),
    "spach_ms_s_patch4_224_attn": (224, 4, "conv1", 96, _multi("attn", 3, 4, 12, 3), 3, "spach_ms_trans_s"),
    "spach_ms_s_patch4_224_mlp": (224, 4, "conv1", 128, _multi("mlp", 3, 4, 12, 3), 3, "spach_ms_mlp_s"),
    "spach_ms_xs_patch4_224_hybrid": (224, 4, "conv1", 96, _HYBRID_XS, 2, None),
    "spach_ms_s_patch4_224_hybrid": (224, 4, "conv1", 128, _HYBRID_S, 3, "spach_ms_hybrid_s"),
    "spach_ms_xs_patch4_224_hybrid_plus": (224, 4, "conv4", 96, _HYBRID_XS, 2, None),
    "spach_ms_s_patch4_224_hybrid_plus": (224, 4, "conv4", 128, _HYBRID_S, 3, "spach_ms_hybrid_s+"),
    # Not in the paper: for tests and tiny runs on 32 x 32 images.
    "spach_ms_micro_patch4_conv": (32, 4, "conv1", 32, _multi("conv", 1, 1, 2, 1), 2, None),
    "spach_ms_micro_patch4_attn": (32, 4, "conv1", 32, _multi("attn", 1, 1, 2, 1), 2, None),
    "spach_ms_micro_patch4_mlp": (32, 4, "conv1", 32, _multi("mlp", 1, 1, 2, 1), 2, None),
}
RELEASE = "https://github.com/microsoft/SPACH/releases/download/v1.0/{}.pth"

default_cfgs = generate_default_cfgs({
    f"{name}.in1k": imagenet_cfg(
        size, url=RELEASE.format(file) if file else "", fixed_input_size=True,
        pool_size=(size // patch // 2 ** (len(stages) - 1),) * 2,
        first_conv="stem.proj" if stem == "conv1" else "stem.proj.0", license="mit",
    )
    for name, (size, patch, stem, _, stages, _, file) in VARIANTS.items()
})
FIELDS = ("img_size", "patch_size", "stem", "embed_dim", "stages", "mlp_ratio")
register(
    SPACH, {name: dict(zip(FIELDS, row)) for name, row in VARIANTS.items()}, convert=checkpoint_filter_fn,
    levels=lambda arguments: len(arguments["stages"]),
)
