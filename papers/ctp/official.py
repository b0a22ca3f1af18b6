"""The authors' checkpoints -> these models, and these backbones -> torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common import run
from common.run import UserError
from papers.ctp.model import BN_EPS, CLASSIFICATION, CONVOLUTIONS, Backbone, CtP, Recognizer, checkpoint_filter_fn

_KINDS = {"": Backbone, "ctp_": CtP, "recognizer_": Recognizer}
VARIANTS = {f"{prefix}{net}": (kind, net) for prefix, kind in _KINDS.items() for net in CONVOLUTIONS}


def load_official(variant: str, state_dict: Mapping[str, torch.Tensor], **config: Any) -> torch.nn.Module:
    """The authors' network with these weights, in eval mode.

    `variant` is a name of `VARIANTS`: "r3d18" (a backbone; `config` may hold `strides`), "ctp_r3d18" (with the
    tracking head; `frames`) or "recognizer_r3d18" (with a classifier; `classes`), or the same of r2plus1d18.
    Unexpected, missing or misshaped tensors are one error that lists them all.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    kind, net = VARIANTS[variant]
    model = kind(net, **config)
    model.load_state_dict(checkpoint_filter_fn(state_dict, model), strict=True)
    return model.eval()


def load_backbone(backbone: Backbone, path: str | Path) -> None:
    """Loads what a run folder, an exported backbone or a checkpoint of the authors holds for a backbone.

    Heads, classifiers and MoCo's keys are left behind; `UserError` if the rest does not fit exactly.
    """
    path = Path(path)
    if path.is_dir():
        found = run.load_checkpoint(path)
        if not found:
            raise UserError(f"{path} is no run folder with a whole checkpoint")
        weights = found[1]["model"]
    else:
        weights = run.load_weights(path)
    weights = checkpoint_filter_fn(weights, backbone)
    if any(name.startswith("backbone.") for name in weights):
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    run.fit(backbone, weights, f"{path} does not fit this backbone")


def export(backbone: Backbone, kind: str, folder: Path) -> None:
    """Writes ``backbone.safetensors`` and ``config.json``, and ``torchvision.safetensors`` where torchvision has the
    network: an R3D-18 of full width.

    torchvision's batch normalisation adds another epsilon to the variance; the variances of that file make up for it,
    so that ``torchvision.models.video.r3d_18`` in eval mode gives the same features.
    """
    folder.mkdir(exist_ok=True)
    weights = backbone.state_dict()
    run.save_weights(folder / "backbone.safetensors", weights)
    width = backbone.channels // 8
    run.write_json(folder / "config.json", {"backbone": kind, "width": width, "strides": CLASSIFICATION,
                                            "batch_norm_eps": BN_EPS})
    if kind == "r3d18" and width == 64:
        theirs = {k: v + (BN_EPS - 1e-5) if k.endswith("running_var") else v for k, v in weights.items()}
        run.save_weights(folder / "torchvision.safetensors", theirs)
