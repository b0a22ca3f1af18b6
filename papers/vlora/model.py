"""VLoRA: an image becomes low-rank weights of a language model, instead of tokens of its input.

Ma et al., "Visual Perception by Large Language Model's Weights", NeurIPS 2024, arXiv 2405.20339.

B rows of a batch, I images, L tokens, d width of the LLM, o width of a changed module's output; V visual features of
width D; h width of the generator, K perceptual queries of each of its G sub-generators; T weight types, S sites (the
changed layers), r rank. A weight's change is ΔW = (α / r) B Aᵀ: A (d, r) generated from the image, B (o, r) learned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from common.run import UserError
from papers.vlora import merging
from papers.vlora.vision_language import VisionLanguageConfig, VisionLanguageModel, positions

# Where each weight type acts in a decoder layer. "m" acts on the whole MLP branch, in parallel.
MODULES = {letter: f"self_attn.{letter}_proj" for letter in "qkvo"} | {"m": "mlp"}


class VLoRAConfig(VisionLanguageConfig):
    """The defaults are the authors' 7B setting.

    width h, blocks N, heads and mlp_ratio of the perceptual weights generator; rank r; alpha α; weight_types, a choice
    of the letters q, k, v, o, m; separate, one sub-generator for each type instead of one for all; every, the layer
    spacing: layer i (from 0) is changed when (i + 1) % every == 0.
    """

    model_type = "vlora"

    width: int = 512
    blocks: int = 8
    heads: int = 16
    mlp_ratio: int = 4
    rank: int = 64
    alpha: float = 64
    weight_types: str = "qkvom"
    separate: bool = True
    every: int = 4

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layers, letters = self.text_config.num_hidden_layers, self.weight_types
        if not letters or set(letters) - set(MODULES) or len(set(letters)) < len(letters):
            raise UserError(f"weight_types={self.weight_types!r} must be different letters of {''.join(MODULES)!r}")
        if layers % self.every:
            raise UserError(f"the LLM's {layers} layers are not a multiple of every={self.every}")
        if self.width % self.heads:
            raise UserError(f"the generator's width={self.width} is not a multiple of its {self.heads} heads")

    @property
    def sites(self) -> list[int]:
        """Layers that get perceptual weights, S of them."""
        return list(range(self.every - 1, self.text_config.num_hidden_layers, self.every))


# The perceptual weights generator (section 3.3) ------------------------------------------------------------
#
# The G sub-generators differ in their weights only, so each of their layers is one batched product over all of them.


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
        self.cross_kv = GroupedLinear(groups, width, 2 * width, xavier_out=3 * width)
        self.cross_out = GroupedLinear(groups, width, width)
        self.linear1 = GroupedLinear(groups, width, mlp_ratio * width)
        self.linear2 = GroupedLinear(groups, mlp_ratio * width, width)

    def forward(self, x, image):
        """Queries x (G, I, K, h), image (I, V, h) -> (G, I, K, h). The image is not normalised, and not changed."""
        x = x + self.self_out(self.self_attention(*self.self_qkv(self.norm1(x)).chunk(3, -1)))
        x = x + self.cross_out(self.cross_attention(self.cross_q(self.norm2(x)), image))
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))

    def self_attention(self, q, k, v):
        """Of q, k and v (G, I, K, h), among themselves in each image and sub-generator -> (G, I, K, h)."""
        G = q.shape[0]
        q, k, v = (x.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (G, -1))

    def cross_attention(self, q, image):
        """Of queries (G, I, K, h) to the features of their image (I, V, h) -> (G, I, K, h).

        Computed as (q Wk) f instead of q (Wk f), and Wv times the mean of f instead of the mean of Wv f:
        keys and values of the features, most of the generator's work, are never formed, and all groups and heads are
        queries of one attention over the features as they are. The keys' bias would move all scores of a query alike.
        """
        G, h = len(q), q.shape[-1]
        Wk, Wv = self.cross_kv.weight.view(G, 2, self.heads, -1, h).unbind(1)
        q = torch.einsum("gikmc,gmch->igkmh", q.unflatten(-1, (self.heads, -1)), Wk)
        image, scale = image[:, None], (h // self.heads) ** -0.5
        seen = F.scaled_dot_product_attention(q.flatten(1, 3)[:, None], image, image, scale=scale).view(q.shape)
        return torch.einsum("igkmh,gmch->gikmc", seen, Wv).flatten(3) + self.cross_kv.bias[:, None, None, h:]


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
        features_IVD = features_IVD.to(self.pos_embed.dtype)  # the frozen tower may be of another
        image = self.visual_proj(features_IVD) + self.pos_embed
        x = self.queries.repeat(1, len(features_IVD), 1, 1)
        for block in self.blocks:
            x = block(x, image)
        A = self.weights_head(self.norm(x))  # (G, I, K, d r), types before sites
        return A.transpose(0, 1).reshape(-1, *self.shape), self.learned()

    def learned(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, f"B_{letter}") * self.scale for letter in self.types)

    def reset_parameters(self) -> None:
        init.normal_(self.pos_embed)
        init.normal_(self.queries)
        for letter in self.types:
            init.zeros_(getattr(self, f"B_{letter}"))  # so the model starts as the plain LLM


# The language model with perceptual weights (section 3.2) --------------------------------------------------


class Factors:
    """The perceptual weights in force, for all `Site`s of a model to read.

    Where gradients are taken they stay until the next forward pass: gradient checkpointing reads them in the backward.
    """

    def __init__(self):
        self.A: torch.Tensor | None = None  # (B, T, S, d, r), or one row for all; None: the plain LLM
        self.B: tuple[torch.Tensor, ...] = ()  # for each type (S, o, r), times α / r
        self.merged = False  # q, k, v and o are in the weights already

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Factors())  # a copied model starts without an image


class Site:
    """Forward hook of a changed module: y = module(x) + (x A) Bᵀ α / r, each row of the batch with its own A."""

    def __init__(self, factors: Factors, module: nn.Module, letter: str, type_index: int, site_index: int):
        self.factors, self.module, self.letter, self.index = factors, module, letter, (type_index, site_index)

    def __call__(self, module, inputs, output):
        factors, (t, s) = self.factors, self.index
        if factors.A is None or (factors.merged and self.letter != "m"):
            return None
        x = inputs[0]
        return output + (x @ factors.A[:, t, s].to(x.dtype)) @ factors.B[t][s].mT.to(x.dtype)


class VLoRAForConditionalGeneration(VisionLanguageModel):
    """Any LLaMA-like causal LM whose weights see an image. Its modelling code is transformers' own, with hooks."""

    config_class = VLoRAConfig

    def __init__(self, config: VLoRAConfig, **parts: Any):
        super().__init__(config, **parts)
        self.factors, self.sites, widths = Factors(), [], {}
        layers = self.language_model.get_decoder().layers
        for t, letter in enumerate(config.weight_types):
            for s, i in enumerate(config.sites):
                module = self._module(layers[i], letter)
                self.sites.append(Site(self.factors, module, letter, t, s))
                module.register_forward_hook(self.sites[-1])
            widths[letter] = getattr(module, "out_features", config.text_config.hidden_size)
        self.generator = PerceptualWeightsGenerator(config, widths)
        self.post_init()

    def _module(self, layer: nn.Module, letter: str) -> nn.Module:
        d = self.config.text_config.hidden_size
        try:
            module = layer.get_submodule(MODULES[letter])
        except AttributeError:
            raise UserError(f"weight type {letter!r} needs {MODULES[letter]} in a {type(layer).__name__}") from None
        if getattr(module, "in_features", d) != d:
            raise UserError(f"weight type {letter!r}: {MODULES[letter]} takes width {module.in_features}, not {d}")
        return module

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GroupedLinear | PerceptualWeightsGenerator):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        perceptual_weights: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Rows of text with at most one placeholder each -> logits (B, L, vocabulary), and the loss if `labels`.

        input_ids (B, L). pixel_values (I, 3, H, W): images in the order of their placeholders; rows without a
        placeholder are computed by the plain LLM. attention_mask (B, L), 1 for tokens, placeholders included, 0 for
        padding on either side; once a cache is in use, (B, everything so far) with 0 at the placeholders.
        perceptual_weights (B, T, S, d, r), or one row for all, instead of images: what `perceive` returns.
        Further arguments go to the language model.
        """
        if not self.factors.merged:
            self.factors.A, self.factors.B = self._factors(input_ids, pixel_values, perceptual_weights)
        input_ids, attention_mask, position_ids = self._without_placeholders(
            input_ids, attention_mask, position_ids, past_key_values
        )
        out = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, labels=labels, **kwargs,
        )
        if not (self.factors.merged or torch.is_grad_enabled()):
            self.factors.A = None  # no backward pass will ask, and the language model alone is plain again
        return out

    def _factors(self, input_ids, pixel_values, perceptual_weights) -> tuple[torch.Tensor | None, tuple]:
        if perceptual_weights is not None:
            return perceptual_weights, self.generator.learned()
        if pixel_values is not None:
            if input_ids.device.type == "cpu":  # elsewhere it would wait; the processor has counted already
                self.check_images(input_ids, pixel_values)
            return self._rows(input_ids, *self.generator(self.visual_features(pixel_values)))
        if self.training:  # all processes of a parallel training must use all parameters
            A, B = self.generator(self.no_features())
            return 0 * A, B
        return None, ()

    def _rows(self, input_ids, A, B):
        """Factors of images -> factors of rows, 0 without an image."""
        marks = self.placeholders(input_ids).sum(1)
        row = torch.arange(len(input_ids), device=A.device).repeat_interleave(marks, output_size=len(A))
        return A.new_zeros(len(input_ids), *A.shape[1:]).index_add(0, row, A), B

    def _without_placeholders(self, input_ids, attention_mask, position_ids, past_key_values):
        """A placeholder keeps its position and becomes token 0, which no later token sees."""
        marks = self.placeholders(input_ids)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if position_ids is None and attention_mask.dim() == 2:
                position_ids = positions(attention_mask)
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            attention_mask = attention_mask.masked_fill(marks, 0)
        return input_ids.masked_fill(marks, 0), attention_mask, position_ids

    def prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None,
        keep: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What decoding needs of a prompt: tokens, mask and positions (B, L - placeholders of a row).

        No token sees a placeholder's slot, so it is left out, and leaves a gap in the positions. It stays, as token 0
        (its id need not be in the vocabulary), with `keep`, or where rows would differ in length or go on from it.
        """
        marks = self.placeholders(input_ids)
        position_ids = positions(attention_mask) if position_ids is None else position_ids.expand_as(input_ids)
        if not keep and (marks.sum(1) == marks[0].sum()).all() and not marks[:, -1].any():
            return tuple(x[~marks].view(len(x), -1) for x in (input_ids, attention_mask, position_ids))
        return input_ids.masked_fill(marks, 0), attention_mask.masked_fill(marks, 0), position_ids

    def perceive(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The perceptual weights of a batch's rows, (B, T, S, d, r): all that is needed of its images."""
        self.check_images(input_ids, pixel_values)
        return self._rows(input_ids, *self.generator(self.visual_features(pixel_values)))[0]

    def delta(self, perceptual_weights: torch.Tensor, site: Site) -> torch.Tensor:
        """ΔW (o, d) of a changed module, for the first row of `perceptual_weights`."""
        t, s = site.index
        return self.generator.learned()[t][s] @ perceptual_weights[0, t, s].mT

    @contextlib.contextmanager
    @torch.no_grad()
    def merged(self, perceptual_weights: torch.Tensor) -> Iterator[None]:
        """Within, one image's weights (1, T, S, d, r) are in force for every row: q, k, v and o hold W + ΔW.

        There is no weight to merge m into, so its product stays beside the MLP. On leaving, the weights are the very
        tensors they were.
        """
        if len(perceptual_weights) != 1:
            raise UserError(f"one image's weights can be merged, not those of {len(perceptual_weights)} rows")
        before = {site.module: site.module.weight.data for site in self.sites if site.letter != "m"}
        for site in self.sites:
            if site.letter != "m":
                weight = site.module.weight
                weight.data = weight.data + self.delta(perceptual_weights, site).to(weight.dtype)
        self.factors.A, self.factors.B, self.factors.merged = perceptual_weights, self.generator.learned(), True
        try:
            yield
        finally:
            for module, weight in before.items():
                module.weight.data = weight
            self.factors.A, self.factors.B, self.factors.merged = None, (), False

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        perceptual_weights: torch.Tensor | None = None,
        apply: Literal["auto", "merge", "side"] = "auto",
        **kwargs: Any,
    ) -> Any:
        """transformers' generate; the perceptual weights are computed once. Prompts are padded on the left.

        `apply`: "merge" adds them to the LLM's weights, "side" keeps them beside; "auto" takes what costs less here, as
        measured (papers/vlora/merging.py). Only one image's weights can be merged, for any number of prompts.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if perceptual_weights is None and pixel_values is not None:
            perceptual_weights = self.perceive(input_ids, pixel_values)
        settings = kwargs.get("generation_config") or self.generation_config
        # A cache that is handed in or out holds the slots, as `forward`'s does.
        keep = kwargs.get("past_key_values") is not None
        keep |= bool(kwargs.get("return_dict_in_generate", settings.return_dict_in_generate))
        ids, mask, kwargs["position_ids"] = self.prompt(
            input_ids, attention_mask, kwargs.pop("position_ids", None), keep=keep
        )
        for key in ("max_length", "min_length"):  # they count the prompt
            if length := kwargs.get(key) or getattr(settings, key):
                kwargs[key] = length - input_ids.shape[1] + ids.shape[1]
        kwargs |= {"attention_mask": mask}
        within = contextlib.nullcontext()
        if perceptual_weights is not None:
            if apply == "auto":
                apply = merging.cheaper(self, perceptual_weights, ids, kwargs)
            if apply == "merge":
                within = self.merged(perceptual_weights)
            else:  # repeated by generate for beams and several sequences of a row
                kwargs["perceptual_weights"] = perceptual_weights.expand(len(ids), -1, -1, -1, -1)
        with within:
            out = super().generate(ids, **kwargs)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        prompt = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        sequences = torch.cat([prompt, sequences[:, ids.shape[1] :]], 1)
        if isinstance(out, torch.Tensor):
            return sequences
        out.sequences = sequences
        return out


AutoConfig.register("vlora", VLoRAConfig)
AutoModelForImageTextToText.register(VLoRAConfig, VLoRAForConditionalGeneration)
