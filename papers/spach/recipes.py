"""Named settings: one for each network of the paper's ImageNet tables, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NAME = "SPACH"
TITLE = "A Battle of Network Structures: CNN, Transformer, and MLP (arXiv 2108.13002)"
CLAIM = "In one framework all three compete; scaled up, convolution generalises best and MLP overfits unless shared."
BUILT_IN = ("digits",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are the authors' ImageNet settings: DeiT's recipe, 8 GPUs x 128 images, 300 epochs."""

    about: str
    """What this recipe is, in one line."""
    model: str
    """Name of a timm model: one of `model.VARIANTS`, or another that can be built for an image size. In a comparison,
    {mixer} stands for conv, attn and mlp in turn."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model beyond its variant's; the image size follows from input_size_px."""
    init: str | None = None
    """Fine-tuning: the run folder, file of weights (ours or the authors'), or shipped[:NAME] that the network starts
    from; its classifier starts at random where the classes are others. None: all of it at random."""
    compare: tuple[str, ...] = ()
    """Compare these under this recipe, over several seeds, instead of training one network: conv, attn, mlp, mlp_shared
    (one spatial MLP for all blocks of a stage), attn_bare and mlp_bare (without the bypass)."""
    widths: tuple[int, ...] = ()
    """The embed_dim of the sizes at which each of them is trained."""
    dataset: str = "ImageNet-1K"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    input_size_px: int = 224
    epochs: int = 300
    batch: int = 1024
    """Global batch: all devices and accumulated chunks together."""
    lr: float = 5e-4
    """Peak learning rate per 512 samples of the global batch. The paper prints ten times as much; the authors' code
    has this, which is DeiT's."""
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


README, TEXT = "authors' README", "the paper's text"
STEP = "from the difference to the multi-stage model stated in the paper's text"
# What the paper calls it, our model, top-1 and where it stands; no figure where none could be recovered.
_ROWS = [
    ("Conv-XXS", "xxs_patch16_224_conv", None, None), ("Trans-XXS", "xxs_patch16_224_attn", 68.0, STEP),
    ("MLP-XXS", "xxs_patch16_224_mlp", None, None),
    ("Conv-XS", "xs_patch16_224_conv", None, None), ("Trans-XS", "xs_patch16_224_attn", None, None),
    ("MLP-XS", "xs_patch16_224_mlp", None, None),
    ("Conv-S", "s_patch16_224_conv", None, None), ("Trans-S", "s_patch16_224_attn", None, None),
    ("MLP-S", "s_patch16_224_mlp", 79.5, STEP), ("MLP-S+Shared", "s_patch16_224_mlp_shared", None, None),
    ("Conv-MS-XXS", "ms_xxs_patch4_224_conv", 73.1, README), ("Trans-MS-XXS", "ms_xxs_patch4_224_attn", 65.4, README),
    ("MLP-MS-XXS", "ms_xxs_patch4_224_mlp", 74.5, README),
    ("Conv-MS-XS", "ms_xs_patch4_224_conv", None, None), ("Trans-MS-XS", "ms_xs_patch4_224_attn", None, None),
    ("MLP-MS-XS", "ms_xs_patch4_224_mlp", None, None),
    ("Conv-MS-S", "ms_s_patch4_224_conv", 81.6, README), ("Trans-MS-S", "ms_s_patch4_224_attn", 82.9, README),
    ("MLP-MS-S", "ms_s_patch4_224_mlp", 82.1, f"{TEXT} and {README}"),
    ("MLP-MS-S+Shared", "ms_s_patch4_224_mlp_shared", None, None),
    ("Hybrid-MS-XS", "ms_xs_patch4_224_hybrid", 82.4, TEXT),
    ("Hybrid-MS-S", "ms_s_patch4_224_hybrid", 83.7, f"{TEXT} and {README}"),
    ("Hybrid-MS-XS+", "ms_xs_patch4_224_hybrid_plus", None, None),
    ("Hybrid-MS-S+", "ms_s_patch4_224_hybrid_plus", 83.9, f"{TEXT} and {README}"),
]


def _row(name: str, model: str, top1: float | None, source: str | None) -> Recipe:
    # One rate for all: the authors' command line passes it, and no other is stated.
    args = {"drop_path_rate": 0.1} | ({"share_mixers": True} if model.endswith("_shared") else {})
    source = f"{name}, ImageNet-1K, 224, single crop; {source}" if source else None
    about = f"{name}, the paper: " + (f"{top1} % top-1" if top1 else "figure not recovered")
    return Recipe(about, f"spach_{model.removesuffix('_shared')}", args, paper_top1=top1, paper_source=source)


# Small images: no batch large enough for the authors' learning rate, fewer epochs, milder augmentation.
_SMALL = Recipe(
    about="", model="spach_ms_micro_patch4_attn", dataset="CIFAR-10", input_size_px=32, batch=128, lr=2e-3,
    crop_scale=(0.5, 1.0), erase=0.1, mixup=0.2, repeats=1, ema_decay=0.0, eval_crop=1.0, train_accuracy=True,
)
_BATTLE = replace(
    _SMALL, model="spach_ms_xxs_patch4_224_{mixer}", compare=("conv", "attn", "mlp", "mlp_shared"),
    # no augmentation, which would hide who learns the training images by heart
    crop_scale=(1.0, 1.0), policy=None, erase=0.0, mixup=0.0, cutmix=0.0,
)

RECIPES = {
    "tiny": replace(
        _SMALL, about="hybrid micro model on built-in handwritten digits, about a minute on 2 CPU cores",
        # 256 tokens for convolution, 64 for the MLP, 16 and 4 for attention: every mixer in one network
        model_args={"patch_size": 2, "stages": ((("conv", 1),), (("mlp", 1),), (("attn", 2),), (("attn", 1),))},
        dataset="digits", epochs=20, warmup_epochs=2,
        flip=0.0, policy=None, erase=0.0, mixup=0.0, cutmix=0.0, ema_decay=0.95,
    ),
    "battle": replace(
        _BATTLE, about="the paper's comparison: conv, attention, MLP and shared MLP at two sizes, 3 seeds, on digits",
        compare=(*_BATTLE.compare, "attn_bare", "mlp_bare"), widths=(8, 16), model_args={"patch_size": 2},
        dataset="digits", epochs=10, warmup_epochs=2, batch=64, lr=8e-3, flip=0.0, eval_every=10 * 22,
    ),
    "battle_cifar10": replace(
        _BATTLE, about="the same on CIFAR-10, for one GPU", model_args={"patch_size": 2}, widths=(16, 32, 64),
        epochs=60, warmup_epochs=5, eval_every=60 * 390,
    ),
    "battle_imagenette": replace(
        _BATTLE, about="the same on Imagenette at 224 px, for one GPU", dataset="Imagenette", input_size_px=224,
        widths=(32, 64, 96), epochs=60, warmup_epochs=5, eval_every=60 * 73, crop_scale=(0.25, 1.0), eval_crop=0.875,
    ),
    "battle_tiny_imagenet": replace(
        _BATTLE, about="the same on a hundred classes at 64 px, 2 seeds: two hours of one core with --precision bf16",
        compare=("conv", "attn", "mlp"), widths=(12, 20, 32), dataset="Tiny-ImageNet-100", input_size_px=64,
        epochs=15, warmup_epochs=2, lr=4e-3,
    ),
    # What the shipped weights were trained with: a hybrid as the paper's best network is, smaller.
    "tiny_imagenet": replace(
        _SMALL, about="hybrid of 1.9 M parameters on a hundred classes at 64 px: half an hour of one core, bf16",
        model="spach_ms_xxs_patch4_224_attn",
        model_args={
            "embed_dim": 32, "drop_path_rate": 0.05,
            "stages": ((("conv", 2),), (("conv", 2),), (("conv", 3), ("attn", 3)), (("attn", 2),)),
        },
        dataset="Tiny-ImageNet-100", input_size_px=64, epochs=50, warmup_epochs=3, lr=4e-3, crop_scale=(0.35, 1.0),
        policy="rand-m6-mstd0.5-inc1", erase=0.0, cutmix=0.5,
    ),
    "cifar10": replace(
        _SMALL, about="Hybrid-MS-XS at patch 2 on CIFAR-10, 32 px, for one GPU", model="spach_ms_xs_patch4_224_hybrid",
        model_args={"patch_size": 2, "drop_path_rate": 0.1}, epochs=200, warmup_epochs=10, batch=512, lr=5e-4,
        mixup=0.8, erase=0.25,
    ),
    "imagenette": replace(
        _SMALL, about="Hybrid-MS-XS on Imagenette, 224 px, for one GPU", model="spach_ms_xs_patch4_224_hybrid",
        model_args={"drop_path_rate": 0.1}, dataset="Imagenette", input_size_px=224, epochs=200, warmup_epochs=10,
        lr=5e-4, crop_scale=(0.25, 1.0), mixup=0.8, erase=0.25, eval_crop=0.875,
    ),
    **{
        f"imagenet_{model.replace('_patch16_224', '').replace('_patch4_224', '')}": _row(name, model, top1, source)
        for name, model, top1, source in _ROWS
    },
}
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=2, warmup_epochs=1
)
