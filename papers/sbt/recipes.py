"""Named settings: the published configurations, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NAME = "SBT"
TITLE = "Correlation-Aware Deep Tracking (CVPR 2022)"
CLAIM = "Template and search image meet inside the backbone, in cross-attention; no correlation module is left."
BUILT_IN = ("sequences", "hard_sequences", "digits")  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are the authors' settings for the base model: eight GPUs x 20 pairs."""

    about: str
    """What this recipe is, in one line."""
    model: str = "sbt_base"
    """A variant of `model.VARIANTS`; with head 'correlation' also any timm backbone with a map of stride 8."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the backbone beyond its variant's."""
    head: str = "mixer"
    """mixer, mlp (no spatial mixing), or correlation (a plain correlation tracker: correlation.py)."""
    init: str | None = "pvt_v2"
    """What the backbone starts from: a model of timm whose ImageNet weights timm fetches (pvt_v2: B1 for light, B2 for
    small, else B3), a file of weights, or the run folder of a pre-training (recipe pretrain). None: at random."""
    authors_errors: bool = False
    """Err where the authors' code errs: see README, differences."""
    dataset: str = "GOT-10k"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    datasets: tuple[str, ...] = ("got10k",)
    """Training sets under the data folder: got10k, lasot, trackingnet, coco."""
    shares: tuple[float, ...] = ()
    """Probability of each of `datasets`; empty: equal."""
    held_out: tuple[str, ...] = ()
    """Data sets that are tracked at the end; of one that also trains, its validation split (`pairs.open_data`)."""
    coco_side_px: float = 0.0
    """Of COCO's objects those count that are wider and higher than this; 0: all but crowds, as in the authors' code."""
    template_px: int = 128
    search_px: int = 256
    template_factor: float = 2.0
    """Side of the template crop in mean sides of the target."""
    search_factor: float = 5.0
    center_jitter: float = 4.5
    """Search center in training: uniform over this many mean sides of the target, per axis."""
    scale_jitter: float = 0.5
    """Search size in training: standard deviation of the logarithm of each side."""
    gray: float = 0.05
    flip: float = 0.5
    brightness: float = 0.2
    max_gap: int = 200
    """Frames between template and search image, at most."""
    pairs_per_epoch: int = 60_000
    epochs: int = 500
    float32: bool = True
    """Without autocast on a GPU too, as the authors trained; --precision bf16 asks for it nevertheless."""
    batch: int = 160
    """Global batch: all devices and accumulated chunks together."""
    lr: float = 1e-3
    """Learning rate of the heads."""
    backbone_lr_scale: float = 0.1
    """The backbone's learning rate is this times the heads'."""
    warmup_steps: int = 0
    milestones: tuple[int, ...] = (400,)
    """After each of these epochs the learning rate is a tenth of what it was."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    """Largest gradient norm; 0: no clipping."""
    eval_every: int = 7500  # 20 epochs
    """Steps between losses on validation pairs, where the data have a validation split; 0: once an epoch."""
    val_pairs: int = 10_000
    window: float = 0.49
    """Weight of the Hann window in a token's score in tracking; the network's has the rest."""
    size_lr: float = 1.0
    """Share of the predicted size in the new one, the last one's has the rest; 1, as published: the prediction as it
    is. A network whose sizes are off by a tenth otherwise walks its own crop's size away."""
    speed: str = "eager"
    """How a tracker runs its network: eager, compile, or graph (a CUDA graph; written, not yet run on a GPU)."""
    compare: tuple[str, ...] = ()
    """Train these networks (compare.py) under this recipe instead of one."""
    paper_scores: dict[str, float] = field(default_factory=dict)
    """The paper's figures, by data set and metric."""
    paper_source: str | None = None


@dataclass(frozen=True)
class Pretrain:
    """Training the single-image path, four stages, as an ImageNet classifier. The paper says that this is done and not
    how, and the authors' code lacks it; the settings are PVTv2's, that is DeiT's."""

    about: str
    """What this recipe is, in one line."""
    model: str = "sbt_base"
    """A variant of `model.VARIANTS`."""
    model_args: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    """Fine-tuning: the run folder, file of weights, or shipped[:NAME] that the network starts from; its classifier
    starts at random where the classes are others. None: all of it at random."""
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
    """Of the first step."""
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    policy: str | None = "rand-m9-mstd0.5-inc1"
    """Automatic augmentation in timm's notation."""
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    eval_crop: float = 0.875
    """Fraction of the resized image's side that the center crop keeps."""
    paper_top1: float | None = None
    paper_source: str | None = None


_BASE = {"got10k ao": 69.9, "lasot auc": 65.9}
_BASE_SOURCE = "SBT-base; recalled, unverified (the authors' README has 69.7 and, for another training, 68.0)"
_LARGE = {"got10k ao": 70.4, "lasot auc": 66.7}
_LARGE_SOURCE = "SBT-large, as other papers' tables quote it"


def _only(scores: dict[str, float], data: str) -> dict[str, float]:
    return {name: value for name, value in scores.items() if name.startswith(data)}


# Micro crops and a micro network; from random weights, so one learning rate for all and a short warm-up. At the full
# search area and jitter a few minutes of training leave the boxes too coarse to follow anything; at much less jitter
# the target is nearly always what stands in the middle, and the network learns that and not to compare. The authors
# mirror template and search image independently: no target does that, and so short a training does better without.
_SMALL = Recipe(
    about="", model="sbt_micro", model_args={"drop_path_rate": 0.0}, init=None, dataset="sequences",
    template_px=48, search_px=64, search_factor=2.5, center_jitter=1.8, scale_jitter=0.2, flip=0.0,
    pairs_per_epoch=3200, epochs=8, batch=32, lr=2e-3, backbone_lr_scale=1.0, warmup_steps=20, milestones=(6,),
    clip_norm=100.0, eval_every=200, val_pairs=192, max_gap=30, coco_side_px=50.0, float32=False,
)
# Four real sequences are soon learned by heart, hence the generated ones beside them. Where crops hardly vary in scale,
# a box of so many hundredths of the crop is nearly always right: a network learns that instead of the target's size,
# and on other videos boxes then grow without end. Hence the strong jitter.
_REAL = replace(
    _SMALL, dataset="OTB, VOT, GOT-10k, LaSOT and coco side by side", scale_jitter=0.6, lr=1e-3,
    pairs_per_epoch=1600, epochs=14, milestones=(11,), max_gap=100,
)
# Forty real sequences, two COCO splits and the generated ones; crops three targets wide, of 96 px. What is tracked
# at the end are six more real sequences, or, to choose settings on, seven of the forty, which then train nothing.
_MORE = replace(
    _REAL, head="correlation", dataset="46 real sequences and COCO",
    datasets=("sequences", "got10k", "otb", "vot", "lasot", "tinytlp", "coco"),
    shares=(0.15, 0.36, 0.05, 0.02, 0.02, 0.04, 0.36), held_out=("got10k",), template_px=64, search_px=96,
    search_factor=3.0, center_jitter=2.0, scale_jitter=0.4, size_lr=0.5, pairs_per_epoch=3200, epochs=24,
    milestones=(20,), eval_every=800,
)
_FOLD = replace(
    _MORE, datasets=("sequences", "got10k", "coco"), shares=(0.2, 0.44, 0.36),
    held_out=("otb", "vot", "lasot", "tinytlp"),
)
_FULL = ("got10k", "lasot", "trackingnet", "coco")

RECIPES = {
    "tiny": replace(_SMALL, about="micro model on built-in sequences, four minutes of a CPU core"),
    "ablation": replace(
        _SMALL, about="number and place of the cross blocks, the head, a correlation tracker: micro models",
        compare=("none", "one", "early", "interleaved", "late", "all", "mlp_head", "correlation", "correlation_sbt"),
        eval_every=800,
    ),
    "real_small": replace(
        _REAL, about="micro model on generated and real sequences and COCO objects, tested on the OTB folder",
        datasets=("sequences", "vot", "got10k", "lasot", "coco"), shares=(0.6, 0.1, 0.1, 0.1, 0.1), held_out=("otb",),
    ),
    "real_small_otb": replace(
        _REAL, about="the other way round: OTB trains, the others test", datasets=("sequences", "otb", "coco"),
        shares=(0.6, 0.2, 0.2), held_out=("vot", "got10k", "lasot"),
    ),
    "real_more": replace(
        _MORE, about="micro model with the correlation head on 40 real sequences: start it from pretrain_hundred"
    ),
    "real_more_fold": replace(
        _FOLD, about="the same without seven of the 40, which are tracked: to choose settings on"
    ),
    "got10k": Recipe(
        "SBT-base, GOT-10k alone (its protocol), the paper: 69.9 AO", epochs=100, milestones=(80,),
        paper_scores=_only(_BASE, "got10k"), paper_source=_BASE_SOURCE,
    ),
    "got10k_large": Recipe(
        "SBT-large, GOT-10k alone, the paper: 70.4 AO", model="sbt_large", batch=96, epochs=100,
        milestones=(80,), eval_every=12_500, paper_scores=_only(_LARGE, "got10k"), paper_source=_LARGE_SOURCE,
    ),
    "full": Recipe(
        "SBT-base, four data sets, the paper: 65.9 AUC on LaSOT", dataset="GOT-10k, LaSOT, TrackingNet, COCO",
        datasets=_FULL, paper_scores=_only(_BASE, "lasot"), paper_source=_BASE_SOURCE,
    ),
    "full_large": Recipe(
        "SBT-large, four data sets, the paper: 66.7 AUC on LaSOT", model="sbt_large", batch=96, epochs=300,
        milestones=(240,), eval_every=12_500, dataset="GOT-10k, LaSOT, TrackingNet, COCO", datasets=_FULL,
        paper_scores=_only(_LARGE, "lasot"), paper_source=_LARGE_SOURCE,
    ),
    "full_huge": Recipe(
        "huge model of the authors' code, four data sets, under large's schedule; no figure is published",
        model="sbt_huge", batch=96, epochs=300, milestones=(240,), eval_every=12_500,
        dataset="GOT-10k, LaSOT, TrackingNet, COCO", datasets=_FULL,
    ),
    "pretrain": Pretrain("base model's single-image path as an ImageNet-1K classifier, to start a tracker from"),
    "pretrain_small": Pretrain(
        "micro model on ten classes of ImageNet at 64 px, to start small trackers from: 4 minutes of a core",
        model="sbt_micro", dataset="Imagenette", input_size_px=64, epochs=16, batch=64, lr=4e-3, warmup_epochs=1,
        crop_scale=(0.25, 1.0), policy=None, erase=0.0, mixup=0.0, cutmix=0.0,
    ),
    "pretrain_hundred": Pretrain(
        "micro model on a hundred classes of Tiny-ImageNet, 64 px, to start small trackers from: 20 minutes of a core",
        model="sbt_micro", dataset="Tiny-ImageNet-100", input_size_px=64, epochs=6, batch=64, lr=8e-3,
        warmup_epochs=0.5, crop_scale=(0.25, 1.0), policy=None, erase=0.0, mixup=0.0, cutmix=0.0, eval_crop=1.0,
    ),
    "pretrain_tiny": Pretrain(
        "micro model's single-image path on built-in handwritten digits, a minute on 2 CPU cores", model="sbt_micro",
        dataset="digits", input_size_px=32, epochs=8, batch=128, lr=4e-3, warmup_epochs=1, crop_scale=(0.5, 1.0),
        flip=0.0, policy=None, erase=0.0, mixup=0.0, cutmix=0.0, eval_crop=1.0,
    ),
}
# The published base is another training than the paper's, with figures of its own.
_PUBLISHED_BASE = {
    "paper_scores": {"lasot auc": 68.0, "lasot norm_precision": 77.8, "lasot precision": 73.9},
    "paper_source": "the authors' README, SBT-base as published (not the paper's 65.9)",
}
for _size, _recipe in (("base", "full"), ("large", "full_large"), ("huge", "full_huge")):
    RECIPES[f"authors_{_size}"] = replace(
        RECIPES[_recipe], about=f"{_recipe}, erring where the authors' code errs: for their weights",
        authors_errors=True, **(_PUBLISHED_BASE if _size == "base" else {}),
    )
RECIPES["correlation"] = replace(
    RECIPES["tiny"], about="tiny with SBT's features in a plain correlation tracker", head="correlation"
)
RECIPES["tiny_hard"] = replace(
    RECIPES["tiny"], about="tiny on built-in sequences whose targets change their look, size and shape",
    dataset="hard_sequences",
)
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", pairs_per_epoch=64, epochs=2, batch=8,
    warmup_steps=2, milestones=(1,), eval_every=0, val_pairs=16,
)
