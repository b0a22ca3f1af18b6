"""The contrastive loss over the texts and images of all processes.

b rows of this process, B of all processes, L tokens, D width of the joint space.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def contrastive(v_bD: Tensor, t_bD: Tensor, scale: Tensor, keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(L_v2t, L_t2v) in nats: cross-entropy of own images among all texts, and of own texts among all images.

    Embeddings of unit length; scale = 1 / tau; all processes bring equally many rows. With `keys`, pairs of equal key
    count as positives of each other (the mean of their log-probabilities), instead of as wrong negatives.

    The mean of the losses over the processes is the loss of the joined batch, and so, for gradients, is the mean that
    data-parallel training takes: a gathered row's gradient is summed over the processes before.
    """
    v_BD, t_BD = gather_with_gradient(v_bD), gather_with_gradient(t_bD)
    first = dist.get_rank() * len(v_bD) if processes() > 1 else 0
    keys_B = torch.arange(len(v_BD), device=v_bD.device) if keys_B is None else keys_B
    positive = keys_B[first : first + len(v_bD), None] == keys_B
    target = positive / positive.sum(1, keepdim=True)

    def cross_entropy(queries, items):
        log_p = (scale * queries.float() @ items.float().mT).log_softmax(1)
        return -(target * log_p).sum(1).mean()

    return cross_entropy(v_bD, t_BD), cross_entropy(t_bD, v_BD)


def text_keys(input_ids: Tensor, end: Tensor) -> Tensor:
    """For each text of all processes an integer, the same for equal texts. (B,)

    input_ids (b, L), padded on the right to a length of this process's own; end (b,), where [EMB] is. The integer is
    the value modulo 2^64 of a polynomial whose coefficients are the tokens, which different texts do not share but by a
    chance of about one in 2^64: for texts to be compared themselves, the host would have to wait for the device.
    """
    place = torch.arange(input_ids.shape[1], device=end.device)
    powers = torch.full_like(place, 0x5851F42D4C957F2D).cumprod(0)
    return gather(((input_ids + 1) * powers).masked_fill(place > end[:, None], 0).sum(1))


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """(b, ...) of each process -> (B, ...) on all, in the order of their ranks; without gradient."""
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """As `gather`, and the gradient of a row is summed over the processes that use it."""
    return _Gather.apply(rows) if processes() > 1 else rows
