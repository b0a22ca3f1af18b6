"""sMLPNet: a pyramid without attention, whose tokens mix only along their own row and their own column.

Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", AAAI 2022, arXiv 2109.05422.
Shapes: B batch, C channels, H height, W width; maps are BCHW, and BHWC inside the channel MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs, register_notrace_function
from torch import nn

from common.kernels.sparse_mlp import sparse_mlp
from common.run.timm import Pyramid, imagenet_cfg, of_size, register, tagged

register_notrace_function(sparse_mlp)  # a symbolic trace calls it as it is


class SparseMLP(nn.Module):
    """The paper's sMLP: global mixing for W + H weights per pixel instead of W * H.

    All branches read the activated z, the identity branch too. Two of these connect every pixel with every other.
    """

    AXES = {"mix_row.weight": "WW", "mix_row.bias": "W", "mix_col.weight": "HH", "mix_col.bias": "H"}

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.grid = (height, width)
        self.norm = nn.BatchNorm2d(dim)
        self.mix_row = nn.Linear(width, width)  # along the width
        self.mix_col = nn.Linear(height, height)  # along the height
        self.proj = nn.Conv2d(3 * dim, dim, 1, bias=False)

    def forward(self, x):
        z = F.gelu(self.norm(x))
        row, col = self.mix_row, self.mix_col
        return sparse_mlp(z, row.weight, row.bias, col.weight, col.bias, self.proj.weight.flatten(1))


class UnsharedSparseMLP(nn.Module):
    """For comparison: sMLP in which every row and every column has a matrix of its own."""

    AXES = {"row_weight": "HWW", "row_bias": "HW", "col_weight": "WHH", "col_bias": "WH"}

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.grid = (height, width)
        a, d = width**-0.5, height**-0.5  # bounds of nn.Linear's initialisation
        self.norm = nn.BatchNorm2d(dim)
        self.row_weight = nn.Parameter(torch.empty(height, width, width).uniform_(-a, a))
        self.row_bias = nn.Parameter(torch.empty(height, width).uniform_(-a, a))
        self.col_weight = nn.Parameter(torch.empty(width, height, height).uniform_(-d, d))
        self.col_bias = nn.Parameter(torch.empty(width, height).uniform_(-d, d))
        self.proj = nn.Conv2d(3 * dim, dim, 1, bias=False)

    def forward(self, x):
        z = F.gelu(self.norm(x))
        row = torch.einsum("bchk,hwk->bchw", z, self.row_weight) + self.row_bias
        col = torch.einsum("bckw,whk->bchw", z, self.col_weight) + self.col_bias.transpose(0, 1)
        return self.proj(torch.cat([z, row, col], 1))


class DenseMLP(nn.Module):
    """For comparison: every pixel mixed with every other by one (HW, HW) matrix, in place of both sparse branches."""

    AXES = {"mix.weight": ("HW", "HW"), "mix.bias": ("HW",)}

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.grid = (height, width)
        self.norm = nn.BatchNorm2d(dim)
        self.mix = nn.Linear(height * width, height * width)
        self.proj = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x):
        z = F.gelu(self.norm(x))
        return self.proj(torch.cat([z, self.mix(z.flatten(2)).view_as(z)], 1))


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
        return self.proj(of_size(x, self.img_size, "its mixing matrices are that size"))


class SMLPStage(nn.Module):
    """Patch merging (a 2x2 convolution, except in the first stage), then blocks at one resolution."""

    def __init__(self, dim: int, drop_paths: Sequence[float], merge: bool, **block):
        super().__init__()
        self.downsample = nn.Conv2d(dim // 2, dim, 2, stride=2, bias=False) if merge else nn.Identity()
        self.blocks = nn.Sequential(*(SMLPBlock(dim, drop_path=rate, **block) for rate in drop_paths))
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SMLPNet(Pyramid):
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
        widths = [embed_dim * 2**s for s in range(len(depths))]
        strides = [patch_size * 2**s for s in range(len(depths))]
        super().__init__(in_chans, num_classes, widths, strides)
        img_size = to_2tuple(img_size)
        self.check_size(img_size)
        if mixing not in MIXINGS:
            raise ValueError(f"mixing={mixing!r}; there are {', '.join(MIXINGS)}")
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
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

    def check_size(self, img_size):
        patch_size, smallest = self.strides[0], self.strides[-1]
        if any(side % patch_size or side < smallest for side in img_size):
            raise ValueError(f"img_size={img_size}: both sides must be multiples of {patch_size}, {smallest} or more")

    def no_weight_decay(self) -> set[str]:
        """The unshared biases, which have two axes and would decay where the paper's do not."""
        return {name for name, _ in self.named_parameters() if name.endswith(("row_bias", "col_bias"))}


# The authors' tensors --------------------------------------------------------------------------------------

# Theirs -> ours, after "token_mix.{j}" and "channel_mix.{j}" have become a block. Their proj_h mixes along the width:
# it is the row mixer. (Exchanging the two goes unnoticed by shapes alone.)
NAMES = {
    "token.0.conv_merge.BN.": "local.norm.",
    "token.0.conv_merge.Conv.": "local.conv.",
    "token.1.BN.": "smlp.norm.",
    "token.1.proj_h.": "smlp.mix_row.",
    "token.1.proh_w.": "smlp.mix_col.",
    "token.1.fuse.": "smlp.proj.",
    "channel.1.": "norm.",
    "channel.2.net.0.": "mlp.fc1.",
    "channel.2.net.3.": "mlp.fc2.",
}


def rename(name: str, model: nn.Module) -> str:
    """Our name of the authors' tensor; a name that is not theirs is returned unchanged."""
    blocks = [f"stages.{s}.blocks.{b}." for s, stage in enumerate(model.stages) for b in range(len(stage.blocks))]
    if found := re.match(r"(token|channel)_mix\.(\d+)\.", name):  # they count blocks over the whole network
        kind, block = found[1], int(found[2])
        inner = f"{kind}.{name[found.end():]}"
        for theirs, ours in NAMES.items():
            if inner.startswith(theirs) and block < len(blocks):
                return blocks[block] + ours + inner.removeprefix(theirs)
    name = re.sub(r"^to_patch_embedding\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^to_patch_embedding\.(\d+)\.0\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^batch_norm\.", "norm.", name)
    return re.sub(r"^mlp_head\.0\.", "head.fc.", name)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' tensors under the names of `model`, their S x S x 1 x 1 mixing kernels as matrices."""
    weights = {rename(name, model): tensor for name, tensor in state_dict.items()}
    for name, tensor in weights.items():
        if name.endswith(("mix_row.weight", "mix_col.weight")) and tensor.shape[2:] == (1, 1):
            weights[name] = tensor.flatten(1)
    return weights


# Variants --------------------------------------------------------------------------------------------------

# img_size, embed_dim, depths, alpha, drop_path_rate, the authors' file: the released code.
VARIANTS = {
    "smlpnet_tiny": (224, 80, (2, 8, 14, 2), 3, 0.0, None),
    "smlpnet_small": (224, 96, (2, 10, 24, 2), 3, 0.2, "smlp_s"),
    "smlpnet_base": (224, 112, (2, 10, 24, 2), 3, 0.3, "smlp_b"),
    # Not in the paper: for tests and tiny runs, and of the weights that travel with this folder.
    "smlpnet_micro": (32, 32, (1, 1, 3, 1), 2, 0.0, None),
    "smlpnet_mini": (64, 32, (2, 2, 3, 2), 3, 0.0, None),
}
PAPER = dict(
    paper_name="Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", paper_ids="arXiv:2109.05422",
    origin_url="https://github.com/microsoft/SPACH", license="mit",
)
RELEASE = "https://github.com/microsoft/SPACH/releases/download/v1.0/{}.pth"



def _cfg(name: str) -> dict[str, dict]:
    size, *_, file = VARIANTS[name]
    return tagged("smlpnet", name, imagenet_cfg(
        size, url=RELEASE.format(file) if file else "", fixed_input_size=True, pool_size=(size // 32, size // 32),
        first_conv="patch_embed.proj", **PAPER,
    ))


default_cfgs = generate_default_cfgs({tag: cfg for name in VARIANTS for tag, cfg in _cfg(name).items()})
FIELDS = ("embed_dim", "depths", "alpha", "drop_path_rate")  # timm passes the image size, its own or an overlay's
register(SMLPNet, {name: dict(zip(FIELDS, row[1:])) for name, row in VARIANTS.items()}, convert=checkpoint_filter_fn)
