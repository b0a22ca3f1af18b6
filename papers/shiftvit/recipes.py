"""Named settings: one for each row of the paper's ImageNet table, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NAME = "ShiftViT"
TITLE = "When Shift Operation Meets Vision Transformer (AAAI 2022)"
CLAIM = "Attention can be replaced by moving a third of the channels by one pixel."
BUILT_IN = ("digits",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are the authors' ImageNet settings: DeiT's recipe, 8 GPUs x 128 images, 300 epochs."""

    about: str
    """What this recipe is, in one line."""
    model: str
    """Name of a timm model: one of `model.VARIANTS`, or any other as a baseline."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model beyond its variant's."""
    init: str | None = None
    """Fine-tuning: the run folder, file of weights (ours or the authors'), or shipped[:NAME] that the network starts
    from; its classifier starts at random where the classes are others. None: all of it at random."""
    compare: tuple[str, ...] = ()
    """Train these under this recipe, over several seeds, instead of one network: shift, the model as it is; no_shift,
    the same without moving a channel; swin, timm's Swin of like size, with attention in windows."""
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
    paper_top1: float | None = None
    """The paper's top-1 accuracy in percent for this row."""
    paper_source: str | None = None


def _row(name: str, model: str, top1: float, origin: str = "authors' README") -> Recipe:
    source = f"{name}, ImageNet-1K, 224, single crop; {origin}"
    return Recipe(f"{name}, the paper: {top1} % top-1", model, paper_top1=top1, paper_source=source)


# Small images: no batch large enough for the authors' learning rate, fewer epochs, milder augmentation.
_SMALL = Recipe(
    about="", model="shiftvit_micro", dataset="CIFAR-10", input_size_px=32, batch=128, lr=2e-3,
    crop_scale=(0.5, 1.0), erase=0.1, mixup=0.2, repeats=1, ema_decay=0.0, eval_crop=1.0,
)

RECIPES = {
    "tiny": replace(
        _SMALL, about="micro model on built-in handwritten digits, about a minute on 2 CPU cores", dataset="digits",
        epochs=20, warmup_epochs=2, flip=0.0, policy=None, erase=0.0, mixup=0.0, cutmix=0.0, ema_decay=0.99,
    ),
    "cifar10": replace(
        _SMALL, about="Shift-T/light at patch 2 on CIFAR-10, 32 px, for one GPU", model="shiftvit_light_tiny",
        model_args={"patch_size": 2}, epochs=200, warmup_epochs=10, batch=512, lr=5e-4, mixup=0.8, erase=0.25,
    ),
    "cifar10_cpu": replace(
        _SMALL, about="1.7 M parameters on CIFAR-10, 8 epochs: 20 minutes of 2 CPU cores with --precision bf16",
        model="shiftvit_r4_tiny",
        model_args={"patch_size": 2, "embed_dim": 32, "depths": (2, 2, 3, 2), "drop_path_rate": 0.0},
        epochs=8, warmup_epochs=1, policy=None, erase=0.0, mixup=0.0, cutmix=0.0,
    ),
    "imagenette": replace(
        _SMALL, about="Shift-T/light on Imagenette, 224 px, for one GPU", model="shiftvit_light_tiny",
        dataset="Imagenette", input_size_px=224, epochs=200, warmup_epochs=10, lr=5e-4, crop_scale=(0.25, 1.0),
        mixup=0.8, erase=0.25, eval_crop=0.875,
    ),
    "imagenet_tiny_light": _row("Shift-T/light", "shiftvit_light_tiny", 79.4),
    "imagenet_tiny": _row("Shift-T", "shiftvit_r2_tiny", 81.7),
    "imagenet_small_light": _row("Shift-S/light", "shiftvit_light_small", 81.6),
    "imagenet_small": _row("Shift-S", "shiftvit_r2_small", 82.8),
    "imagenet_base_light": _row("Shift-B/light", "shiftvit_light_base", 82.3, "recalled, unverified"),
    "imagenet_base": _row("Shift-B", "shiftvit_r2_base", 83.3, "recalled, unverified"),
}
# The paper's comparison in miniature: attention in place of the shift, at the same size and under the same recipe.
RECIPES["cifar10_cpu_swin"] = replace(
    RECIPES["cifar10_cpu"], about="baseline for cifar10_cpu: timm's Swin of like size",
    model="swin_tiny_patch4_window7_224",
    model_args={
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (1, 1, 3, 1),
        "num_heads": (1, 2, 4, 8), "drop_path_rate": 0.0,
    },
)
# Half the depth of Shift-T at a third of its width, and Swin cut alike: 1.67 and 1.65 M parameters.
RECIPES["attention"] = replace(
    _SMALL, about="the claim in miniature: shift, no shift, and Swin's attention at equal size, on a hundred classes",
    model="shiftvit_r2_tiny", model_args={"embed_dim": 32, "depths": (3, 4, 9, 3), "drop_path_rate": 0.0},
    compare=("shift", "no_shift", "swin"), dataset="Tiny-ImageNet-100", input_size_px=64, epochs=20, warmup_epochs=2,
    lr=4e-3, policy=None, erase=0.0, mixup=0.0, cutmix=0.0,
)
# What the shipped weights were trained with.
RECIPES["tiny_imagenet"] = replace(
    _SMALL, about="1.7 M parameters on a hundred classes at 64 px: half an hour of one core with --precision bf16",
    model="shiftvit_r2_tiny", model_args={"embed_dim": 32, "depths": (3, 4, 9, 3), "drop_path_rate": 0.05},
    dataset="Tiny-ImageNet-100", input_size_px=64, epochs=50, warmup_epochs=3, lr=4e-3, crop_scale=(0.35, 1.0),
    policy="rand-m6-mstd0.5-inc1", erase=0.0, cutmix=0.5,
)
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=2, warmup_epochs=1
)
