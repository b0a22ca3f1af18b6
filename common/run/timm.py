"""The doors to timm: what it asks of a network, its registry, and its format on disk."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, register_model, register_notrace_function
from timm.models._features import feature_take_indices
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import distribute_bn
from torch import Tensor, nn

from common.run import shipped
from common.run.checkpoints import save_weights
from common.run.resize import fitted, resize, sized
from common.run.world import World


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


class Pyramid(Backbone, nn.Module):
    """A `Backbone` of maps (B, C, H, W) with a stem and a last `norm`: what timm asks of one, features and all.

    Its feature maps, or levels, are what its stages end in. B batch, C channels, H height, W width.
    """

    def __init__(self, in_chans: int, num_classes: int, widths: Sequence[int], strides: Sequence[int]):
        """`widths` in channels and `strides` in pixels of the stages."""
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.strides = tuple(strides)
        self.feature_info = [
            dict(num_chs=width, reduction=stride, module=f"stages.{s}")
            for s, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last stage's (B, C, H, W), normalised."""
        return self.norm(self.stages(getattr(self, self.stem_name)(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools; (B, num_classes), or (B, C) with `pre_logits` or without classes."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def levels(self) -> list[Callable[[Tensor], Tensor]]:
        """What makes each feature map, (B, C, H, W), of the one before."""
        return list(self.stages)

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the levels `indices` (an int: the last ones; None: all), after what `forward_features` gives.

        `norm` normalises the last level's; `stop_early` computes no further than the last map asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: maps are NCHW")
        levels, found = self.levels(), []
        take, last = feature_take_indices(len(levels), indices)
        x = getattr(self, self.stem_name)(x)
        for i, level in enumerate(levels[: last + 1] if stop_early else levels):
            x = level(x)
            if i in take:
                found.append(self.norm(x) if norm and i == len(levels) - 1 else x)
        if intermediates_only:
            return found
        return (self.norm(x) if i == len(levels) - 1 else x), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the levels after the last one of `indices`, with the norm and head that are sized for them; returns the
        indices."""
        take, last = feature_take_indices(len(self.levels()), indices)
        cut = last < len(self.levels()) - 1
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.keep_levels(last + 1)
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def keep_levels(self, count: int) -> None:
        """Drops all levels but the first ones."""
        self.stages = self.stages[:count]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        kept = next(self.parameters())  # a head without classes does not know where it is
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features, device=kept.device, dtype=kept.dtype
        )
        self.head_hidden_size = self.head.num_features

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Makes the network take images of another size; mixing matrices are interpolated to it."""
        size = to_2tuple(img_size)
        self.check_size(size)
        for stage, stride in zip(self.stages, self.strides):
            for module in {id(m): m for m in sized(stage).values()}.values():
                resize(module, (size[0] // stride, size[1] // stride))
        stem = getattr(self, self.stem_name)
        if getattr(stem, "img_size", None):
            stem.img_size = size

    def check_size(self, img_size: tuple[int, int]) -> None:
        """ValueError for an image size that the network cannot be built for."""


@register_notrace_function  # or a symbolic trace would decide it once and for all
def of_size(x: Tensor, size: tuple[int, int], why: str) -> Tensor:
    """x, (B, C, H, W), if it has the size; else ValueError, with the reason that other sizes are not taken."""
    height, width = x.shape[-2:]
    if (height, width) != size:
        raise ValueError(
            f"images of {height}x{width} pixels: this model was built for {size[0]}x{size[1]}, "
            f"{why}. Resize them, or build the model with img_size=({height}, {width})"
        )
    return x


def imagenet_cfg(size_px: int, **changes: Any) -> dict[str, Any]:
    """timm's configuration of weights trained as all ten papers train on ImageNet-1K; `changes` add to it."""
    return dict(
        url="", input_size=(3, size_px, size_px), num_classes=1000, crop_pct=224 / 256, interpolation="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classifier="head.fc",
    ) | changes


def tagged(paper: str, name: str, cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A variant's configuration under timm's name for it: NAME.in1k with the authors' file on ImageNet-1K;
    NAME.tin100 with weights of ours that travel with the paper, of a hundred classes of Tiny-ImageNet; else
    NAME.untrained."""
    cfg = dict(cfg)
    if cfg["url"]:
        return {f"{name}.in1k": cfg}
    if (path := shipped.folder(paper) / f"{name}.safetensors").is_file():
        ours = dict(file=str(path), num_classes=100, crop_pct=1.0, license="other", origin_url=None)
        return {f"{name}.tin100": cfg | ours}
    return {f"{name}.untrained": cfg}


@contextlib.contextmanager
def _created(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    """What is created inside is created there, and of that type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device) if device is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def register(
    network: type[nn.Module], variants: Mapping[str, Mapping[str, Any]], *,
    convert: Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]] | None = None,
    levels: Callable[[Mapping[str, Any]], int] = lambda arguments: len(arguments["depths"]),
    blocks: Callable[[Mapping[str, Any]], bool] = lambda arguments: False,
) -> None:
    """Makes ``timm.create_model(NAME)`` build `network` with the arguments of each variant; the functions it calls
    become attributes of the network's module, where its `default_cfgs` already are.

    `convert` puts a file's tensors (the authors' or ours) under the network's names. `levels` counts the feature maps
    of ``features_only=True``: those of the stages or, where `blocks` says so, those of the last blocks, for which timm
    asks the network, since it cannot take a stage apart. With ``resize_mixers=True`` weights of another image size are
    interpolated; ``device`` and ``dtype`` say where and as what the network is created.
    """
    module = sys.modules[network.__module__]
    for name, arguments in variants.items():

        def create(
            pretrained: bool = False, name: str = name, arguments: Any = arguments, resize_mixers: bool = False,
            device: torch.device | str | None = None, dtype: torch.dtype | None = None, **kwargs: Any,
        ) -> nn.Module:
            def converted(file: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
                weights = file.get("model", file)
                return fitted(convert(weights, model) if convert else weights, model, interpolate=resize_mixers)

            arguments = {**arguments, **kwargs}
            cls = dict(feature_cls="getter") if blocks(arguments) else dict(flatten_sequential=True)
            features = dict(out_indices=levels(arguments) if blocks(arguments) else tuple(range(levels(arguments))))
            with _created(device, dtype):
                return build_model_with_cfg(
                    network, name, pretrained, pretrained_filter_fn=converted, feature_cfg=features | cls, **arguments
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


def average_statistics(world: World, *models: nn.Module | None) -> None:
    """Gives all processes the mean of their running statistics, which BatchNorm keeps in each for itself."""
    for model in models:
        if world.size > 1 and model is not None:
            distribute_bn(model, world.size, reduce=True)


def optimizer_and_schedule(
    model: nn.Module, recipe: Any, steps: int, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """AdamW with DeiT's rule for the batch, and a cosine after a linear warm-up, as the three backbones' authors train.

    `recipe` has lr (per 512 samples of the global batch), batch, weight_decay, warmup_epochs, warmup_lr and min_lr.
    """
    lr = recipe.lr * recipe.batch / 512
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.999))
    # Per update, not per epoch as the authors' trainer does (one epoch late): the curve is the same, without stairs.
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=recipe.min_lr, warmup_t=int(recipe.warmup_epochs * steps_per_epoch),
        warmup_lr_init=recipe.warmup_lr, t_in_epochs=False,
    )
    return optimizer, schedule
