"""MaskCo: predict the features of a masked region of one view, and find them in the other view.

Zhao et al., "Self-Supervised Visual Representations Learning by Contrastive Mask Prediction", ICCV 2021,
arXiv 2108.07954. No code was published and the paper's numbers are not at hand: what is this project's own choice is a
named argument here or a field of `recipes.Recipe`, listed in the README.

    B images · N regions of an image · J other regions of an image, as negatives · D features · K keys in the queue
    C, h, w: channels and sides of a feature map · S side of a view in pixels
    boxes: (x1, y1, x2, y2), edges in pixels of their view, 0 to S
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from common import run


class MaskPredictionHead(nn.Module):
    """From features around the mask to features of what it hides: (B, C, h, w) -> the same.

    "bottleneck" sees `depth` cells in every direction; "conv1x1" only the cell itself; "none" is the identity.
    """

    def __init__(self, channels: int, kind: Literal["bottleneck", "conv1x1", "none"], width: int, depth: int):
        super().__init__()
        if kind == "none":
            self.layers = None
            return
        kernels = [1, *[3] * depth] if kind == "bottleneck" else [1]
        layers: list[nn.Module] = []
        for i, k in enumerate(kernels):
            layers += [nn.Conv2d(width if i else channels, width, k, padding=k // 2, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x if self.layers is None else F.relu(x + self.layers(x))


class MomentumContrast(nn.Module):
    """What MaskCo and MoCo v2 share: query and key encoder, queue of keys, logits.

    A training step is `update_keys`, `forward`, and after the step `enqueue` of the keys that forward returned.
    """

    def __init__(
        self, backbone: str = "resnet50", *, output_stride: int = 32, features: int = 128, queue: int = 65_536,
        momentum: float = 0.999, temperature: float = 0.2,
    ):
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.backbone, self.key_backbone = (build_backbone(backbone, output_stride) for _ in range(2))
        C = self.channels = self.backbone.num_features
        self.projection, self.key_projection = (
            nn.Sequential(nn.Linear(C, C), nn.ReLU(inplace=True), nn.Linear(C, features)) for _ in range(2)
        )
        self.register_buffer("queue", F.normalize(torch.randn(features, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64))
        # Networks of the query, and their momentum copies.
        self.pairs = [(self.backbone, self.key_backbone), (self.projection, self.key_projection)]
        self._start_keys()

    def _start_keys(self) -> None:
        for query, key in self.pairs:
            key.load_state_dict(query.state_dict())
            key.requires_grad_(False)

    @torch.no_grad()
    def update_keys(self) -> None:
        """key = m key + (1 - m) query, once a step and before its forward pass."""
        for query, key in self.pairs:
            for p, k in zip(query.parameters(), key.parameters()):
                k.lerp_(p, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Keys (..., D) of this process's images, positives only; the newest take the place of the oldest."""
        keys = run.gather(keys.flatten(0, -2))
        K = self.queue.shape[1]
        keys = keys[-K:]
        where = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % K
        self.queue[:, where] = keys.T.to(self.queue.dtype)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % K)

    def logits(self, q: Tensor, k: Tensor, others: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """Similarity of queries (R, D) to their positive keys (R, D), to negatives of the same image (R, J, D) where
        `present` (R, J), and to the queue, over the temperature: (R, 1 + J + K). Column 0 is the positive."""
        columns = [(q * k).sum(1, keepdim=True)]
        if others is not None:
            columns.append(torch.einsum("rd,rjd->rj", q, others).masked_fill(~present, -torch.inf))
        return torch.cat([*columns, q @ self.queue.clone()], 1) / self.temperature

    @torch.no_grad()
    def _keys(self, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """encode(*inputs) for this process's images, batch normalisation seeing a shuffle of all processes' images.

        Whatever belongs to an image is shuffled with it, so boxes stay with their picture.
        """
        if not (self.training and run.processes() > 1):
            return encode(*inputs)
        everyone = [run.gather(x) for x in inputs]
        order = torch.randperm(len(everyone[0]), device=inputs[0].device)
        dist.broadcast(order, 0)
        B = len(inputs[0])
        mine = slice(dist.get_rank() * B, (dist.get_rank() + 1) * B)
        return run.gather(encode(*(x[order[mine]] for x in everyone)))[order.argsort()[mine]]


class MoCoV2(MomentumContrast):
    """The baseline: the key of the same image's other view, features averaged over the whole view."""

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Views (B, 3, S, S), twice -> logits (B, 1 + K), keys (B, D)."""
        q = unit(self.projection(self.backbone(query).mean((2, 3))))
        k = self._keys(lambda x: unit(self.key_projection(self.key_backbone(x).mean((2, 3)))), key)
        with full_precision(q):
            return self.logits(q, k), k


class MaskCo(MomentumContrast):
    """The region that is masked in the query view is the positive where it is visible, in the key view."""

    def __init__(
        self, backbone: str = "resnet50", *, mph: Literal["bottleneck", "conv1x1", "none"] = "bottleneck",
        mph_width: int = 512, mph_depth: int = 2, mph_on_key: bool = False, roi_cells: int = 3, roi_samples: int = 2,
        mask: Literal["mean", "noise", "learned", "off"] = "mean", **shared,
    ):
        super().__init__(backbone, **shared)
        self.roi_cells, self.roi_samples, self.mask = roi_cells, roi_samples, mask
        self.mph = MaskPredictionHead(self.channels, mph, mph_width, mph_depth)
        self.key_mph = MaskPredictionHead(self.channels, mph if mph_on_key else "none", mph_width, mph_depth)
        if mph_on_key:
            self.pairs.append((self.mph, self.key_mph))
        self.fill = nn.Parameter(torch.zeros(3, 1, 1)) if mask == "learned" else 0.0
        self._start_keys()

    def masked(self, query: Tensor, boxes_BN4: Tensor, noise: Tensor | None = None) -> Tensor:
        """The query views (B, 3, S, S) without what is inside their boxes, whose edges are whole pixels.

        `noise`, of the views' shape, stands there if `mask` says so.
        """
        if self.mask == "off":
            return query
        S = query.shape[-1]
        u = torch.arange(S, device=query.device) + 0.5
        x1, y1, x2, y2 = boxes_BN4[..., None].unbind(2)  # each (B, N, 1)
        inside = ((u > y1) & (u < y2))[..., :, None] & ((u > x1) & (u < x2))[..., None, :]  # (B, N, S, S)
        return torch.where(inside.any(1)[:, None], noise if self.mask == "noise" else self.fill, query)

    def pooled(self, maps: Tensor, boxes_BM4: Tensor, side: int) -> Tensor:
        """RoIAlign's mean (B, M, C) over M boxes of each view; `side` is that of the views in pixels.

        It takes cell j to be centred on (j + 1/2) strides; a ResNet's strided convolutions centre it on j strides and
        half a pixel. The README says what follows.
        """
        B, M, _ = boxes_BM4.shape
        image = torch.arange(B, device=maps.device).repeat_interleave(M)
        # Boxes, and the maps they are read from, in float32: bf16 knows no halves above 128, and no picture 257.
        rois = torch.cat([image[:, None], boxes_BM4.flatten(0, 1)], 1).float()
        cells = roi_align(maps.float(), rois, self.roi_cells, maps.shape[-1] / side, self.roi_samples, aligned=True)
        return cells.mean((2, 3)).unflatten(0, (B, M))

    def queries(self, query: Tensor, boxes_BN4: Tensor, noise: Tensor | None = None) -> Tensor:
        """Predicted features (B, N, D) of the regions that are masked in the query views."""
        maps = self.mph(self.backbone(self.masked(query, boxes_BN4, noise)))
        return unit(self.projection(self.pooled(maps, boxes_BN4, query.shape[-1])))

    def keys(self, key: Tensor, boxes_BM4: Tensor) -> Tensor:
        """Features (B, M, D) of visible regions of the key views."""
        maps = self.key_mph(self.key_backbone(key))
        return unit(self.key_projection(self.pooled(maps, boxes_BM4, key.shape[-1])))

    def forward(
        self, query: Tensor, key: Tensor, query_boxes: Tensor, key_boxes: Tensor, negatives: Tensor, present: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Views (B, 3, S, S), twice; boxes of the same regions in both (B, N, 4), twice; other regions of the key
        view (B, N, J, 4), and which of them exist (B, N, J); noise (B, 3, S, S) -> logits (B N, 1 + J + K), keys
        (B, N, D)."""
        _, N, J, _ = negatives.shape
        q = self.queries(query, query_boxes, noise)
        everything = self._keys(self.keys, key, torch.cat([key_boxes, negatives.flatten(1, 2)], 1))
        k, others = everything.split([N, N * J], 1)
        with full_precision(q):
            logits = self.logits(
                q.flatten(0, 1), k.flatten(0, 1), others.unflatten(1, (N, J)).flatten(0, 1), present.flatten(0, 1)
            )
        return logits, k


class LinearProbe(nn.Module):
    """A linear classifier on a frozen backbone, which stays in eval mode: (B, 3, S, S) -> (B, classes)."""

    def __init__(self, backbone: str, output_stride: int, classes: int):
        super().__init__()
        self.backbone = build_backbone(backbone, output_stride).requires_grad_(False)
        self.fc = nn.Linear(self.backbone.num_features, classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # as MoCo starts it
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x).mean((2, 3)))


# ResNets small enough for a CPU: what they change in one of timm's.
NARROW = {
    "resnet18_narrow": ("resnet18", {"channels": (32, 64, 128, 256)}),  # that of downstream/configs/mask_rcnn_small.py
    "resnet10_small": ("resnet18", {"channels": (24, 48, 96, 192), "layers": (1, 1, 1, 1)}),
    "resnet10_narrow": ("resnet18", {"channels": (16, 32, 64, 128), "layers": (1, 1, 1, 1)}),
}


def backbone_args(name: str) -> tuple[str, dict]:
    """(timm's name, arguments beyond it) of a backbone."""
    return NARROW.get(name, (name, {}))


def build_backbone(name: str, output_stride: int = 32) -> nn.Module:
    """A ResNet of timm's without classifier: (B, 3, S, S) -> (B, C, S / stride, S / stride).

    A smaller stride is reached by dilation: the weights fit either way. It starts as torchvision's do, no branch at 0.
    """
    base, extra = backbone_args(name)
    return timm.create_model(
        base, num_classes=0, global_pool="", output_stride=output_stride, zero_init_last=False, **extra
    )


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def full_precision(x: Tensor):
    """Context in which similarities are not rounded to bf16."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)
