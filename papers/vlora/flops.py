"""What an image and its question cost, in floating-point operations: a multiply-add is two (section 4.4, figure 4).

The vision tower is left out of all counts, since both models have it. C text tokens, V visual features.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from papers.vlora.configuration import VLoRAConfig


def language_model(config: Any, tokens: int, *, logits: int = 1) -> int:
    """A LLaMA on `tokens`: projections, attention over all pairs of tokens, MLP; the last `logits` tokens' logits."""
    d, n = config.hidden_size, tokens
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    per_token = 2 * d * (2 * q + 2 * kv) + 6 * d * config.intermediate_size
    layers = config.num_hidden_layers * (n * per_token + 4 * n * n * q)
    return layers + n * head + 2 * logits * d * config.vocab_size  # n * head: angles of the rotary positions


def generator(config: VLoRAConfig, *, released: bool = False) -> int:
    """The perceptual weights generator on one image: once per image, whatever is asked about it.

    `released`: as the authors' code computes it, with keys and values of every feature; otherwise as model.py does.
    """
    V, h, T, S = config.num_features, config.width, len(config.weight_types), len(config.sites)
    groups, k = (T, S) if config.separate else (1, T * S)
    cross = 4 * V * h * h + 4 * k * V * h if released else 4 * k * h * h + 4 * config.heads * k * V * h
    block = (8 * k * h * h + 4 * k * k * h) + (4 * k * h * h + cross) + 4 * config.mlp_ratio * k * h * h
    head = 2 * k * h * config.text_config.hidden_size * config.rank
    return 2 * V * config.visual_width * h + groups * (config.blocks * block + head)


def beside(config: VLoRAConfig, tokens: int) -> int:
    """Applying the weights beside the modules they change, to so many tokens."""
    text = config.text_config
    d, head = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    wide, narrow = d, head * text.num_key_value_heads
    widths = sum(narrow if letter in "kv" else wide for letter in config.weight_types)
    return 2 * config.rank * tokens * len(config.sites) * (len(config.weight_types) * d + widths)


def merging(config: VLoRAConfig) -> int:
    """Adding the weights to q, k, v and o instead, once per image."""
    text = config.text_config
    d, head = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths = sum(head * text.num_key_value_heads if x in "kv" else d for x in config.weight_types if x != "m")
    return 2 * config.rank * len(config.sites) * d * widths


def vlora(config: VLoRAConfig, text: int, **kwargs: int) -> int:
    """VLoRA's prefill: generator, the text without the image's slot, the weights beside."""
    return generator(config) + language_model(config.text_config, text, **kwargs) + beside(config, text)


def tower(config: VLoRAConfig) -> int:
    """The CLIP vision tower on one image, which both models have."""
    vision = config.vision_config
    d, n = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2 + 1
    block = 8 * n * d * d + 4 * n * n * d + 4 * n * d * vision.intermediate_size
    return vision.num_hidden_layers * block + 6 * (n - 1) * d * vision.patch_size**2


def projector(config: Any) -> int:
    """LLaVA's projector on one image."""
    d = config.text_config.hidden_size
    return 2 * config.num_features * (config.visual_width * d + d * d)


def visual_tokens(config: Any, text: int, **kwargs: int) -> int:
    """The baseline's prefill: projector, text and visual tokens."""
    return projector(config) + language_model(config.text_config, text + config.num_features, **kwargs)


def paper_language_model(d: int, layers: int, tokens: int) -> int:
    """As the paper counts a LLaMA: an MLP of 8 d² multiply-adds, multi-head attention, no logits."""
    return layers * (24 * tokens * d * d + 4 * tokens * tokens * d)


def paper_ratio(config: VLoRAConfig, text: int) -> float:
    """VLoRA over LLaVA by that count, with what the released generator really costs; the projector is left out."""
    d, layers = config.text_config.hidden_size, config.text_config.num_hidden_layers
    ours = generator(config, released=True) + beside(config, text) + paper_language_model(d, layers, text)
    return ours / paper_language_model(d, layers, text + config.num_features)


# Dense bf16 TFLOP/s and memory GB/s of the vendors' data sheets.
GPUS = {"A100 80 GB": (312, 2039), "H100 SXM": (989, 3350), "H200": (989, 4800)}
TARGET = {1: 4, 8: 8}  # how many times faster than the baseline a prefill on a GPU should be, by batch


def bounds(ours: VLoRAConfig, theirs: Any, text: int = 32) -> list[dict[str, Any]]:
    """The least time a prefill in bf16 can take, max(operations / peak, bytes / bandwidth), by batch and GPU.

    "share": the part of its bound's speed that the baseline may at most reach for VLoRA, at its own bound, to be
    `TARGET` times faster.
    """
    rows = []
    generated = len(ours.weight_types) * len(ours.sites) * ours.text_config.hidden_size * ours.rank
    for batch, target in TARGET.items():
        work = {  # factors are written and read
            "vlora_ms": (batch * vlora(ours, text), bytes_moved(ours, batch, text, 2 * batch * generated)),
            "tokens_ms": (
                batch * visual_tokens(theirs, text), bytes_moved(theirs, batch, text + theirs.num_features, 0)
            ),
        }
        for gpu, (peak, bandwidth) in GPUS.items():
            ms = {key: max(count / peak / 1e9, moved / bandwidth / 1e6) for key, (count, moved) in work.items()}
            ratio = ms["tokens_ms"] / ms["vlora_ms"]
            rows.append({"gpu": gpu, "batch": batch, **ms, "ratio": ratio, "target": target,
                         "share": min(1, ratio / target)})
    return rows


def bytes_moved(config: Any, batch: int, tokens: int, extra: int) -> int:
    """Least traffic of a prefill in bf16: every weight once, the cache written once, and `extra` values."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    unread = {*model.vision_tower.parameters(), *model.get_input_embeddings().parameters()}
    weights = sum(p.numel() for p in {*model.parameters()} - unread)
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    cache = 2 * batch * tokens * text.num_hidden_layers * head * text.num_key_value_heads
    return 2 * (weights + cache + extra)


# The ratio VLoRA / LLaVA read from the paper's figure 4, ±0.01: {text tokens: {visual tokens: ratio}}.
FIGURE_4 = {
    32: {64: 0.55, 320: 0.166, 576: 0.106, 832: 0.081, 1088: 0.068, 1600: 0.056, 2112: 0.053, 2624: 0.050},
    128: {64: 0.83, 320: 0.367, 576: 0.241, 832: 0.182, 1088: 0.148, 1600: 0.112, 2112: 0.094, 2624: 0.083},
    256: {64: 0.95, 320: 0.532, 576: 0.373, 832: 0.288, 1088: 0.236, 1600: 0.177, 2112: 0.145, 2624: 0.124},
}
