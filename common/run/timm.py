"""The doors to timm: what it asks of a network, its registry, and its format on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn

from common.run.checkpoints import save_weights


class Backbone:
    """What timm asks of a network with `stages` of `blocks` and a `ClassifierHead` named `head`."""

    stem_name = "patch_embed"
    """Name of the layer before the stages."""

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=rf"^{self.stem_name}", blocks=r"^stages\.(\d+)" if coarse else blocks)


def imagenet_cfg(size_px: int, **changes: Any) -> dict[str, Any]:
    """timm's configuration of weights trained as all ten papers train on ImageNet-1K; `changes` add to it."""
    return dict(
        url="", input_size=(3, size_px, size_px), num_classes=1000, crop_pct=224 / 256, interpolation="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classifier="head.fc",
    ) | changes


def register(
    network: type[nn.Module], variants: Mapping[str, Mapping[str, Any]], *,
    convert: Callable[[Mapping[str, torch.Tensor], nn.Module], Mapping[str, torch.Tensor]] | None = None,
    levels: Callable[[Mapping[str, Any]], int] = lambda arguments: len(arguments["depths"]),
) -> None:
    """Makes ``timm.create_model(NAME)`` build `network` with the arguments of each variant; the functions it calls
    become attributes of the network's module, where its `default_cfgs` already are.

    `convert` puts a file's tensors (the authors' or ours) under the network's names; `levels` counts the feature maps
    of ``features_only=True``.
    """
    module = sys.modules[network.__module__]
    for name, arguments in variants.items():

        def create(pretrained: bool = False, name: str = name, arguments: Any = arguments, **kwargs: Any) -> nn.Module:
            arguments = {**arguments, **kwargs}
            return build_model_with_cfg(
                network, name, pretrained,
                pretrained_filter_fn=convert and (lambda file, model: convert(file.get("model", file), model)),
                feature_cfg=dict(out_indices=tuple(range(levels(arguments))), flatten_sequential=True),
                **arguments,
            )

        create.__name__ = create.__qualname__ = name
        create.__module__ = network.__module__
        setattr(module, name, register_model(create))


def export_timm(
    model: torch.nn.Module, folder: Path, *, side: int, crop: float, classes: Sequence[str],
    model_args: Mapping[str, Any],
) -> None:
    """Writes a timm model so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

    `side` is the image's in pixels and `crop` the fraction of it kept in evaluation, as timm's data pipeline has it.
    """
    from timm.models._hub import save_config_for_hf

    folder.mkdir(exist_ok=True)
    model.pretrained_cfg |= {"input_size": (3, side, side), "crop_pct": crop}
    save_config_for_hf(model, folder / "config.json", {"label_names": list(classes)}, dict(model_args))
    save_weights(folder / "model.safetensors", model.state_dict())
