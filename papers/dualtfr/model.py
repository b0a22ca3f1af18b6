"""DualTFR: two branches of transformer blocks, one for the template and one for the search image, joined by attention.

Xie et al., "Learning Tracking Representations via Dual-Branch Fully Transformer Networks", ICCV Workshops 2021, arXiv
2112.02571. No code was published and the paper's text was not at hand: this is a reconstruction (README).
Shapes: B batch, C channels, H x W positions of a map, N = H W tokens, G windows of M tokens; images are BCHW, maps
BHWC, boxes (cx, cy, w, h) as fractions of the search crop. z is the template, x the search image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp, PatchEmbed, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import nn
from torchvision.ops import MLP

from common.run.timm import Backbone, imagenet_cfg, register
from papers.dualtfr.windows import local_attention_mask, merge, partition


class SelfAttention(nn.Module):
    """Multi-head attention of the tokens of a window among themselves: (B, G, M, C) -> (B, G, M, C).

    A bias for each head is learned for each offset between query and key, up to `max_offset` tokens along each axis;
    None: no bias.
    """

    def __init__(self, dim: int, num_heads: int, max_offset: int | None):
        super().__init__()
        self.num_heads, self.max_offset = num_heads, max_offset
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if max_offset is not None:
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * max_offset + 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self, h: int, w: int) -> torch.Tensor:
        """(heads, h w, h w): the table's entry at each pair's offset. A small window uses the table's center."""
        span, middle = 2 * self.max_offset + 1, self.max_offset
        table = self.relative_position_bias_table.view(span, span, self.num_heads)
        table = table[middle - h + 1 : middle + h, middle - w + 1 : middle + w]
        # [y, x, head, k, l] holds offset (y + k, x + l) from the corner; key row y' is k = h - 1 - y'
        bias = table.unfold(0, h, 1).unfold(1, w, 1).flip(3, 4)
        return bias.permute(2, 0, 1, 3, 4).reshape(self.num_heads, h * w, h * w)

    def forward(self, x_BGMC, window: tuple[int, int], visible: torch.Tensor | None):
        """`window`: its height and width, M tokens together; `visible` (G, M, M): which of them attend to which."""
        B, G, M, C = x_BGMC.shape
        qkv = self.qkv(x_BGMC).view(B, G, M, 3, self.num_heads, -1).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.reshape(3, B, G * self.num_heads, M, -1)
        bias = None if self.max_offset is None else self.position_bias(*window).expand(G, -1, -1, -1)
        if visible is not None:
            bias = visible[:, None] if bias is None else bias.masked_fill(~visible[:, None], -torch.inf)
        if bias is not None:
            bias = bias.expand(G, self.num_heads, M, M).reshape(1, G * self.num_heads, M, M)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.view(B, G, self.num_heads, M, -1).transpose(2, 3).reshape(B, G, M, C))


class CrossAttention(nn.Module):
    """Multi-head attention, queries from one image, keys and values from the other; positions play no part."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC, other_BHWC):
        """Maps of any two sizes -> (B, H, W, C), of the queries' size."""
        B, H, W, C = x_BHWC.shape
        q = self.q(x_BHWC).view(B, H * W, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(other_BHWC).view(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, H, W, C))


# The three kinds of block --------------------------------------------------------------------------------


class LAB(nn.Module):
    """Local attention block: Swin's. Attention within windows, which every second block moves by half a window.

    x = x + attention(norm(x)), x = x + MLP(norm(x)) on a BHWC map. A map no larger than the window is one window.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int, shift: int, mlp_ratio: float, drop_path: float,
        bias: bool = True,
    ):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, max_offset=window - 1 if bias else None)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """Sides of a window in a map of `size`."""
        return min(self.window, size[0]), min(self.window, size[1])

    def attention(self, x):
        size = x.shape[1], x.shape[2]
        window = self.extent(size)
        shift = tuple(self.shift if side > self.window else 0 for side in size)
        padded = any(side % w for side, w in zip(size, window))
        visible = local_attention_mask(size, window, shift, x.device) if any(shift) or padded else None
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        x = merge(self.attn(partition(x, window), window, visible), window, size)
        return x.roll(shift, (1, 2)) if any(shift) else x

    def forward(self, x):
        return checkpoint(self._forward, x) if self.grad_checkpointing else self._forward(x)

    def _forward(self, x):
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GAB(LAB):
    """Global attention block: the same with one window that covers the whole map.

    `grid` is the side of the largest map its table of offsets knows; a smaller one uses the table's center.
    """

    def __init__(self, dim: int, num_heads: int, *, grid: int, mlp_ratio: float, drop_path: float, bias: bool = True):
        super().__init__(
            dim, num_heads, window=grid, shift=0, mlp_ratio=mlp_ratio, drop_path=drop_path, bias=bias
        )

    def extent(self, size):
        if self.attn.max_offset is not None and max(size) > self.window:
            raise ValueError(
                f"a map of {size[0]}x{size[1]} tokens: the global blocks know offsets for at most "
                f"{self.window}x{self.window}; take smaller images, or build the network with a larger gab_grid"
            )
        return size


class CAB(nn.Module):
    """Cross attention block: x attends to the other image. Both directions share one block's weights."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.grad_checkpointing = False

    def forward(self, x, other):
        """Maps (B, H, W, C) of one image and of the other -> the first, updated."""
        return checkpoint(self._forward, x, other) if self.grad_checkpointing else self._forward(x, other)

    def _forward(self, x, other):
        x = x + self.attn(self.norm1(x), self.norm1(other))
        return x + self.mlp(self.norm2(x))


# One branch ----------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Patch merging (but in the first stage), by which 2x2 neighbours become one token of twice the width; then blocks
    at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[LAB]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.downsample(x))


class DualTFRBackbone(Backbone, nn.Module):
    """A branch up to the fusion: stages of widths C, 2C, 4C at strides p, 2p, 4p for patch size p, maps BHWC.

    With classes, the image classifier it is pre-trained as. `blocks` names each stage's kind of block; `gab_grid` is
    the side of the largest map that the GABs' tables of offsets know; without `gab_bias` they have no tables.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6),
        num_heads: Sequence[int] = (3, 6, 12),
        blocks: Sequence[str] = ("LAB", "LAB", "GAB"),
        window: int = 7,
        gab_grid: int = 14,
        gab_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        if unknown := set(blocks) - {"LAB", "GAB"}:
            raise ValueError(f"blocks {', '.join(sorted(unknown))}: expected LAB or GAB for each stage")
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        widths = [embed_dim * 2**s for s in range(len(depths))]

        def block(s: int, i: int) -> LAB:
            common = dict(mlp_ratio=mlp_ratio, drop_path=rates[s][i])
            if blocks[s] == "GAB":
                return GAB(widths[s], num_heads[s], grid=gab_grid, bias=gab_bias, **common)
            return LAB(widths[s], num_heads[s], window=window, shift=window // 2 if i % 2 else 0, **common)

        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False
        )
        self.stages = nn.Sequential(*(
            Stage(PatchMerging(widths[s - 1]) if s else nn.Identity(), [block(s, i) for i in range(depth)])
            for s, depth in enumerate(depths)
        ))
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.reduction = patch_size * 2 ** (len(depths) - 1)
        self.output_fmt = "NHWC"
        self.feature_info = [
            dict(num_chs=width, reduction=patch_size * 2**s, module=f"stages.{s}") for s, width in enumerate(widths)
        ]
        self.norm = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
        )
        self.apply(init_weights)

    def forward_features(self, x):
        """(B, in_chans, H, W) -> (B, H/4p, W/4p, 4C), normalised."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x, pre_logits: bool = False):
        """Pools; (B, num_classes), or (B, 4C) with `pre_logits` or without classes."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    # What timm asks of a model -------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, LAB):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


def init_weights(module: nn.Module) -> None:
    """Swin's: linear maps from a normal of 0.02 cut off at two deviations, biases 0. Convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Two branches --------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What every token of the search map says, row by row."""

    logits: torch.Tensor
    """(B, N, 2): target, background."""
    boxes: torch.Tensor
    """(B, N, 4): cx, cy, w, h of the target as fractions of the search crop, from its top left corner."""


class Head(nn.Module):
    """Two MLPs of three layers on each search token: is it the target, and where does the target lie.

    The box leaves through a sigmoid, as TransT's. With `reference_points` the token's own center is added to (cx, cy)
    before it, as in Deformable DETR, so that a token has only the offset of the target's center to say.
    """

    def __init__(self, dim: int, reference_points: bool):
        super().__init__()
        self.reference_points = reference_points
        self.cls, self.box = (MLP(dim, [dim, dim, n]) for n in (2, 4))

    def forward(self, x_BHWC) -> Prediction:
        logits, boxes = self.cls(x_BHWC), self.box(x_BHWC)
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))  # in bfloat16 a box is off by up to 1/512
        if self.reference_points:
            boxes = boxes + self.centers(*x_BHWC.shape[1:3], boxes)
        return Prediction(logits.flatten(1, 2), boxes.sigmoid().flatten(1, 2))

    @staticmethod
    def centers(H: int, W: int, like: torch.Tensor) -> torch.Tensor:
        """(H, W, 4): each token's center in the crop before the sigmoid, and zeros for the sides."""
        y, x = (((torch.arange(n, device=like.device) + 0.5) / n).logit().to(like.dtype) for n in (H, W))
        y, x = y[:, None].expand(H, W), x.expand(H, W)
        return torch.stack([x, y, torch.zeros_like(x), torch.zeros_like(x)], -1)


class Position(nn.Module):
    """Adds to each token the sines and cosines of its offset from the crop's center, counted in tokens.

    Both crops are centered where the target was last seen, and 112 px for 2 of its sides are the scale of 224 px for 4:
    one code serves both images. The branches themselves know offsets between tokens alone: without this, no template
    token could know that it is the target's, and no search token where it lies.
    """

    def forward(self, x_BHWC):
        _, H, W, C = x_BHWC.shape
        frequencies = 100 ** (-torch.arange(C // 4, device=x_BHWC.device) / (C // 4))
        codes = []
        for side in (H, W):
            angles = (torch.arange(side, device=x_BHWC.device) - (side - 1) / 2)[:, None] * frequencies
            codes.append(torch.cat([angles.sin(), angles.cos()], -1).to(x_BHWC.dtype))
        rows, columns = codes[0][:, None].expand(H, W, -1), codes[1].expand(H, W, -1)
        return x_BHWC + torch.cat([rows, columns], -1)


class DualTFR(nn.Module):
    """Both branches, with one set of weights, and the head on the search tokens.

    `cab_after` places the CABs: for each, how many blocks of the last stage stand before it. (3, 4, 5, 6) is one after
    each of the last four, () two branches that never meet; None: four after all blocks. `position` and
    `reference_points` are what this reconstruction adds (`Position`, `Head`). Other arguments: `DualTFRBackbone`'s.
    """

    def __init__(
        self, *, cab_after: Sequence[int] | None = None, reference_points: bool = True, position: bool = True,
        mlp_ratio: float = 4.0, **backbone,
    ):
        super().__init__()
        self.backbone = DualTFRBackbone(num_classes=0, mlp_ratio=mlp_ratio, **backbone)
        self.backbone.head = nn.Identity()
        last = self.backbone.stages[-1]
        cab_after = (len(last.blocks),) * 4 if cab_after is None else cab_after
        if list(cab_after) != sorted(cab_after) or any(not 0 <= n <= len(last.blocks) for n in cab_after):
            raise ValueError(f"cab_after {list(cab_after)}: expected numbers from 0 to {len(last.blocks)} in order")
        dim, heads = self.backbone.num_features, last.blocks[-1].attn.num_heads
        self.cab_after = tuple(cab_after)
        self.position = Position() if position else nn.Identity()
        self.cabs = nn.ModuleList(CAB(dim, heads, mlp_ratio=mlp_ratio) for _ in cab_after)
        self.head = Head(dim, reference_points)
        for module in (*self.cabs.modules(), *self.head.modules()):  # as in TransT and DETR
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def layers(self) -> list[nn.Module]:
        """All of the network but its head, in order."""
        *early, last = self.backbone.stages
        layers = [self.backbone.patch_embed, *early, last.downsample]
        first = min(self.cab_after, default=len(last.blocks))
        for n in range(len(last.blocks) + 1):
            if n == first:
                layers.append(self.position)
            layers += [cab for cab, after in zip(self.cabs, self.cab_after) if after == n]
            layers += list(last.blocks)[n : n + 1]
        return [*layers, self.backbone.norm]

    def encode(self, image_BCHW):
        """What of an image does not depend on the other: its map (B, H, W, C) where the first CAB begins.

        For the template of a tracker this is computed once per sequence.
        """
        x = image_BCHW
        for layer in self.layers():
            if isinstance(layer, CAB):
                break
            x = layer(x)
        return x

    def fuse(self, z, x, both: bool = False):
        """`encode`'s maps of template and search image -> the search map (B, H, W, C), normalised.

        With `both`, the pair (template map, search map); else the template's tokens end where nothing reads them any
        more, which changes no result. Both directions of a CAB see the maps as they were before it.
        """
        layers = self.layers()
        crossings = [i for i, layer in enumerate(layers) if isinstance(layer, CAB)]
        for i in range(crossings[0], len(layers)) if crossings else ():
            layer, read = layers[i], both or i < crossings[-1]
            if i in crossings:
                z, x = layer(z, x) if read else z, layer(x, z)
            else:
                z, x = layer(z) if read else z, layer(x)
        return (z, x) if both else x

    def predict(self, z, search_BCHW) -> Prediction:
        """`encode`'s template and a search crop -> what its tokens say."""
        return self.head(self.fuse(z, self.encode(search_BCHW)))

    def forward(self, template, search) -> Prediction:
        """Template (B, 3, 112, 112) and search crop (B, 3, 224, 224), normalised."""
        return self.predict(self.encode(template), search)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)
        for cab in self.cabs:
            cab.grad_checkpointing = enable


# Variants ------------------------------------------------------------------------------------------------

VARIANTS = {
    "dualtfr": {},
    # For tests and tiny runs: template 32, search 64 pixels.
    "dualtfr_micro": dict(
        patch_size=2, embed_dim=16, num_heads=(1, 2, 4), depths=(2, 2, 2), window=4, gab_grid=8, mlp_ratio=2.0,
        drop_path_rate=0.0,
    ),
}


def create_tracker(variant: str, **changes) -> DualTFR:
    """The tracking network of a variant. `changes` are arguments of `DualTFR` and `DualTFRBackbone`."""
    return DualTFR(**VARIANTS[variant] | changes)


default_cfgs = generate_default_cfgs({
    f"{name}.untrained": imagenet_cfg(side, first_conv="patch_embed.proj")
    for name, side in (("dualtfr", 224), ("dualtfr_micro", 64))
})
register(DualTFRBackbone, VARIANTS, levels=lambda arguments: len(arguments.get("depths", (2, 2, 6))))
