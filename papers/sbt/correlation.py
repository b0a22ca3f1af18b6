"""A plain correlation tracker, to put SBT's features into: what the paper calls applying it to existing pipelines.

Depth-wise cross-correlation of template and search features, as in SiamRPN++, then per position a score and a box,
as in SiamFC++. Features come from `SBTBackbone`, whose cross blocks have let the two images look at each other, or from
any timm backbone applied to each image alone. Inputs and outputs are those of `model.SBT`, so trainer, loss, tracker
and evaluation are the same. Shapes as in model.py.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import nn

from papers.sbt.model import Prediction, SBTBackbone, on_map


class Siamese(nn.Module):
    """A timm backbone applied to template and search image separately, up to the last map of stride `reduction`."""

    def __init__(self, name: str, reduction: int = 8, **kwargs):
        super().__init__()
        self.reduction = reduction
        if not timm.is_model(name):  # one on a hub would be fetched
            raise ValueError(f"timm knows no model {name!r}")
        probe = timm.create_model(name, features_only=True, pretrained=False, **kwargs)
        levels = [i for i, r in enumerate(probe.feature_info.reduction()) if r == reduction]
        if not levels:
            raise ValueError(f"{name} has maps of strides {probe.feature_info.reduction()}, none of {reduction}")
        self.body = timm.create_model(name, features_only=True, out_indices=levels[-1:], **kwargs)
        self.num_features = self.body.feature_info.channels()[-1]

    def encode(self, image_BCHW):
        return self.body(image_BCHW)[0].permute(0, 2, 3, 1)

    def correlate(self, z, x, both: bool = False):
        """Nothing: the images do not meet before the head."""
        return (z, x) if both else x


class CorrelationHead(nn.Module):
    """Template and search map (B, H, W, C) -> `Prediction`."""

    def __init__(self, dim: int, hidden: int = 128):
        super().__init__()
        # GroupNorm where the pipelines have BatchNorm: it depends neither on the batch nor on how it is spread.
        self.z, self.x = (nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GroupNorm(8, hidden)) for _ in range(2))
        self.cls, self.box = (
            nn.Sequential(
                nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(8, hidden), nn.ReLU(), nn.Conv2d(hidden, n, 1)
            )
            for n in (2, 4)
        )

    def forward(self, z_BHWC, x_BHWC) -> Prediction:
        z, x = on_map(self.z, z_BHWC), on_map(self.x, x_BHWC)
        B, H, W, C = x.shape
        # The target fills about the middle half of its template; an odd kernel keeps the map's size.
        side = z.shape[1] // 2 - (z.shape[1] // 2 + 1) % 2
        top = (z.shape[1] - side) // 2
        kernel = z[:, top : top + side, top : top + side].permute(0, 3, 1, 2).reshape(B * C, 1, side, side)
        y = F.conv2d(x.permute(0, 3, 1, 2).reshape(1, B * C, H, W), kernel / side**2, padding=side // 2, groups=B * C)
        y = y.view(B, C, H, W)
        # Distances from a position to the box's left, top, right and bottom edge, in shares of the crop.
        left, top, right, bottom = (self.box(y).float().clamp(max=8).exp() / W).unbind(1)
        columns, rows = ((torch.arange(n, device=y.device) + 0.5) / n for n in (W, H))
        cx, cy = columns + (right - left) / 2, rows[:, None] + (bottom - top) / 2
        boxes = torch.stack([cx, cy, left + right, top + bottom], dim=-1)
        return Prediction(self.cls(y).permute(0, 2, 3, 1).flatten(1, 2), boxes.flatten(1, 2))


class CorrelationNet(nn.Module):
    """Backbone, correlation, head. `backbone` has `encode`, `correlate`, `num_features` and `reduction`."""

    def __init__(self, backbone: SBTBackbone | Siamese, search_size: int = 256):
        super().__init__()
        self.backbone = backbone
        self.grid = search_size // backbone.reduction
        self.head = CorrelationHead(backbone.num_features)

    def encode(self, template_BCHW):
        return self.backbone.encode(template_BCHW)

    def predict(self, z, search_BCHW) -> Prediction:
        return self.head(*self.backbone.correlate(z, self.backbone.encode(search_BCHW), both=True))

    def forward(self, template, search) -> Prediction:
        return self.predict(self.encode(template), search)
