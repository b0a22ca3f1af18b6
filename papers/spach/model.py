"""SPACH: one framework in which convolution, attention and MLP differ in nothing but how they mix tokens.

Zhao et al., "A Battle of Network Structures: An Empirical Study of CNN, Transformer, and MLP", arXiv 2108.13002.
Shapes: B batch, N tokens (H * W, row by row), C channels; maps are BCHW between stages, tokens BNC inside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

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
from common.run.timm import Pyramid, imagenet_cfg, of_size, register, tagged


class SpatialMLP(Mlp):
    """An MLP over the N = H W tokens of a map, shared by all channels; `ratio` N hidden units, rounded down."""

    AXES = {"fc1.weight": ("N", "HW"), "fc1.bias": ("N",), "fc2.weight": ("HW", "N"), "fc2.bias": ("HW",)}

    def __init__(self, grid: tuple[int, int], ratio: float):
        self.grid, self.ratio = grid, ratio
        super().__init__(grid[0] * grid[1], self.hidden(grid))

    def hidden(self, grid: tuple[int, int]) -> int:
        return max(1, int(grid[0] * grid[1] * self.ratio))

    def forward(self, tokens_BNC):
        return super().forward(tokens_BNC.transpose(1, 2)).transpose(1, 2)


class DepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution. Bare: no norm, activation, scale or drop path."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWC):
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MixingBlock(nn.Module):
    """u = x + gamma F(LN(x)) + DW(x); y = u + MLP(LN(u)), with F the spatial mixer: "attn", "mlp" or "conv".

    x and y: (B, H, W, C). Only the MLP has the size of the map, `grid`; the others take any.
    The depthwise convolution DW stands beside every mixer, as the bypass that tells it positions. Where the
    mixing *is* convolution there is no F, and DW alone mixes.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], mixer: str, num_heads: int, qkv_bias: bool, token_ratio: float,
        mlp_ratio: float, bypass: bool, drop_path: float,
    ):
        super().__init__()
        if mixer == "conv":
            self.mixer = None
        elif mixer == "attn":
            self.mixer = Attention(dim, num_heads, qkv_bias=qkv_bias)
        elif mixer == "mlp":
            self.mixer = SpatialMLP(grid, token_ratio)
        else:
            raise ValueError(f"mixer {mixer!r}; there are conv, attn and mlp")
        if self.mixer is not None:
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
            # 3-D as in the authors' code: optimizers exempt 1-D parameters from weight decay, and theirs decays gamma.
            self.gamma = nn.Parameter(torch.full((1, 1, dim), 1e-4))
        self.bypass = DepthwiseConv(dim) if bypass else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        u = x
        if self.mixer is not None:
            tokens = self.mixer(self.norm1(x).flatten(1, 2))
            u = u + self.drop_path((self.gamma * tokens).view(x.shape))
        if self.bypass is not None:
            u = u + self.bypass(x)
        return u + self.drop_path(self.mlp(self.norm2(u)))


class Stem(nn.Module):
    """Patches to vectors by one convolution, "conv1", or by the deeper "conv4" of the + models, then LayerNorm.

    Refuses images of any other size than `img_size`, if there is one.
    """

    def __init__(
        self, kind: str, in_chans: int, dim: int, patch_size: int, img_size: tuple[int, int] | None, hidden: int = 64
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
        if self.img_size:
            x = of_size(x, self.img_size, "its number of tokens is fixed")
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
        x = self.downsample(x).permute(0, 2, 3, 1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2)


class SPACH(Pyramid):
    """Single-stage with one entry in `stages`; multi-stage (MS) with several, of widths C, 2C, ... at strides p, 2p ...

    A stage is a sequence of (mixer, number of blocks). `num_heads`, C / 32 by default, is the same in all stages, so
    heads grow wider. `mlp_ratio` is the paper's R; the spatial MLP has `token_ratio` N hidden units, rounded down.
    With an MLP the image size is part of the architecture: it sets N; the others take any. What does not divide is
    lost. timm's feature maps are those of the stages, of a single stage those of its blocks. `stem` is "conv1" or
    "conv4"; `bypass` the depthwise convolution beside the mixers; `share_mixers` keeps one mixer per stage (MS: from
    stage 2).
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
        widths = [embed_dim * 2**s for s in range(len(stages))]
        strides = [patch_size * 2**s for s in range(len(stages))]
        super().__init__(in_chans, num_classes, widths, strides)
        img_size, self.stem_kind = to_2tuple(img_size), stem
        self.check_size(img_size)
        mixers = [[mixer for mixer, count in stage for _ in range(count)] for stage in stages]
        multi_stage = len(stages) > 1
        if multi_stage:
            rates = calculate_drop_path_rates(drop_path_rate, [len(m) for m in mixers], stagewise=True)
        else:
            rates = [[drop_path_rate] * len(mixers[0])]  # the same in every block, unlike MS
            blocks = [f"stages.0.blocks.{b}" for b in range(len(mixers[0]))]
            self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=block) for block in blocks]
        fixed = any("mlp" in names for names in mixers)
        self.stem = Stem(stem, in_chans, embed_dim, patch_size, img_size if fixed else None)
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
        if share_mixers:
            self.register_state_dict_post_hook(_part)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def levels(self):
        if len(self.strides) > 1:  # also where pruning has left one stage
            return list(self.stages)
        return [partial(_on_map, block) for block in self.stages[0].blocks]

    def keep_levels(self, count):
        if len(self.strides) > 1:  # also where pruning has left one stage
            super().keep_levels(count)
        else:
            self.stages[0].blocks = self.stages[0].blocks[:count]

    def check_size(self, img_size):
        smallest = self.strides[-1]
        if min(img_size) < smallest or (self.stem_kind == "conv4" and any(side % 2 for side in img_size)):
            raise ValueError(f"img_size={img_size}: both sides must be {smallest} or more, and even for the conv4 stem")


def _on_map(block: MixingBlock, x: torch.Tensor) -> torch.Tensor:
    """A block on (B, C, H, W)."""
    return block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _part(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, _metadata: object) -> None:
    """Gives each name a tensor of its own: safetensors, in which timm saves, knows no shared ones."""
    seen: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            state_dict[prefix + name] = state_dict[prefix + name].clone()
        seen.add(id(parameter))


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
    # Of the weights that travel with this folder.
    "spach_ms_mini_patch4_64_hybrid": (
        64, 4, "conv1", 32, ((("conv", 2),), (("conv", 2),), (("conv", 3), ("attn", 3)), (("attn", 2),)), 2, None,
    ),
}
PAPER = dict(
    paper_name="A Battle of Network Structures: An Empirical Study of CNN, Transformer, and MLP",
    paper_ids="arXiv:2108.13002", origin_url="https://github.com/microsoft/SPACH", license="mit",
)
RELEASE = "https://github.com/microsoft/SPACH/releases/download/v1.0/{}.pth"



def _cfg(name: str) -> dict[str, dict]:
    size, patch, stem, _, stages, _, file = VARIANTS[name]
    stride = patch * 2 ** (len(stages) - 1)
    fixed = any(mixer == "mlp" for stage in stages for mixer, _ in stage)
    return tagged("spach", name, imagenet_cfg(
        size, url=RELEASE.format(file) if file else "", fixed_input_size=fixed,
        pool_size=(size // stride, size // stride), first_conv="stem.proj" if stem == "conv1" else "stem.proj.0",
        **PAPER,
    ))


default_cfgs = generate_default_cfgs({tag: cfg for name in VARIANTS for tag, cfg in _cfg(name).items()})
FIELDS = ("patch_size", "stem", "embed_dim", "stages", "mlp_ratio")  # timm passes the image size where it is fixed
register(
    SPACH, {name: dict(zip(FIELDS, row[1:])) for name, row in VARIANTS.items()}, convert=checkpoint_filter_fn,
    levels=lambda arguments: len(arguments["stages"]) if len(arguments["stages"]) > 1 else 3,
    blocks=lambda arguments: len(arguments["stages"]) == 1,
)
