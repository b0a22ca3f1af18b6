"""Named settings: one for each row of the paper's ImageNet table, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NAME = "sMLPNet"
TITLE = "Sparse MLP for Image Recognition (AAAI 2022)"
CLAIM = "A token needs to be mixed only with its row and its column, by matrices that all rows and columns share."
BUILT_IN = ("digits",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are the authors' ImageNet settings: DeiT's recipe, 8 GPUs x 128 images, 300 epochs."""

    about: str
    """What this recipe is, in one line."""
    model: str
    """Name of a timm model: one of `model.VARIANTS`, or another that can be built for an image size."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model beyond its variant's; the image size follows from input_size_px."""
    init: str | None = None
    """Fine-tuning: the run folder, file of weights (ours or the authors'), or shipped[:NAME] that the network starts
    from; its classifier starts at random where the classes are others. None: all of it at random."""
    compare: tuple[str, ...] = ()
    """Compare these of `model.MIXINGS` under this recipe, over several seeds, instead of training one network."""
    dataset: str = "ImageNet-1K"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    input_size_px: int = 224
    epochs: int = 300
    batch: int = 1024
    """Global batch: all devices and accumulated chunks together."""
    lr: float = 5e-4
    """Peak learning rate per 512 samples of the global batch."""
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: float = 20
    weight_decay: float = 0.05
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    policy: str | None = "rand-m9-mstd0.5-inc1"
    """Automatic augmentation in timm's notation."""
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    repeats: int = 3
    """Repeated augmentation: copies of each image that follow one another."""
    ema_decay: float = 0.99996
    """Moving average of the weights, evaluated beside them; 0: none. The paper reports the raw weights."""
    eval_crop: float = 0.875
    """Fraction of the resized image's side that the centre crop keeps."""
    eval_every: int = 0
    """Steps between evaluations; 0: an epoch. The last step is always followed by one."""
    train_accuracy: bool = False
    """Evaluate on the training images too, at the end, for the gap between the two."""
    paper_top1: float | None = None
    """The paper's top-1 accuracy in percent for this row."""
    paper_source: str | None = None


def _row(name: str, model: str, drop_path: float, top1: float, source: str) -> Recipe:
    about, args = f"{name}, the paper: {top1} % top-1", {"drop_path_rate": drop_path}  # as in the authors' code
    source = f"{name}, ImageNet-1K, 224, single crop; {source}"
    return Recipe(about, model, args, paper_top1=top1, paper_source=source)


# Small images: no batch large enough for the authors' learning rate, fewer epochs, milder augmentation.
_SMALL = Recipe(
    about="", model="smlpnet_micro", dataset="CIFAR-10", input_size_px=32, batch=128, lr=2e-3,
    crop_scale=(0.5, 1.0), erase=0.1, mixup=0.2, repeats=1, ema_decay=0.0, eval_crop=1.0, train_accuracy=True,
)
# Patches of 2 pixels: mixing matrices of side 16, 8, 4 and 2.
_DIGITS = replace(
    _SMALL, about="micro model on built-in handwritten digits, a minute or two on 2 CPU cores", dataset="digits",
    model_args={"patch_size": 2, "embed_dim": 16}, epochs=20, warmup_epochs=2,
    flip=0.0, policy=None, erase=0.0, mixup=0.0, cutmix=0.0, ema_decay=0.95,
)

RECIPES = {
    "tiny": _DIGITS,
    "sharing": replace(
        _DIGITS, about="the claim in miniature: sparse, unshared and dense mixing at equal width, 3 seeds, on digits",
        compare=("sparse", "unshared", "dense"),
        # no augmentation, which would hide who learns the training images by heart
        crop_scale=(1.0, 1.0), ema_decay=0.0, epochs=12, eval_every=12 * 11,
    ),
    "cifar10": replace(
        _SMALL, about="sMLPNet-T at patch 2 on CIFAR-10, 32 px, for one GPU", model="smlpnet_tiny",
        model_args={"patch_size": 2}, epochs=200, warmup_epochs=10, batch=512, lr=5e-4, mixup=0.8, erase=0.25,
    ),
    "imagenette": replace(
        _SMALL, about="sMLPNet-T on Imagenette, 224 px, for one GPU", model="smlpnet_tiny",
        dataset="Imagenette", input_size_px=224, epochs=200, warmup_epochs=10, lr=5e-4, crop_scale=(0.25, 1.0),
        mixup=0.8, erase=0.25, eval_crop=0.875,
    ),
    "imagenet_tiny": _row("sMLPNet-T", "smlpnet_tiny", 0.0, 81.9, "paper's abstract, authors' README"),
    "imagenet_small": _row("sMLPNet-S", "smlpnet_small", 0.2, 83.1, "authors' README"),
    "imagenet_base": _row("sMLPNet-B", "smlpnet_base", 0.3, 83.4, "paper's abstract, authors' README"),
}
RECIPES["sharing_cifar10"] = replace(
    RECIPES["sharing"], about="the same on CIFAR-10, for one GPU", dataset="CIFAR-10",
    model_args={"patch_size": 2, "embed_dim": 32}, epochs=60, warmup_epochs=5, flip=0.5, eval_every=60 * 390,
)
# Patches of 2 pixels: the first stage mixes a map of 32 x 32, by 2 x 32^2 weights or by 32^4.
RECIPES["sharing_tiny_imagenet"] = replace(
    RECIPES["sharing"], about="the same on a hundred classes at 64 px: hours of one core with --precision bf16",
    model="smlpnet_tiny", model_args={"patch_size": 2, "embed_dim": 16, "depths": (1, 2, 3, 1)},
    dataset="Tiny-ImageNet-100", input_size_px=64, epochs=15, warmup_epochs=2, lr=4e-3, flip=0.5, eval_every=0,
)
# What the shipped weights were trained with.
RECIPES["tiny_imagenet"] = replace(
    _SMALL, about="1.9 M parameters on a hundred classes at 64 px: half an hour of one core with --precision bf16",
    model="smlpnet_tiny", model_args={"embed_dim": 32, "depths": (2, 2, 3, 2), "drop_path_rate": 0.05},
    dataset="Tiny-ImageNet-100", input_size_px=64, epochs=50, warmup_epochs=3, lr=4e-3, crop_scale=(0.35, 1.0),
    policy="rand-m6-mstd0.5-inc1", erase=0.0, cutmix=0.5,
)
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=2, warmup_epochs=1
)
