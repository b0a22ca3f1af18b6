"""The two detectors: a one-level RetinaNet and a one-level FCOS on a crop that shows the target at a known size.

Wang et al., "Tracking by Instance Detection: A Meta-Learning Approach", CVPR 2020, arXiv 2004.00830.
Shapes: B crops, C channels of the backbone, W of the head, S side of a crop in pixels, G = ceil(S / 8) side of its
grid, N = G G cells, row by row.
Boxes are x1, y1, x2, y2 in pixels of the crop, which is [0, S) x [0, S).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, encode_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import BasicBlock
from torchvision.ops import box_iou, sigmoid_focal_loss
from torchvision.ops.misc import Conv2dNormActivation

from common.data import pretrained
from common.run import UserError, load_weights

STRIDE = 8
MAX_LOG_RATIO = math.log(1000 / 16)  # of a predicted side to its anchor's: torchvision's bound


class Crops(NamedTuple):
    """A set: support or target, before and after `Detector.prepare`."""

    x: torch.Tensor
    """(B, 3, S, S) uint8 RGB; prepared: (B, 2 W, G, G), what the two branches' first convolutions give"""
    box_xyxy: torch.Tensor
    """(B, 4) float; any box of positive size where the target is absent"""
    present: torch.Tensor
    """(B,) bool: does the crop show the target?"""
    weight: torch.Tensor
    """(B,) of each crop in the mean loss"""


# Backbones ------------------------------------------------------------------------------------------------


class Backbone(NamedTuple):
    layers: nn.Module
    """image -> (B, C, G, G)"""
    channels: int
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD


def resnet(widths: tuple[int, ...], blocks: int, norm) -> Backbone:
    """ResNet of basic blocks up to layer3, whose stride is 1 instead of 2. `widths`: of stem, layers 1, 2 and 3."""

    def layer(inputs: int, width: int, stride: int) -> nn.Sequential:
        skip = None
        if stride > 1 or inputs != width:
            skip = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), norm(width))
        first = BasicBlock(inputs, width, stride, skip, norm_layer=norm)
        return nn.Sequential(first, *(BasicBlock(width, width, norm_layer=norm) for _ in range(blocks - 1)))

    stem, one, two, three = widths
    layers = nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, stem, 7, 2, 3, bias=False), bn1=norm(stem), relu=nn.ReLU(), maxpool=nn.MaxPool2d(3, 2, 1),
        layer1=layer(stem, one, 1), layer2=layer(one, two, 2), layer3=layer(two, three, 1),
    ))
    for conv in (m for m in layers.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(layers, three)


def resnet18(imagenet: bool) -> Backbone:
    """The paper's; with `imagenet` torchvision's weights, from its cache or the network."""
    backbone = resnet((64, 64, 128, 256), 2, nn.BatchNorm2d)
    if imagenet:
        try:
            file = torchvision_weights(ResNet18_Weights.IMAGENET1K_V1.url)
        except OSError as error:
            raise UserError(
                f"ResNet-18's ImageNet weights cannot be had ({error}): put {ResNet18_Weights.IMAGENET1K_V1.url} into "
                f"{torch.hub.get_dir()}/checkpoints, or train from scratch with --no-imagenet"
            ) from None
        load_torchvision(backbone, load_weights(file))
    return backbone


def torchvision_weights(url: str) -> Path:
    """The file of torchvision's, from torch's cache or the network: that of the hash in its name, whoever put it there.

    OSError if it cannot be fetched, `UserError` if it is another.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    begins = path.stem.rpartition("-")[2]  # torchvision's names end in the first digits of the hash
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(begins):
        raise UserError(f"{path} is not torchvision's: its SHA-256 is {found[:16]}..., expected {begins}...; remove it")
    return path


def load_torchvision(backbone: Backbone, weights: dict[str, torch.Tensor]) -> None:
    """Takes the layers there are from the state dict of torchvision's ResNet; their names are the same."""
    backbone.layers.load_state_dict({name: weights[name] for name in backbone.layers.state_dict()})


def narrow(imagenet: bool) -> Backbone:
    """For two CPU cores: 1/4 as wide, one block a layer, group normalisation, as there are no statistics to freeze."""
    if imagenet:
        raise UserError("the narrow backbone has no ImageNet weights; train it with --no-imagenet")
    return resnet((16, 16, 32, 48), 1, partial(nn.GroupNorm, 8))


LITE0_NORM = (0.498,) * 3, (0.502,) * 3  # mean and standard deviation of its pixels


def lite0(imagenet: bool) -> nn.Module:
    """timm's EfficientNet-Lite0, with `imagenet` and the weights that a package carries."""
    network = timm.create_model("tf_efficientnet_lite0")
    if imagenet:
        weights = load_file(pretrained.efficientnet_lite0() / "model.safetensors")
        network.reset_classifier(0)
        network.load_state_dict({name.removeprefix("timm_model."): tensor for name, tensor in weights.items()})
    return network


def efficientnet_lite0(imagenet: bool) -> Backbone:
    """Not the paper's: the one backbone whose ImageNet weights an ordinary package carries. Strides as in `resnet`."""
    network = lite0(imagenet)
    network.blocks[3][0].conv_dw.stride = (1, 1)
    layers = nn.Sequential(network.conv_stem, network.bn1, network.blocks[:4])
    return Backbone(layers, 80, *LITE0_NORM)


class TwoLevels(nn.Module):
    """EfficientNet-Lite0's maps of stride 8 and, enlarged, of stride 16, side by side: (B, 3, S, S) ->
    (B, 40 + 112, G, G). Strides are those its weights were trained for, so its field of view is as well."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.fine = nn.Sequential(network.conv_stem, network.bn1, network.blocks[:3])
        self.coarse = network.blocks[3:5]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.fine(x.contiguous(memory_format=torch.channels_last))  # on a CPU 2 to 5 times faster
        coarse = F.interpolate(self.coarse(fine), fine.shape[-2:], mode="bilinear")
        return torch.cat([fine / 7, coarse / 5], 1)  # about their standard deviations, over photographs


def lite0_levels(imagenet: bool) -> Backbone:
    """Not the paper's: two levels of EfficientNet-Lite0, made to be left frozen (recipes real_lite0*)."""
    layers = TwoLevels(lite0(imagenet)).to(memory_format=torch.channels_last)
    return Backbone(layers, 152, *LITE0_NORM)


BACKBONES = {
    "resnet18": resnet18, "narrow": narrow, "efficientnet_lite0": efficientnet_lite0, "lite0_levels": lite0_levels,
}


# Heads ----------------------------------------------------------------------------------------------------


def grid_boxes(grid: int, side_px: int, box_px: int) -> torch.Tensor:
    """(N, 4): a square of `box_px` centred on each cell; the grid lies in the middle of the crop."""
    with torch.device("cpu"):  # also while the network is declared on the meta device: they are computed
        generator = AnchorGenerator(((box_px,),), ((1.0,),))
        stride = torch.tensor(STRIDE)
        (boxes,) = generator.grid_anchors([[grid, grid]], [[stride, stride]])
    return boxes + STRIDE / 2 - 0.5 * (grid * STRIDE - side_px)


def convolutions(inputs: int, width: int, depth: int) -> nn.Sequential:
    """(B, inputs, G, G) -> (B, width, G, G): `depth` 3x3 convolutions, each with ReLU."""
    layers = [Conv2dNormActivation(inputs if i == 0 else width, width, norm_layer=None) for i in range(depth)]
    for layer in layers:
        nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
        nn.init.zeros_(layer[0].bias)
    return nn.Sequential(*layers)


def output(width: int, channels: int, bias: float = 0.0) -> nn.Conv2d:
    """(B, width, G, G) -> (B, channels, G, G), a 3x3 convolution that begins by answering `bias` nearly everywhere."""
    layer = nn.Conv2d(width, channels, 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, bias)
    return layer


class Head(nn.Module):
    """Two branches of 3x3 convolutions without normalisation. The first convolution of each is trained offline alone,
    the others and the output online; forward is of these: (B, 2 W, G, G) -> (B, N, channels) raw numbers.

    Channel 0 is the logit of "target", 1 to 4 the box.
    """

    def __init__(self, channels: int, grid: int, side_px: int, anchor_px: int, width: int, depth: int):
        super().__init__()
        self.register_buffer("anchors", grid_boxes(grid, side_px, anchor_px), persistent=False)
        self.cls_first, *cls_tower = convolutions(channels, width, depth)
        self.box_first, *box_tower = convolutions(channels, width, depth)
        self.cls_tower, self.box_tower = nn.Sequential(*cls_tower), nn.Sequential(*box_tower)
        self.cls = output(width, 1, bias=-math.log(99))  # every cell starts at a score of 0.01
        self.box = output(width, 4)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, G, G) -> (B, 2 W, G, G), by the first convolution of each branch."""
        return torch.cat([self.cls_first(features), self.box_first(features)], 1)

    def focal(self, logit: torch.Tensor, positive: torch.Tensor, ignored: torch.Tensor | None = None) -> torch.Tensor:
        """(B,) focal loss, summed over the cells and divided by the positive ones. All arguments (B, N)."""
        loss = sigmoid_focal_loss(logit, positive.to(logit), alpha=0.25, gamma=2.0, reduction="none")
        if ignored is not None:
            loss = loss.masked_fill(ignored, 0)
        return loss.sum(1) / positive.sum(1).clamp(min=1)


def mean_over(positive: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """(B, N) -> (B,): mean over the positive cells, 0 where there are none."""
    return loss.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)


class RetinaHead(Head):
    """One square anchor at each cell. Positive: IoU >= 0.5, and the best anchor; negative: IoU < 0.4."""

    def __init__(self, channels: int, grid: int, side_px: int, anchor_px: int, width: int = 256, depth: int = 3):
        super().__init__(channels, grid, side_px, anchor_px, width, depth)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0), bbox_xform_clip=MAX_LOG_RATIO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cls, box = x.chunk(2, 1)
        maps = [self.cls(self.cls_tower(cls)), self.box(self.box_tower(box))]
        return torch.cat(maps, 1).flatten(2).transpose(1, 2)

    def assign(self, crops: Crops) -> tuple[torch.Tensor, torch.Tensor]:
        """(positive, ignored), (B, N) bool."""
        iou = box_iou(crops.box_xyxy, self.anchors)
        best = (iou == iou.amax(1, keepdim=True)) & (iou > 0)
        positive = ((iou >= 0.5) | best) & crops.present[:, None]
        return positive, (iou >= 0.4) & ~positive & crops.present[:, None]

    def loss(self, raw: torch.Tensor, crops: Crops) -> torch.Tensor:
        """(B,) focal loss + smooth L1 on (dx / a, dy / a, log w / a, log h / a), a the anchor's side."""
        positive, ignored = self.assign(crops)
        B, N = positive.shape
        boxes, anchors = crops.box_xyxy[:, None].expand(B, N, 4), self.anchors.expand(B, N, 4)
        ones = self.anchors.new_ones(4)  # the coder's weights, which its own `encode` brings from the host each time
        wanted = encode_boxes(boxes.reshape(-1, 4), anchors.reshape(-1, 4), ones).view(B, N, 4)
        distance = F.smooth_l1_loss(raw[..., 1:], wanted, beta=1 / 9, reduction="none").sum(-1)
        return self.focal(raw[..., 0], positive, ignored) + mean_over(positive, distance)

    def predict(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(boxes (B, N, 4), scores (B, N)). The coder's inverse; its own `decode` brings constants from the host."""
        raw = raw.float()
        start, end = self.anchors.chunk(2, -1)
        side = end - start
        center = raw[..., 1:3] * side + (start + 0.5 * side)
        half = 0.5 * (raw[..., 3:].clamp(max=MAX_LOG_RATIO).exp() * side)
        return torch.cat([center - half, center + half], -1), raw[..., 0].sigmoid()


class FCOSHead(Head):
    """No anchors: distances to the four sides, in units of the stride. Positive: the cell's centre in the middle half
    of the box, along both axes, and the cell nearest to the box's centre."""

    def __init__(self, channels: int, grid: int, side_px: int, anchor_px: int, width: int = 256, depth: int = 3):
        super().__init__(channels, grid, side_px, STRIDE, width, depth)
        self.center = output(width, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.coder = BoxLinearCoder(normalize_by_size=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels 1 to 4 are logarithms of the distances; channel 5 is centre-ness."""
        cls, box = x.chunk(2, 1)
        tower = self.box_tower(box)
        maps = [self.cls(self.cls_tower(cls)), self.scale * self.box(tower), self.center(tower)]
        return torch.cat(maps, 1).flatten(2).transpose(1, 2)

    @torch.compiler.disable  # fused with what follows, torch 2.11 on a CPU computes something else
    def assign(self, crops: Crops) -> tuple[torch.Tensor, torch.Tensor]:
        """(positive (B, N), true distances left, top, right, bottom in strides (B, N, 4))."""
        wanted = self.coder.encode(self.anchors, crops.box_xyxy[:, None])
        off_center = (wanted[..., :2] - wanted[..., 2:]).abs() / 2
        inside = (off_center <= (wanted[..., :2] + wanted[..., 2:]) / 4).all(-1)
        distance = off_center.square().sum(-1)
        nearest = F.one_hot(distance.argmin(1), distance.shape[1]).bool()
        return (inside | nearest) & crops.present[:, None], wanted

    def loss(self, raw: torch.Tensor, crops: Crops) -> torch.Tensor:
        """(B,) focal loss + -log IoU + binary cross-entropy of centre-ness."""
        positive, wanted = self.assign(crops)
        centerness = (ratio(wanted[..., 0::2]) * ratio(wanted[..., 1::2])).sqrt()
        center = F.binary_cross_entropy_with_logits(raw[..., 5], centerness, reduction="none")
        iou = iou_of_distances(self.distances(raw), wanted).clamp(min=1e-6)
        return self.focal(raw[..., 0], positive) + mean_over(positive, -iou.log()) + mean_over(positive, center)

    def distances(self, raw: torch.Tensor) -> torch.Tensor:
        return raw[..., 1:5].clamp(max=MAX_LOG_RATIO).exp()

    def predict(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(boxes (B, N, 4), scores (B, N))."""
        raw = raw.float()
        boxes = self.coder.decode(self.distances(raw), self.anchors)
        return boxes, (raw[..., 0].sigmoid() * raw[..., 5].sigmoid()).sqrt()


def ratio(pair: torch.Tensor) -> torch.Tensor:
    """Smaller over larger of two distances, 0 outside the box."""
    return pair.amin(-1).clamp(min=0) / pair.amax(-1).clamp(min=1e-6)


def iou_of_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU of boxes (..., 4) given by their distances left, top, right, bottom from one point."""
    intersection = torch.minimum(a, b)
    areas = [(x[..., 0] + x[..., 2]).clamp(min=0) * (x[..., 1] + x[..., 3]).clamp(min=0) for x in (a, b, intersection)]
    return areas[2] / (areas[0] + areas[1] - areas[2])


HEADS = {"retina": RetinaHead, "fcos": FCOSHead}


# Detector -------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """(B, 3, S, S) uint8 -> (B, N, 5 or 6) raw numbers of the head. Batch normalisation is frozen: the inner loop
    sees a function of the crop alone. The whole backbone is frozen after the detection stage (train.py)."""

    def __init__(self, backbone: Backbone, head: type[Head], side_px: int, anchor_px: int, **head_args: Any):
        super().__init__()
        self.grid = math.ceil(side_px / STRIDE)
        self.backbone = backbone.layers
        self.head = head(backbone.channels, self.grid, side_px, anchor_px, **head_args)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(backbone, name)).view(3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, 2 W, G, G), by the shared layers and the first convolution of each branch."""
        return self.head.prepare(self.backbone((images.float() / 255 - self.mean) / self.std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))

    def online(self) -> list[str]:
        """Names of the online parameters: the head's, without the first convolution of each branch."""
        return [f"head.{name}" for name, _ in self.head.named_parameters() if "_first." not in name]

    def prepare(self, crops: Crops) -> Crops:
        return crops._replace(x=self.features(crops.x))

    def loss(self, prepared: Crops) -> torch.Tensor:
        """Mean loss of a set."""
        each = self.head.loss(self.head(prepared.x).float(), prepared)
        return (each * prepared.weight).sum() / prepared.weight.sum()

    def predict(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(boxes (B, N, 4), scores (B, N)) for what `features` gives."""
        return self.head.predict(self.head(features))
