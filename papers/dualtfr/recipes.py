"""Named settings: the reconstruction at full scale, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NAME = "DualTFR"
TITLE = "Learning Tracking Representations via Dual-Branch Fully Transformer Networks (ICCV Workshops 2021)"
CLAIM = "A tracker without a CNN: attention within windows, over each image, and between the two images."
BUILT_IN = ("sequences", "hard_sequences", "digits")  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Training a tracker. Nothing is known of the authors' settings but the data sets; the defaults are those of their
    next tracker, SBT, with the crops of TransT."""

    about: str
    """What this recipe is, in one line."""
    model: str = "dualtfr"
    """A variant of `model.VARIANTS`."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of `model.DualTFR` beyond the variant's, such as cab_after or blocks."""
    init: str | None = "swin_tiny_patch4_window7_224"
    """What the branch starts from: a Swin of timm, whose ImageNet weights timm fetches, a file of weights, or the run
    folder of a pre-training (recipe pretrain). None: at random."""
    dataset: str = "GOT-10k"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    datasets: tuple[str, ...] = ("got10k",)
    """Training sets under the data folder: got10k, lasot, trackingnet, coco."""
    shares: tuple[float, ...] = ()
    """Probability of each of `datasets`; empty: equal."""
    held_out: tuple[str, ...] = ()
    """Data sets that are tracked at the end; of one that also trains, its validation split (`pairs.open_data`)."""
    template_px: int = 112
    search_px: int = 224
    template_factor: float = 2.0
    """Side of the template crop in mean sides of the target."""
    search_factor: float = 4.0
    center_jitter: float = 3.0
    """Search center in training: uniform over this many mean sides of the target, per axis."""
    scale_jitter: float = 0.25
    """Search size in training: standard deviation of the logarithm of each side."""
    gray: float = 0.05
    flip: float = 0.5
    brightness: float = 0.2
    max_gap: int = 200
    """Frames between template and search image, at most."""
    pairs_per_epoch: int = 60_000
    epochs: int = 500
    batch: int = 160
    """Global batch: all devices and accumulated chunks together."""
    lr: float = 1e-3
    """Learning rate of the CABs and the head."""
    backbone_lr_scale: float = 0.1
    """The branch's learning rate is this times that."""
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
    """How a tracker runs its network: eager, or compile (torch.compile; on a GPU with CUDA graphs, not yet tried)."""
    compare: tuple[str, ...] = ()
    """Train these networks (compare.py) under this recipe instead of one."""
    compare_init: str | None = None
    """Weights for the member of a comparison of that name: a file, or the run folder of a pre-training."""
    paper_scores: dict[str, float] = field(default_factory=dict)
    """The paper's figures, by data set and metric."""
    paper_source: str | None = None


@dataclass(frozen=True)
class Pretrain:
    """Training a branch as an image classifier, to start a tracker from. The settings are Swin's, that is DeiT's."""

    about: str
    """What this recipe is, in one line."""
    model: str = "dualtfr"
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
    min_lr: float = 5e-6
    warmup_lr: float = 5e-7
    """Of the first step."""
    warmup_epochs: float = 20
    weight_decay: float = 0.05
    clip_norm: float = 5.0
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


_SOURCE = "recalled, unverified; never to be compared"

# A micro network and micro crops; from random weights, so one learning rate for all and a short warm-up. At the full
# search area and jitter a few minutes of training leave the boxes too coarse to follow anything, and images mirrored
# independently make matching harder. Training is as long as that of SBT's small recipes, so that the two compare.
_SMALL = Recipe(
    about="", model="dualtfr_micro", init=None, dataset="sequences", template_px=32, search_px=64, search_factor=2.5,
    center_jitter=1.0, scale_jitter=0.2, flip=0.0, pairs_per_epoch=3200, epochs=8, batch=32, lr=2e-3,
    backbone_lr_scale=1.0, warmup_steps=20, milestones=(6,), clip_norm=100.0, eval_every=200, val_pairs=192, max_gap=30,
)
# Four real sequences are soon learned by heart, hence the generated ones beside them. Where crops hardly vary in scale,
# a box of so many hundredths of the crop is nearly always right: a network learns that instead of the target's size,
# and on other videos boxes then grow without end. Hence the strong jitter.
_REAL = replace(
    _SMALL, dataset="OTB, VOT, GOT-10k, LaSOT and coco side by side", template_px=48, scale_jitter=0.6, lr=1e-3,
    pairs_per_epoch=1600, epochs=14, milestones=(11,), max_gap=100,
)

# Forty real sequences, two COCO splits and the generated ones; crops three targets wide, of 96 px. What is tracked
# at the end are six more real sequences, or, to choose settings on, seven of the forty, which then train nothing.
_MORE = replace(
    _REAL, model_args={"gab_grid": 12}, dataset="46 real sequences and COCO",
    datasets=("sequences", "got10k", "otb", "vot", "lasot", "tinytlp", "coco"),
    shares=(0.15, 0.36, 0.05, 0.02, 0.02, 0.04, 0.36), held_out=("got10k",), template_px=64, search_px=96,
    search_factor=3.0, center_jitter=2.0, scale_jitter=0.4, size_lr=0.5, pairs_per_epoch=3200, epochs=16,
    milestones=(13,), eval_every=800,
)
_FOLD = replace(
    _MORE, datasets=("sequences", "got10k", "coco"), shares=(0.2, 0.44, 0.36),
    held_out=("otb", "vot", "lasot", "tinytlp"),
)

RECIPES = {
    "tiny": replace(
        _SMALL, about="micro model on built-in sequences, three minutes of a CPU core", epochs=4, milestones=(3,)
    ),
    "ablation": replace(
        _SMALL, about="number and place of the CABs, kinds of block, pre-training: micro models",
        compare=(
            "cab0", "cab1", "cab2", "cab4", "early", "between", "local", "no_bias", "no_reference", "no_position",
        ),
        epochs=4, milestones=(3,), eval_every=400,
    ),
    "real_small": replace(
        _REAL, about="micro model on generated and real sequences and COCO objects, tested on the OTB folder",
        datasets=("sequences", "vot", "got10k", "lasot", "coco"), shares=(0.6, 0.1, 0.1, 0.1, 0.1), held_out=("otb",),
    ),
    "real_small_otb": replace(
        _REAL, about="the other way round: OTB trains, the others test", datasets=("sequences", "otb", "coco"),
        shares=(0.6, 0.2, 0.2), held_out=("vot", "got10k", "lasot"),
    ),
    "real_more": replace(_MORE, about="micro model on 40 real sequences: start it from pretrain_hundred"),
    "real_more_fold": replace(
        _FOLD, about="the same without seven of the 40, which are tracked: to choose settings on"
    ),
    "got10k": Recipe(
        "DualTFR, GOT-10k alone (its protocol); the paper, from memory: 73.5 AO", epochs=100, milestones=(80,),
        paper_scores={"got10k ao": 73.5, "got10k sr50": 84.8, "got10k sr75": 69.9}, paper_source=_SOURCE,
    ),
    "full": Recipe(
        "DualTFR, four data sets; the paper, from memory: 63.5 AUC on LaSOT",
        dataset="GOT-10k, LaSOT, TrackingNet, COCO", datasets=("got10k", "lasot", "trackingnet", "coco"),
        paper_scores={"lasot auc": 63.5, "lasot norm_precision": 72.0, "lasot precision": 66.5}, paper_source=_SOURCE,
    ),
    "pretrain": Pretrain("a branch as an ImageNet-1K classifier, to start a tracker from"),
    "pretrain_small": Pretrain(
        "the micro branch on ten classes of ImageNet at 64 px, to start small trackers from: minutes of a core",
        model="dualtfr_micro", dataset="Imagenette", input_size_px=64, epochs=6, batch=64, lr=4e-3,
        warmup_epochs=1, crop_scale=(0.25, 1.0), policy=None, erase=0.0, mixup=0.0, cutmix=0.0,
    ),
    "pretrain_hundred": Pretrain(
        "the micro branch on a hundred classes of Tiny-ImageNet, 64 px, to start small trackers from: 20 minutes of a "
        "core", model="dualtfr_micro", model_args={"gab_grid": 12}, dataset="Tiny-ImageNet-100",
        input_size_px=64, epochs=5, batch=64, lr=8e-3, warmup_epochs=0.5, crop_scale=(0.25, 1.0), policy=None,
        erase=0.0, mixup=0.0, cutmix=0.0, eval_crop=1.0,
    ),
    "pretrain_tiny": Pretrain(
        "the micro branch on built-in handwritten digits, a minute on 2 CPU cores", model="dualtfr_micro",
        dataset="digits", input_size_px=32, epochs=8, batch=128, lr=4e-3, warmup_epochs=1, crop_scale=(0.5, 1.0),
        flip=0.0, policy=None, erase=0.0, mixup=0.0, cutmix=0.0, eval_crop=1.0,
    ),
}
RECIPES["tiny_hard"] = replace(
    RECIPES["tiny"], about="tiny on built-in sequences whose targets change their look, size and shape",
    dataset="hard_sequences",
)
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", pairs_per_epoch=64, epochs=2, batch=8,
    warmup_steps=2, milestones=(1,), eval_every=0, val_pairs=16,
)
