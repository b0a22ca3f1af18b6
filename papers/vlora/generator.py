"""The perceptual weights generator (section 3.3): visual features -> a low-rank factor for each changed weight.

I images, V visual features of width D; h width of the generator, K perceptual queries of each of its G
sub-generators; T weight types, S sites (the changed layers), r rank, d width of the language model, o width of a
changed module's output.
The G sub-generators differ in their weights only, so each of their layers is one batched product over all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration import VLoRAConfig


class GroupedLinear(nn.Module):
    """G linear layers at once: (G, ..., i) -> (G, ..., o)."""

    def __init__(self, groups: int, width_in: int, width_out: int, xavier_out: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(groups, width_out))
        # Attention's input projections are one Xavier-uniform matrix of this many rows in the authors' code.
        self.xavier_out = xavier_out

    def forward(self, x):
        rows = x.flatten(1, -2)
        return torch.baddbmm(self.bias[:, None], rows, self.weight.mT).view(*x.shape[:-1], -1)

    def reset_parameters(self) -> None:
        if self.xavier_out:
            bound = math.sqrt(6 / (self.weight.shape[2] + self.xavier_out))
            init.uniform_(self.weight, -bound, bound)
        else:
            init.trunc_normal_(self.weight, std=0.02)
        init.zeros_(self.bias)


class CrossAttention(GroupedLinear):
    """Keys' and values' projection (G, 2 h, h) of attention to image features, and the attention itself.

    Computed as (q Wk) f instead of q (Wk f), and Wv times the mean of f instead of the mean of Wv f:
    keys and values of the features, most of the generator's work, are never formed, and all groups and heads are
    queries of one attention over the features as they are. The keys' bias would move all scores of a query alike.
    """

    def forward(self, q, image, heads: int):
        """Queries (G, I, K, h), features of their image (I, V, h) -> (G, I, K, h)."""
        G, h = len(q), q.shape[-1]
        Wk, Wv = self.weight.view(G, 2, heads, -1, h).unbind(1)
        q = torch.einsum("gikmc,gmch->igkmh", q.unflatten(-1, (heads, -1)), Wk)
        image, scale = image[:, None], (h // heads) ** -0.5
        seen = F.scaled_dot_product_attention(q.flatten(1, 3)[:, None], image, image, scale=scale).view(q.shape)
        return torch.einsum("igkmh,gmch->gikmc", seen, Wv).flatten(3) + self.bias[:, None, None, h:]


class GroupedLayerNorm(nn.Module):
    """G layer norms at once: (G, I, K, h) -> (G, I, K, h)."""

    def __init__(self, groups: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, 1, 1, width))
        self.bias = nn.Parameter(torch.zeros(groups, 1, 1, width))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-5), self.weight)


class GeneratorBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the image, feed-forward; pre-norm, no dropout."""

    def __init__(self, groups: int, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (GroupedLayerNorm(groups, width) for _ in range(3))
        self.self_qkv = GroupedLinear(groups, width, 3 * width, xavier_out=3 * width)
        self.self_out = GroupedLinear(groups, width, width)
        self.cross_q = GroupedLinear(groups, width, width, xavier_out=3 * width)
        self.cross_kv = CrossAttention(groups, width, 2 * width, xavier_out=3 * width)
        self.cross_out = GroupedLinear(groups, width, width)
        self.linear1 = GroupedLinear(groups, width, mlp_ratio * width)
        self.linear2 = GroupedLinear(groups, mlp_ratio * width, width)

    def forward(self, x, image):
        """Queries x (G, I, K, h), image (I, V, h) -> (G, I, K, h). The image is not normalised, and not changed."""
        x = x + self.self_out(self.self_attention(*self.self_qkv(self.norm1(x)).chunk(3, -1)))
        x = x + self.cross_out(self.cross_kv(self.cross_q(self.norm2(x)), image, self.heads))
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))

    def self_attention(self, q, k, v):
        """Of q, k and v (G, I, K, h), among themselves in each image and sub-generator -> (G, I, K, h)."""
        G = q.shape[0]
        q, k, v = (x.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (G, -1))


class PerceptualWeightsGenerator(nn.Module):
    """Visual features (I, V, D) -> A (I, T, S, d, r) generated, and for each type (α / r)·B (S, o, r) learned."""

    def __init__(self, config: VLoRAConfig, widths_out: dict[str, int]):
        super().__init__()
        T, S, h, d = len(config.weight_types), len(config.sites), config.width, config.text_config.hidden_size
        G, K = (T, S) if config.separate else (1, T * S)
        self.shape, self.scale, self.types = (T, S, d, config.rank), config.alpha / config.rank, config.weight_types
        self.visual_proj = nn.Linear(config.visual_width, h)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_features, h))
        self.queries = nn.Parameter(torch.empty(G, 1, K, h))
        self.blocks = nn.ModuleList(GeneratorBlock(G, h, config.heads, config.mlp_ratio) for _ in range(config.blocks))
        self.norm = GroupedLayerNorm(G, h)
        self.weights_head = GroupedLinear(G, h, d * config.rank)  # the paper's shared linear layer
        for letter in config.weight_types:  # the paper's k independent linear layers
            self.register_parameter(f"B_{letter}", nn.Parameter(torch.zeros(S, widths_out[letter], config.rank)))

    def forward(self, features_IVD):
        if features_IVD is None:
            return None, self.learned()
        features_IVD = features_IVD.to(self.pos_embed.dtype)  # the frozen tower may be of another
        image = self.visual_proj(features_IVD) + self.pos_embed
        x = self.queries.repeat(1, len(features_IVD), 1, 1)
        for block in self.blocks:
            x = block(x, image)
        A = self.weights_head(self.norm(x))  # (G, I, K, d r), types before sites
        return A.transpose(0, 1).reshape(-1, *self.shape), self.learned()

    def learned(self) -> tuple[torch.Tensor, ...]:
        if self.pos_embed.is_meta:  # offloaded: its weights are there while it is called, and at no other time
            return self(None)[1]
        return tuple(getattr(self, f"B_{letter}") * self.scale for letter in self.types)

    def reset_parameters(self) -> None:
        init.normal_(self.pos_embed)
        init.normal_(self.queries)
        for letter in self.types:
            init.zeros_(getattr(self, f"B_{letter}"))  # so the model starts as the plain LLM
