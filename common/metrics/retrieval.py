"""Retrieval, measured: is what was asked for among the nearest?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_at(similarity: Tensor, relevant: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """{"R@1": ...}: percent of queries with a relevant item among the k most similar ones.

    similarity (Q, N), higher is nearer; relevant (Q, N) bool. Of equally similar items the relevant ones come last, so
    that a constant similarity scores nothing. Raises `ValueError` on similarities that are not numbers, and on queries
    for which nothing is relevant.
    """
    if similarity.shape != relevant.shape:
        raise ValueError(f"similarity is {tuple(similarity.shape)}, relevant {tuple(relevant.shape)}")
    if similarity.isnan().any():
        raise ValueError(f"{int(similarity.isnan().any(1).sum())} of {len(similarity)} queries have NaN similarities")
    if not relevant.any(1).all():
        raise ValueError(f"{int((~relevant.any(1)).sum())} of {len(relevant)} queries have no relevant item")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    nearer = ((similarity >= best) & ~relevant).sum(1)  # items that come before the first relevant one
    return {f"R@{k}": 100 * (nearer < k).double().mean().item() for k in ks}
