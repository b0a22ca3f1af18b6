"""Whether an image's weights are merged into the language model's or applied beside them: what costs less.

Beside the weights: two thin products for every token that passes a changed module. Merged: one product and one addition
of the size of the weight itself, once. By multiply-adds merging pays beyond d/2 tokens; in fact launches and memory
traffic decide, so both are timed on the device, at the shapes in question, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

REPEATS = 10


def cheaper(
    model: Any, perceptual_weights: torch.Tensor, input_ids: torch.Tensor, options: dict[str, Any]
) -> Literal["merge", "side"]:
    """What costs less for these prompts and as many new tokens as `options` of generate ask for."""
    if len(perceptual_weights) != 1:  # other rows, other weights
        return "side"
    changed = [site for site in model.sites if site.letter != "m"]
    if not changed:
        return "side"
    weight = changed[0].module.weight
    settings = options.get("generation_config") or model.generation_config
    new = options.get("max_new_tokens") or settings.max_new_tokens or 20
    rows = len(input_ids) * (options.get("num_beams") or settings.num_beams or 1)
    shape = (weight.device, weight.dtype, weight.shape[1], perceptual_weights.shape[-1])
    merge = merge_seconds(*shape)
    side = side_seconds(*shape, _rounded(input_ids.numel())) + new * side_seconds(*shape, _rounded(rows))
    return "merge" if merge < side else "side"


def _rounded(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()  # so that few sizes are measured


@cache
def merge_seconds(device: torch.device, dtype: torch.dtype, d: int, r: int) -> float:
    """Seconds to merge into one weight of d x d."""
    W, A, B = (torch.randn(d, n, device=device, dtype=dtype) for n in (d, r, r))
    return _seconds(lambda: W + B @ A.mT, device)


@cache
def side_seconds(device: torch.device, dtype: torch.dtype, d: int, r: int, tokens: int) -> float:
    """Seconds that the products beside one weight of d x d take for so many tokens."""
    x, A, B = (torch.randn(n, m, device=device, dtype=dtype) for n, m in ((tokens, d), (d, r), (d, r)))
    return _seconds(lambda: x + (x @ A) @ B.mT, device)


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Least of several timings, after a warm-up."""
    best = float("inf")
    for i in range(REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            best = min(best, time.perf_counter() - began)
    return best
