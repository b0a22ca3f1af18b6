"""The contrastive objective of MM-GEM over a global batch of pairs (sheet section "embedding").

b pairs of this process, B of all processes, D width of the joint space.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all processes, in the order of the ranks. The gradient of a row is summed over the processes using it."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """(b, ...) of each process -> (B, ...) on all, differentiable. All processes must bring equally many rows."""
    return _Gather.apply(x) if processes() > 1 else x


def contrastive(v_bD: Tensor, t_bD: Tensor, scale: Tensor, keys_b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(L_v2t, L_t2v) in nats: cross-entropy of own images among all texts, and of own texts among all images.

    Embeddings of unit length; scale = 1 / tau. With `keys`, one integer for each pair, pairs of equal key count as
    positives of each other (the mean of their log-probabilities), instead of as wrong negatives.

    The mean of the losses over the processes is the loss of the joined batch, and so, for gradients, is the mean that
    data-parallel training takes: a gathered row's gradient is summed over the processes before.
    """
    v_all, t_all = gather(v_bD), gather(t_bD)
    here = torch.arange(len(v_bD), device=v_bD.device) + (dist.get_rank() * len(v_bD) if processes() > 1 else 0)
    if keys_b is None:
        positive = here[:, None] == torch.arange(len(v_all), device=v_bD.device)
    else:
        positive = keys_b[:, None] == gather(keys_b)
    share = positive / positive.sum(1, keepdim=True)

    def cross_entropy(queries, items):
        log_p = (scale * queries.float() @ items.float().mT).log_softmax(1)
        return -(share * log_p).sum(1).mean()

    return cross_entropy(v_bD, t_all), cross_entropy(t_bD, v_all)


def text_keys(input_ids: Tensor, used: Tensor) -> Tensor:
    """An integer for each row of token ids (b, L) that is the same for equal texts, whatever the padding. (b,)"""
    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    mixed = (input_ids + 1) * 0x2545F4914F6CDD1D + place * 0x9E3779B97F4A7C1
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9  # int64 wraps around, which is what a hash wants
    return ((mixed ^ (mixed >> 32)) * used).sum(1)
