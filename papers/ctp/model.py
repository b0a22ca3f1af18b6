"""CtP: a 3D network, the head that tracks patches through a clip, and the classifier that reuses the network.

    B clips · P patches in a clip · C channels · T frames · H, W rows and columns; a prime marks the feature map's
    box_xyxy_px    left, top, right, bottom in pixels of the network's input
    trajectory     the boxes of a patch in all frames, (T, 4)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.ops import roi_align

BN_EPS = 1e-3  # torchvision's networks have 1e-5
# Strides in space and in time of the four stages; the stem halves space once more. Weights fit both.
PRETRAINING = ((1, 2, 2, 1), (1, 2, 2, 2))  # the last stage keeps a map of 14 x 14 to look patches up in
CLASSIFICATION = ((1, 2, 2, 2), (1, 2, 2, 2))


class Targets(NamedTuple):
    """How dx, dy in pixels and the logarithms dw, dh become targets: (raw - mean) / std."""

    mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    std: tuple[float, ...] = (0.8, 0.8, 0.04, 0.04)


TARGETS = Targets()


class Conv2Plus1D(nn.Sequential):
    """3x3x3 as 1x3x3 and 3x1x1 with as many parameters: the width between follows from this convolution's own.

    torchvision's R(2+1)D gives both convolutions of a block the width of the first.
    """

    def __init__(self, inputs: int, outputs: int, _midplanes: int, stride: tuple[int, int, int] = (1, 1, 1)):
        mid = 27 * inputs * outputs // (9 * inputs + 3 * outputs)
        t, h, w = stride
        super().__init__(
            nn.Conv3d(inputs, mid, (1, 3, 3), (1, h, w), (0, 1, 1), bias=False), nn.BatchNorm3d(mid),
            nn.ReLU(inplace=True), nn.Conv3d(mid, outputs, (3, 1, 1), (t, 1, 1), (1, 0, 0), bias=False),
        )


CONVOLUTIONS = {"r3d18": Conv3DSimple, "r2plus1d18": Conv2Plus1D}


class Backbone(nn.Module):
    """R3D-18 or R(2+1)D-18 (Tran et al. 2018) without pooling: clips (B, 3, T, H, W) -> maps (B, C', T', H', W').

    Tensors have torchvision's names. R3D-18 with the strides of `CLASSIFICATION` is torchvision's ``r3d_18`` but for
    `BN_EPS`; R(2+1)D-18 is wider inside (see `Conv2Plus1D`).
    """

    def __init__(self, kind: str = "r3d18", strides=CLASSIFICATION, width: int = 64):
        super().__init__()
        convolution = CONVOLUTIONS[kind]
        if kind == "r3d18":
            self.stem = nn.Sequential(
                nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            )
        else:
            mid = 45 * width // 64
            self.stem = nn.Sequential(
                nn.Conv3d(3, mid, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), nn.BatchNorm3d(mid),
                nn.ReLU(inplace=True), nn.Conv3d(mid, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
                nn.BatchNorm3d(width), nn.ReLU(inplace=True),
            )
        inputs = width
        for i, (space, time) in enumerate(zip(*strides)):
            outputs, stride, shortcut = width * 2**i, (time, space, space), None
            if inputs != outputs or stride != (1, 1, 1):
                shortcut = nn.Sequential(
                    nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs)
                )
            setattr(self, f"layer{i + 1}", nn.Sequential(
                BasicBlock(inputs, outputs, convolution, stride, shortcut),
                BasicBlock(outputs, outputs, convolution, (1, 1, 1)),
            ))
            inputs = outputs
        self.channels = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.eps = BN_EPS

    def forward(self, clip: Tensor) -> Tensor:
        x = self.stem(clip)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class TrackingHead(nn.Module):
    """Where is the patch of this first-frame box in every frame?"""

    def __init__(
        self, channels: int = 512, frames: int = 16, map_frames: int = 2, hidden: int = 512, stride_px: int = 8,
        roi_size: int = 5, std: float = 0.001,
    ):
        super().__init__()
        self.frames, self.stride_px, self.roi_size = frames, stride_px, roi_size
        self.temporal_conv = nn.Conv3d(channels, hidden, (map_frames, 1, 1))  # time collapses before the crop
        self.fc1 = nn.Linear(hidden * roi_size**2, hidden)
        self.fc2 = nn.Linear(hidden, frames * 4)
        nn.init.kaiming_normal_(self.temporal_conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.temporal_conv.bias)
        for layer, spread in ((self.fc1, std), (self.fc2, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, maps_BCTHW: Tensor, query_xyxy_px: Tensor) -> Tensor:
        """(B, C', T', H', W') and the boxes of the first frame (B, P, 4) -> normalised targets (B, P, T, 4)."""
        B, P, _ = query_xyxy_px.shape
        maps = self.temporal_conv(maps_BCTHW).squeeze(2).relu()
        clip = torch.arange(B, device=maps.device, dtype=torch.float32).repeat_interleave(P)
        boxes = torch.cat([clip[:, None], query_xyxy_px.flatten(0, 1).float()], 1)
        crops = roi_align(maps.float(), boxes, self.roi_size, 1 / self.stride_px, sampling_ratio=2, aligned=True)
        x = self.fc1(crops.flatten(1)).relu()
        return self.fc2(x).view(B, P, self.frames, 4)


class CtP(nn.Module):
    """The network of the tracking game."""

    def __init__(self, kind: str = "r3d18", frames: int = 16, width: int = 64, head_std: float = 0.001):
        super().__init__()
        self.backbone = Backbone(kind, PRETRAINING, width)
        channels = self.backbone.channels
        self.head = TrackingHead(channels, frames, map_frames=-(-frames // 8), hidden=channels, std=head_std)

    def forward(self, clip: Tensor, query_xyxy_px: Tensor) -> Tensor:
        """(B, 3, T, H, W), (B, P, 4) -> (B, P, T, 4): see `encode`."""
        return self.head(self.backbone(clip), query_xyxy_px)


def _center_size(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    start, end = boxes_xyxy.chunk(2, -1)
    return (start + end) / 2, (end - start).clamp(min=1)


def encode(trajectory_xyxy_px: Tensor, targets: Targets = TARGETS) -> Tensor:
    """Targets (..., T, 4) of trajectories: what moved since the first frame, normalised.

    dx, dy are pixels, not fractions of the box; dw, dh are logarithms of ratios.
    """
    center, size = _center_size(trajectory_xyxy_px)
    moved = torch.cat([center - center[..., :1, :], (size / size[..., :1, :]).log()], -1)
    columns = zip(moved.unbind(-1), targets.mean, targets.std)  # numbers: a tensor of them would have to be sent
    return torch.stack([(raw - mean) / std for raw, mean, std in columns], -1)


def decode(predictions: Tensor, query_xyxy_px: Tensor, targets: Targets = TARGETS) -> Tensor:
    """The inverse of `encode`: (..., T, 4) and first-frame boxes (..., 4) -> trajectories."""
    center, size = (x[..., None, :] for x in _center_size(query_xyxy_px))
    columns = zip(predictions.unbind(-1), targets.mean, targets.std)
    moved, grown = torch.stack([value * std + mean for value, mean, std in columns], -1).chunk(2, -1)
    center, half = center + moved, size * grown.exp() / 2
    return torch.cat([center - half, center + half], -1)


def tracking_losses(
    predictions: Tensor, trajectory_xyxy_px: Tensor, weights: Tensor | None = None, targets: Targets = TARGETS
) -> dict[str, Tensor]:
    """Smooth L1 of centres and of sizes, each summed over its two coordinates and averaged over the frames.

    `weights` (B, P, T) count frames more or less; the method itself counts hidden ones like all others.
    """
    error = F.smooth_l1_loss(predictions.float(), encode(trajectory_xyxy_px.float(), targets), reduction="none")
    weights = torch.ones_like(error[..., 0]) if weights is None else weights
    frames = weights.sum().clamp(min=1)
    center, size = error.chunk(2, -1)
    return {
        "centre": (center.sum(-1) * weights).sum() / frames,
        "size": (size.sum(-1) * weights).sum() / frames,
    }


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), pair by pair; 0 where they do not meet."""
    overlap = (torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])).clamp(
        min=0
    )
    intersection = overlap.prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a_xyxy, b_xyxy)]
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=1e-6)


class Recognizer(nn.Module):
    """Action classifier: one clip (B, 3, T, H, W), or several of a video (B, N, 3, T, H, W) -> logits of each."""

    def __init__(self, kind: str = "r3d18", classes: int = 101, width: int = 64, dropout: float = 0.5):
        super().__init__()
        self.backbone = Backbone(kind, CLASSIFICATION, width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self.backbone.channels, classes)
        nn.init.normal_(self.fc.weight, std=0.001)
        nn.init.zeros_(self.fc.bias)

    def forward(self, clip: Tensor) -> Tensor:
        if clip.ndim == 6:
            return self(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return self.fc(self.dropout(pool(self.backbone(clip))))


def pool(maps_BCTHW: Tensor) -> Tensor:
    """Mean over time and space: (B, C)."""
    return maps_BCTHW.mean((2, 3, 4))


def video_scores(logits_BNK: Tensor) -> Tensor:
    """Class probabilities of videos: the mean of the clips' *logits*, then softmax."""
    return logits_BNK.float().mean(1).softmax(-1)


# The authors' names of tensors -> ours, applied in this order.
NAMES = [
    (r"\bstem\.(conv|conv_s)\.", "stem.0."),
    (r"\bstem\.(bn|bn_s)\.", "stem.1."),
    (r"\bstem\.conv_t\.", "stem.3."),
    (r"\bstem\.bn_t\.", "stem.4."),
    (r"\b(layer\d\.\d)\.conv(\d)\.conv\.", r"\1.conv\2.0."),
    (r"\b(layer\d\.\d)\.conv(\d)\.conv_s\.", r"\1.conv\2.0.0."),
    (r"\b(layer\d\.\d)\.conv(\d)\.bn_s\.", r"\1.conv\2.0.1."),
    (r"\b(layer\d\.\d)\.conv(\d)\.conv_t\.", r"\1.conv\2.0.3."),
    (r"\b(layer\d\.\d)\.bn(\d)\.", r"\1.conv\2.1."),
    (r"\b(layer\d\.\d)\.downsample\.conv\.", r"\1.downsample.0."),
    (r"\b(layer\d\.\d)\.downsample_bn\.", r"\1.downsample.1."),
    (r"^head\.pred_head\.", "head.fc2."),
    (r"^cls_head\.fc_cls\.", "fc."),
]


def rename(name: str) -> str:
    """Our name of the authors' tensor; a name that is not theirs is returned unchanged."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], _model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors, the authors' or ours, under our names."""
    return {rename(name): tensor for name, tensor in state_dict.items()}
