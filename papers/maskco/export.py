"""A trained backbone out of a run, for timm, torchvision, mmdetection, and for training on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from common import run
from common.run import UserError
from common.run.timm import export_timm
from papers.maskco.model import backbone_args


def export(backbone: nn.Module, name: str, folder: Path, side: int, crop: float) -> None:
    """Writes ``model.safetensors``: the query's backbone alone, named as in torchvision, timm and mmdetection.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and
    ``torchvision.models.resnet50().load_state_dict(load_file(...), strict=False)``, missing only ``fc``, load it.
    """
    base, extra = backbone_args(name)
    plain = timm.create_model(base, num_classes=0, **extra)  # without dilation: the weights are the same
    plain.load_state_dict(backbone.state_dict())
    export_timm(plain, folder, side=side, crop=crop, classes=[], model_args=extra)


def load_backbone(backbone: nn.Module, path: str | Path, layers: Sequence[str] = ()) -> None:
    """Loads what a run folder, an exported backbone or a checkpoint of MoCo's code holds for a backbone.

    Everything else in it is left behind, and all but `layers` ("layer4") where some are named; `UserError` if the rest
    does not fit exactly.
    """
    path = Path(path)
    if path.is_dir() and (path / "checkpoints").is_dir():
        found = run.load_checkpoint(path)
        if not found:
            raise UserError(f"{path} holds no whole checkpoint")
        weights = found[1]["model"]
    else:
        weights = run.load_weights(path / "model.safetensors" if path.is_dir() else path)
    for prefix in ("backbone.", "encoder_q.0.", "encoder_q."):
        if any(name.startswith(prefix) for name in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            break
    if layers:
        wanted = {k: v for k, v in weights.items() if k.split(".")[0] in layers}
    else:
        wanted = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    run.fit(backbone, wanted, f"{path} does not fit this backbone")


# torchvision's names of a ResNet's tensors -> detectron2's, whose normalisation is part of the convolution before it.
DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."), (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\bdownsample\.0\.", "shortcut."), (r"\bdownsample\.1\.", "shortcut.norm."), (r"\bbn(\d)\.", r"conv\1.norm."),
)


def detectron2_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's state dict under detectron2's names; what its frozen normalisation has not is left out."""
    renamed = {}
    for name, tensor in weights.items():
        if not name.endswith("num_batches_tracked"):
            for pattern, theirs in DETECTRON2:
                name = re.sub(pattern, theirs, name)
            renamed[name] = tensor
    return renamed


def write_detectron2(backbone: nn.Module, path: Path) -> None:
    """A file for detectron2's ``MODEL.WEIGHTS``, which finds the backbone's place in a detector by the names' ends."""
    content = {"model": detectron2_names(backbone.state_dict()), "matching_heuristics": True, "__author__": "MaskCo"}
    with run.written_whole(path) as part:
        torch.save(content, part)
