"""Other ways to learn from video without labels, under the same trainer.

VCOP (Xu et al. 2019): in which order were three clips? SpeedNet (Benaim et al. 2020): how fast does it play?
Rot3D (Jing et al. 2018): how is it turned? MoCo-3D (He et al. 2020): which clip comes from the same video?
SpeedNet and Rot3D are a `model.Recognizer` over speeds and angles.

    B videos · K keys in the queue
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import run
from papers.ctp.model import CLASSIFICATION, Backbone, pool

SPEEDS = (-4, -2, -1, 0, 1, 2, 4)  # frames from one to the next; backwards, and a still
ANGLES = (0, 90, 180, 270)  # counter-clockwise


def orders(clips: int) -> list[tuple[int, ...]]:
    """In which so many clips may come, in lexicographic order."""
    return list(itertools.permutations(range(clips)))


class OrderHead(nn.Module):
    """Features (B, N, C) of N clips as they come -> logits of their `orders`."""

    def __init__(self, channels: int = 512, hidden: int = 512, dropout: float = 0.5, clips: int = 3):
        super().__init__()
        self.pairs = list(itertools.combinations(range(clips), 2))
        self.fc1 = nn.Linear(2 * channels, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(len(self.pairs) * hidden, len(orders(clips)))

    def forward(self, features_BNC: Tensor) -> Tensor:
        pairs = [features_BNC[:, [i, j]].flatten(1) for i, j in self.pairs]
        return self.fc2(self.dropout(torch.cat([self.fc1(pair).relu() for pair in pairs], 1)))


class VCOP(nn.Module):
    def __init__(self, kind: str = "r3d18", width: int = 64, dropout: float = 0.5, clips: int = 3):
        super().__init__()
        self.backbone = Backbone(kind, CLASSIFICATION, width)
        self.head = OrderHead(self.backbone.channels, self.backbone.channels, dropout, clips)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, N, 3, T, H, W) -> (B, N!)"""
        return self.head(pool(self.backbone(clips.flatten(0, 1))).unflatten(0, clips.shape[:2]))


class MoCo(nn.Module):
    """Two clips of each video; the answer is always class 0, the key of the same video, and not one of the queue.

    A training step is `update_keys`, `forward` of all its chunks, and `enqueue` of the keys that these left behind.
    """

    def __init__(
        self, kind: str = "r3d18", width: int = 64, features: int = 128, queue: int = 65_536, momentum: float = 0.999,
        temperature: float = 0.2,
    ):
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.backbone, self.key_backbone = (Backbone(kind, CLASSIFICATION, width) for _ in range(2))
        C = self.backbone.channels
        self.fc, self.key_fc = (
            nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, features)) for _ in range(2)
        )
        for ours, keys in self._pairs():
            keys.load_state_dict(ours.state_dict())
            keys.requires_grad_(False)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(features, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.new_keys: list[Tensor] = []

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.key_backbone), (self.fc, self.key_fc)]

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 2, 3, T, H, W) -> (B, 1 + K)"""
        query = self.fc(pool(self.backbone(clips[:, 0])))
        with torch.no_grad():
            key = self._keys(clips[:, 1])
        if self.training:
            self.new_keys.append(key)
        # Similarities are not rounded to bf16.
        with torch.autocast("cuda" if clips.is_cuda else "cpu", enabled=False):
            query = nn.functional.normalize(query.float(), dim=1)
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], 1)
        return logits / self.temperature

    @torch.no_grad()
    def update_keys(self) -> None:
        """key = m key + (1 - m) query, once a step and before its forward passes."""
        for ours, keys in self._pairs():
            for p, k in zip(ours.parameters(), keys.parameters()):
                k.lerp_(p, 1 - self.momentum)

    def _keys(self, clips: Tensor) -> Tensor:
        """Keys of this process's clips, whose batch normalisation sees a shuffle of all processes' clips."""
        shuffle = self.training and run.processes() > 1
        if shuffle:
            everyone = run.gather(clips)
            order = torch.randperm(len(everyone), device=clips.device)
            dist.broadcast(order, 0)
            mine = slice(dist.get_rank() * len(clips), (dist.get_rank() + 1) * len(clips))
            clips = everyone[order[mine]]
        keys = nn.functional.normalize(self.key_fc(pool(self.key_backbone(clips))).float(), dim=1)
        return run.gather(keys)[order.argsort()[mine]] if shuffle else keys

    @torch.no_grad()
    def enqueue(self) -> None:
        """The keys of a step take the place of the oldest: after its loss, so that none is its own negative."""
        keys, K = run.gather(torch.cat(self.new_keys)), self.queue.shape[1]
        self.new_keys.clear()
        keys = keys[-K:]
        where = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % K
        self.queue[:, where] = keys.T.to(self.queue.dtype)
        self.queue_ptr[0] = (self.queue_ptr[0] + len(keys)) % K
