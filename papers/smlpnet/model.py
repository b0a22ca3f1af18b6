"""sMLPNet: a pyramid without attention, whose tokens mix only along their own row and their own column.

Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", AAAI 2022, arXiv 2109.05422.
Shapes: B batch, C channels, H height, W width; maps are BCHW, and BHWC inside the channel MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

from common.kernels.sparse_mlp import sparse_mlp


class SparseMLP(nn.Module):
    """The paper's sMLP: global mixing for W + H weights per pixel instead of W * H.

    All branches read the activated z, the identity branch too. Two of these connect every pixel with every other.
    """

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.mix_row = nn.Linear(width, width)  # along the width
        self.mix_col = nn.Linear(height, height)  # along the height
        self.fuse = nn.Conv2d(3 * dim, dim, 1, bias=False)

    def forward(self, x):
        z = F.gelu(self.norm(x))
        row, col = self.mix_row, self.mix_col
        return sparse_mlp(z, row.weight, row.bias, col.weight, col.bias, self.fuse.weight.flatten(1))


class UnsharedSparseMLP(nn.Module):
    """For comparison: sMLP in which every row and every column has a matrix of its own."""

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        a, d = width**-0.5, height**-0.5  # bounds of nn.Linear's initialisation
        self.norm = nn.BatchNorm2d(dim)
        self.row_weight = nn.Parameter(torch.empty(height, width, width).uniform_(-a, a))
        self.row_bias = nn.Parameter(torch.empty(height, width).uniform_(-a, a))
        self.col_weight = nn.Parameter(torch.empty(width, height, height).uniform_(-d, d))
        self.col_bias = nn.Parameter(torch.empty(width, height).uniform_(-d, d))
        self.fuse = nn.Conv2d(3 * dim, dim, 1, bias=False)

    def forward(self, x):
        z = F.gelu(self.norm(x))
        row = torch.einsum("bchk,hwk->bchw", z, self.row_weight) + self.row_bias
        col = torch.einsum("bckw,whk->bchw", z, self.col_weight) + self.col_bias.mT
        return self.fuse(torch.cat([z, row, col], 1))


class DenseMLP(nn.Module):
    """For comparison: every pixel mixed with every other by one (HW, HW) matrix, in place of both sparse branches."""

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.mix = nn.Linear(height * width, height * width)
        self.fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x):
        z = F.gelu(self.norm(x))
        return self.fuse(torch.cat([z, self.mix(z.flatten(2)).view_as(z)], 1))


MIXINGS = {"sparse": SparseMLP, "unshared": UnsharedSparseMLP, "dense": DenseMLP}


class DepthwiseConv(nn.Module):
    """Local mixing: each pixel with its 3x3 neighbourhood."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x):
        return self.conv(F.gelu(self.norm(x)))


class SMLPBlock(nn.Module):
    """x = x + token_mix(x); x = x + channel_mix(x). Local and global mixing are one residual branch."""

    def __init__(self, dim: int, size: tuple[int, int], alpha: float, mixing: str, drop_path: float):
        super().__init__()
        self.local = DepthwiseConv(dim)
        self.smlp = MIXINGS[mixing](dim, *size)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * alpha))
        self.drop_path = DropPath(drop_path)

    def token_mix(self, x):
        return self.smlp(self.local(x))

    def channel_mix(self, x):
        x_BHWC = x.permute(0, 2, 3, 1)
        return self.mlp(self.norm(x_BHWC)).permute(0, 3, 1, 2)

    def forward(self, x):
        x = x + self.drop_path(self.token_mix(x))
        return x + self.drop_path(self.channel_mix(x))


class PatchEmbed(nn.Module):
    """Patches to vectors, with neither bias nor norm. Refuses images of any other size than its own."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, img_size: tuple[int, int]):
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, bias=False)

    def forward(self, x):
        height, width = x.shape[-2:]
        if (height, width) != self.img_size:
            raise ValueError(
                f"images of {height}x{width} pixels: this model was built for {self.img_size[0]}x{self.img_size[1]}, "
                f"its mixing matrices are that size. Resize them, or build the model with img_size=({height}, {width})"
            )
        return self.proj(x)


class SMLPStage(nn.Module):
    """Patch merging (a 2x2 convolution, except in the first stage), then blocks at one resolution."""

    def __init__(self, dim: int, drop_paths: Sequence[float], merge: bool, **block):
        super().__init__()
        self.downsample = nn.Conv2d(dim // 2, dim, 2, stride=2, bias=False) if merge else nn.Identity()
        self.blocks = nn.Sequential(*(SMLPBlock(dim, drop_path=rate, **block) for rate in drop_paths))
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SMLPNet(nn.Module):
    """Four stages of widths C, 2C, 4C, 8C at strides p, 2p, 4p, 8p for patch size p; no position encoding.

    The image size is part of the architecture: it sets the sides of the mixing matrices (56, 28, 14, 7 at 224),
    rounded down from stage to stage. `alpha` is the expansion of the channel MLP. `mixing` is "sparse", the
    paper's, or one of the comparisons "unshared" and "dense".
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 8, 14, 2),
        alpha: float = 3.0,
        mixing: str = "sparse",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        img_size = to_2tuple(img_size)
        smallest = patch_size * 2 ** (len(depths) - 1)
        if any(side % patch_size or side < smallest for side in img_size):
            raise ValueError(f"img_size={img_size}: both sides must be multiples of {patch_size}, {smallest} or more")
        if mixing not in MIXINGS:
            raise ValueError(f"mixing={mixing!r}; there are {', '.join(MIXINGS)}")
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        widths = [embed_dim * 2**s for s in range(len(depths))]
        strides = [patch_size * 2**s for s in range(len(depths))]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=stride, module=f"stages.{s}")
            for s, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, img_size)
        self.stages = nn.Sequential(*(
            SMLPStage(
                widths[s], rates[s], merge=s > 0,
                size=(img_size[0] // stride, img_size[1] // stride), alpha=alpha, mixing=mixing,
            )
            for s, stride in enumerate(strides)
        ))
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward_features(self, x):
        """(B, in_chans, H, W) -> (B, 8C, H/8p, W/8p), normalised."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x, pre_logits: bool = False):
        """Pools; (B, num_classes), or (B, 8C) with `pre_logits` or without classes."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    # What timm asks of a model -------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed", blocks=r"^stages\.(\d+)" if coarse else blocks)


def _build(variant: str, pretrained: bool, **kwargs) -> SMLPNet:
    from .official import convert

    return build_model_with_cfg(
        SMLPNet, variant, pretrained,
        pretrained_filter_fn=lambda weights, model: convert(weights.get("model", weights), model),
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


# img_size, embed_dim, depths, alpha, drop_path_rate, the authors' file: the released code.
VARIANTS = {
    "smlpnet_tiny": (224, 80, (2, 8, 14, 2), 3, 0.0, None),
    "smlpnet_small": (224, 96, (2, 10, 24, 2), 3, 0.2, "smlp_s"),
    "smlpnet_base": (224, 112, (2, 10, 24, 2), 3, 0.3, "smlp_b"),
    "smlpnet_micro": (32, 32, (1, 1, 3, 1), 2, 0.0, None),  # not in the paper: for tests and tiny runs
}
RELEASE = "https://github.com/microsoft/SPACH/releases/download/v1.0/{}.pth"

default_cfgs = generate_default_cfgs({
    f"{name}.in1k": dict(
        url=RELEASE.format(file) if file else "", input_size=(3, size, size), fixed_input_size=True,
        pool_size=(size // 32, size // 32), num_classes=1000, crop_pct=224 / 256, interpolation="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.proj", classifier="head.fc", license="mit",
    )
    for name, (size, *_, file) in VARIANTS.items()
})


def _register(name: str) -> None:
    size, dim, depths, alpha, drop_path, _ = VARIANTS[name]
    variant = dict(img_size=size, embed_dim=dim, depths=depths, alpha=alpha, drop_path_rate=drop_path)

    def create(pretrained: bool = False, **kwargs) -> SMLPNet:
        return _build(name, pretrained, **{**variant, **kwargs})

    create.__name__, create.__module__ = name, __name__
    globals()[name] = register_model(create)


for _name in VARIANTS:
    _register(_name)
