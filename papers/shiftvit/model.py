"""ShiftViT: a hierarchical vision transformer whose attention is replaced by moving channels by one pixel.

Wang et al., "When Shift Operation Meets Vision Transformer", AAAI 2022, arXiv 2201.10801.
Shapes: B batch, C channels, H height, W width; maps are BCHW throughout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models import checkpoint_seq, generate_default_cfgs, register_notrace_function
from torch import nn

from common.kernels.shift import shift
from common.run.timm import Pyramid, imagenet_cfg, register, tagged
from papers.shiftvit.norm import GroupNorm1

register_notrace_function(shift)  # a symbolic trace calls it as it is


class ShiftBlock(nn.Module):
    """x = shift(x); x = x + MLP(norm(x)). The shift has no parameters and does no arithmetic (paper, section 3).

    The shortcut carries the *shifted* map: nothing moves the channels back.
    """

    def __init__(self, dim: int, n_div: int, mlp_ratio: float, drop_path: float, norm_layer, act_layer):
        super().__init__()
        self.n_div = n_div
        self.norm = norm_layer(dim)
        self.norm.before_convolution = True
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, use_conv=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = shift(x, self.n_div)
        return x + self.drop_path(self.mlp(self.norm(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors: (B, in_chans, H, W) -> (B, dim, H/patch, W/patch)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm_layer):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = norm_layer(dim) if norm_layer else nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    """Halves the map and doubles the width: (B, C, H, W) -> (B, 2C, H/2, W/2)."""

    def __init__(self, dim: int, norm_layer):
        super().__init__()
        self.norm = norm_layer(dim)
        self.norm.before_convolution = True
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(x))


class ShiftStage(nn.Module):
    """Patch merging (except in the first stage), then blocks at one resolution."""

    def __init__(self, dim: int, drop_paths: Sequence[float], merge: bool, norm_layer, **block):
        super().__init__()
        self.downsample = PatchMerging(dim // 2, norm_layer) if merge else nn.Identity()
        self.blocks = nn.Sequential(
            *(ShiftBlock(dim, drop_path=rate, norm_layer=norm_layer, **block) for rate in drop_paths)
        )
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ShiftViT(Pyramid):
    """Four stages of widths C, 2C, 4C, 8C at strides p, 2p, 4p, 8p for patch size p; no position encoding.

    Any input size works; sides that do not divide lose the remainder. `n_div` sets the share of channels that
    move, 4 / n_div. Layers are named as timm names them: `norm_layer` "groupnorm1" (the paper's "LayerNorm", taken
    over channels and positions) or "batchnorm2d", `act_layer` "gelu" (exact) or "relu".
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        patch_norm: bool = True,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        n_div: int = 12,
        norm_layer: str = "groupnorm1",
        act_layer: str = "gelu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        widths = [embed_dim * 2**s for s in range(len(depths))]
        super().__init__(in_chans, num_classes, widths, [patch_size * 2**s for s in range(len(depths))])
        norm = GroupNorm1 if norm_layer == "groupnorm1" else get_norm_layer(norm_layer)
        act = get_act_layer(act_layer)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm if patch_norm else None)
        self.stages = nn.Sequential(*(
            ShiftStage(width, rates[s], merge=s > 0, n_div=n_div, mlp_ratio=mlp_ratio, norm_layer=norm, act_layer=act)
            for s, width in enumerate(widths)
        ))
        self.norm = norm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# The authors' tensors --------------------------------------------------------------------------------------

# Theirs -> ours. Their patch merging ends a stage, ours begins the next.
NAMES = [
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm2\.", r"stages.\1.blocks.\2.norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(
    state_dict: Mapping[str, torch.Tensor], model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Renames the authors' tensors; names that are not theirs pass unchanged."""
    weights = {}
    for name, tensor in state_dict.items():
        for pattern, ours in NAMES:
            name, found = re.subn(pattern, ours, name)
            if found:
                break
        weights[name] = tensor
    return weights


# Variants --------------------------------------------------------------------------------------------------

# embed_dim, depths, mlp_ratio, n_div, drop_path_rate, the authors' file: the paper's table 1 and the released code.
# "light" keeps Swin's depths; r2 and r4 spend the compute saved on attention on depth, at MLP ratio 2 or 4.
VARIANTS = {
    "shiftvit_light_tiny": (96, (2, 2, 6, 2), 4, 12, 0.2, "shiftvit_tiny_light"),
    "shiftvit_r2_tiny": (96, (6, 8, 18, 6), 2, 12, 0.2, "shiftvit_tiny_r2"),
    "shiftvit_r4_tiny": (96, (2, 2, 12, 3), 4, 12, 0.2, None),
    "shiftvit_light_small": (96, (2, 2, 18, 2), 4, 12, 0.4, "shiftvit_small_light"),
    "shiftvit_r2_small": (96, (10, 18, 36, 10), 2, 12, 0.4, "shiftvit_small_r2"),
    "shiftvit_r4_small": (96, (2, 6, 24, 4), 4, 12, 0.4, None),
    "shiftvit_light_base": (128, (2, 2, 18, 2), 4, 16, 0.5, None),
    "shiftvit_r2_base": (128, (10, 18, 36, 10), 2, 16, 0.6, None),
    "shiftvit_r4_base": (128, (4, 6, 22, 4), 4, 16, 0.5, None),
    # Not in the paper: for tests and tiny runs, and of the weights that travel with this folder.
    "shiftvit_micro": (32, (1, 1, 3, 1), 2, 12, 0.0, None),
    "shiftvit_mini": (32, (3, 4, 9, 3), 2, 12, 0.0, None),
}
SIZES_PX = {"shiftvit_mini": 64}
PAPER = dict(
    paper_name="When Shift Operation Meets Vision Transformer", paper_ids="arXiv:2201.10801",
    origin_url="https://github.com/microsoft/SPACH", license="mit",
)
RELEASE = "https://github.com/microsoft/SPACH/releases/download/v1.0/{}.pth"



def _cfg(name: str) -> dict[str, dict]:
    size, file = SIZES_PX.get(name, 224), VARIANTS[name][-1]
    return tagged("shiftvit", name, imagenet_cfg(
        size, url=RELEASE.format(file) if file else "", pool_size=(size // 32, size // 32),
        first_conv="patch_embed.proj", **PAPER,
    ))


default_cfgs = generate_default_cfgs({tag: cfg for name in VARIANTS for tag, cfg in _cfg(name).items()})
FIELDS = ("embed_dim", "depths", "mlp_ratio", "n_div", "drop_path_rate")
register(ShiftViT, {name: dict(zip(FIELDS, row)) for name, row in VARIANTS.items()}, convert=checkpoint_filter_fn)
