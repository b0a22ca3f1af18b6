"""Named settings: the paper's two trackers, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed. README.md says which values are the
paper's and which had to be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

NAME = "Retina-MAML, FCOS-MAML"
TITLE = "Tracking by Instance Detection: A Meta-Learning Approach (CVPR 2020, oral)"
CLAIM = "A detector meta-trained with MAML becomes a tracker by a few gradient steps on the first frame."
BUILT_IN = ("sequences", "hard_sequences",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are the full-size tracker's."""

    about: str
    """What this recipe is, in one line."""
    head: str = "retina"
    """retina or fcos."""
    backbone: str = "resnet18"
    """resnet18, narrow, efficientnet_lite0 or lite0_levels."""
    imagenet: bool = True
    """Start the backbone from ImageNet weights."""
    frozen: bool = False
    """Leave the backbone as it starts; else the detection stage trains it, and it is frozen from then on."""
    init: str | None = None
    """Start the detector from a file of weights: another run's detection.safetensors makes its first stage needless."""
    head_width: int = 256
    head_depth: int = 3
    """Convolutions of each tower before its output."""
    dataset: str = "LaSOT, GOT-10k, TrackingNet, COCO"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    datasets: tuple[str, ...] = ("lasot", "got10k", "trackingnet", "coco")
    """Training sets under the data folder."""
    shares: tuple[float, ...] = ()
    """Probability of each of `datasets`; empty: equal."""
    held_out: tuple[str, ...] = ()
    """Data sets that are tracked at the end; of one that also trains, its validation split (`pairs.open_data`)."""

    crop_px: int = 263
    context: float = 263 / 127
    """Side of the crop over the target's side with its margin, sqrt((w + p) (h + p)), p = (w + h) / 2."""
    anchor_px: int = 64
    """Side of RetinaNet's anchor: a square target's in the crop."""
    zoom: float = 1.08
    """The support set is the first crop, and it enlarged and reduced by this; 1: the first crop alone."""
    support_shift_px: float = 64.0
    """Largest shift of the enlarged and the reduced crop, per axis, in crop pixels; 0: none."""
    shift_px: float = 64.0
    """Largest shift of the target's crop in training, per axis, in crop pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the target's size in its crop in training, over the usual size: the crop's side is divided by it."""
    gray: float = 0.05
    """Probability that the target's crop loses its color."""
    brightness: float = 0.2
    max_gap: int = 100
    """Frames between support and target image, at most."""
    negatives: float = 0.1
    """Share of pairs whose target image is of another video, and holds no target."""

    inner_steps: int = 4
    """k: gradient steps of the inner loop in training; 0: plain detection training throughout."""
    rate: float = 1e-3
    """alpha at the start: learning rate of every gradient step."""
    granularity: str = "per_tensor"
    """One learned rate for each tensor (per_tensor) or each filter (per_filter)."""
    rate_lr: float = 1e-3
    """Learning rate of the rates; 0: they stay."""
    multi_step: str = "uniform"
    """Weights of the target losses after 0..k steps: uniform, annealed or last."""
    second_order: bool = True
    """Differentiate through the gradient steps; otherwise their gradient counts as a constant."""
    checkpointing: bool = True
    """Compute each gradient step anew in the backward pass instead of keeping its graph."""

    pairs_per_epoch: int = 60_000
    detection_epochs: int = 5
    """Plain detection training on the target images, before meta-training."""
    epochs: int = 20
    """Meta-training."""
    batch: int = 32
    """Global batch, in pairs: all devices and accumulated parts together."""
    lr: float = 0.01
    milestones: tuple[int, ...] = (10, 15)
    """Epochs of meta-training after which the learning rates fall to a tenth."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float = 10.0
    """Largest gradient norm; 0: no clipping."""
    val_pairs: int = 1_000
    """Validation pairs for the losses after each gradient step; 0: none."""
    eval_every: int = 0
    """Steps between validations; 0: one each epoch."""

    first_steps: int = 5
    """Gradient steps on the first frame."""
    online_update: bool = True
    """Go on learning after the first frame."""
    update_every: int = 10
    """Frames between updates."""
    update_steps: int = 1
    hold: float = 0.1
    """Where every score is below this, the box stays where it was, and nothing is learned from the frame."""
    buffer: int = 30
    """Crops kept beside the first frame's; the oldest leaves first."""
    accept: float = 0.0
    """Score from which a frame joins the buffer; 0: each does that is not held."""
    distractor: float = 0.7
    """A second peak outside the box, this fraction of the best score, calls for an update at once."""
    rest: int = 5
    """Frames from an update to the next one that a distractor can call for."""
    penalty_k: float = 0.04
    """Strength of the penalty on changes of size and shape."""
    window: float = 0.3
    """The Hann window's share of the score."""
    size_lr: float = 0.3
    """Share of the predicted size, times penalty and score, in the new one."""
    min_side_px: float = 10.0
    speed: str = "eager"
    """How a tracker runs: eager; or compile: detection and loss through torch.compile, on a GPU with CUDA graphs
    (written, not yet run on one)."""

    compare: tuple[str, ...] = ()
    """Train these members of `MEMBERS` under this recipe instead of one tracker, and compare them (compare.py)."""
    views: tuple[str, ...] = ("no steps", "first frame only", "accept 0.3")
    """Other online steps by which `detection` and `maml` of a comparison track as well (compare.py)."""
    paper_scores: dict[str, float] = field(default_factory=dict)
    """The paper's figures, by data set and metric."""
    paper_source: str | None = None


# A quarter of the crop's area, an eighth of the channels; from random weights.
_SMALL = Recipe(
    about="", backbone="narrow", imagenet=False, head_width=32, head_depth=2, dataset="sequences",
    datasets=("got10k",), crop_px=127, anchor_px=32, shift_px=31.0, support_shift_px=31.0, max_gap=30, rate=0.01,
    pairs_per_epoch=320, detection_epochs=8, epochs=2, batch=8, lr=0.02, milestones=(1,), val_pairs=24,
    checkpointing=False,
)

_REAL = replace(
    _SMALL, dataset="OTB, VOT, GOT-10k, LaSOT and coco side by side", max_gap=100,
    datasets=("sequences", "vot", "got10k", "lasot", "coco"), shares=(0.6, 0.1, 0.1, 0.1, 0.1), held_out=("otb",),
)
_COMPARISON = {
    "compare": ("detection", "detection_long", "maml", "last_step", "fixed_rate"),  # also: per_filter, first_order
    "pairs_per_epoch": 160, "detection_epochs": 10, "epochs": 4, "milestones": (2,),
}

# Frozen features of EfficientNet-Lite0, which an ordinary package carries, and small heads: what is adapted online are
# 0.15 M parameters. COCO's objects are most of what differs in so few videos, hence their share.
_LITE0 = Recipe(
    about="", backbone="lite0_levels", frozen=True, head_width=64, dataset="46 real sequences and COCO",
    datasets=("sequences", "got10k", "otb", "vot", "lasot", "tinytlp", "coco"),
    shares=(0.15, 0.36, 0.05, 0.02, 0.02, 0.04, 0.36), held_out=("got10k",),
    crop_px=192, context=2.0, anchor_px=48, shift_px=48.0, support_shift_px=24.0, rate=0.01, pairs_per_epoch=640,
    detection_epochs=12, epochs=6, batch=16, lr=0.01, milestones=(4,), val_pairs=48, checkpointing=False,
)
_LITE0_FOLD = replace(
    _LITE0, datasets=("sequences", "got10k", "coco"), shares=(0.2, 0.44, 0.36),
    held_out=("otb", "vot", "lasot", "tinytlp"), compare=("detection", "maml"), val_pairs=24,
    views=("first frame only", "ten first steps", "half the new size", "window 0.45"),
)

RECIPES = {
    "tiny": replace(_SMALL, about="Retina-MAML in small on built-in sequences, four minutes on 2 CPU cores"),
    "tiny_fcos": replace(_SMALL, about="FCOS-MAML in small on built-in sequences", head="fcos"),
    "comparison": replace(
        _SMALL, about="the paper's comparison in small: detection training against MAML, and its parts", **_COMPARISON,
    ),
    "real_small": replace(_REAL, about="Retina-MAML in small on real videos and COCO, tested on the OTB folder"),
    "real_small_otb": replace(
        _REAL, about="the other way round: trained on the OTB folder and COCO, tested on the others",
        datasets=("sequences", "otb", "coco"), shares=(0.6, 0.2, 0.2), held_out=("vot", "got10k", "lasot"),
    ),
    "comparison_real": replace(_REAL, about="the same comparison on real videos", **_COMPARISON),
    "real_lite0": replace(_LITE0, about="Retina-MAML on frozen ImageNet features of a package, 46 real sequences"),
    "real_lite0_fcos": replace(_LITE0, about="FCOS-MAML on the same", head="fcos"),
    "real_lite0_fold": replace(
        _LITE0_FOLD, about="real_lite0 without seven of its sequences, which are tracked: what settings are chosen on"
    ),
    "real_lite0_fcos_fold": replace(_LITE0_FOLD, about="the same for real_lite0_fcos", head="fcos"),
    "retina": Recipe(
        "Retina-MAML, the paper: 71.2 AUC on OTB-100",
        paper_scores={"otb auc": 71.2, "lasot auc": 48.0, "trackingnet auc": 69.8, "trackingnet norm_precision": 78.6},
        paper_source="Retina-MAML; OTB from the abstract, the others recalled, unverified",
    ),
    "fcos": Recipe(
        "FCOS-MAML, the paper: 75.7 AUC on TrackingNet", head="fcos",
        paper_scores={
            "otb auc": 70.4, "lasot auc": 52.3, "trackingnet auc": 75.7, "trackingnet norm_precision": 82.2,
            "trackingnet precision": 72.5,
        },
        paper_source="FCOS-MAML; TrackingNet from the abstract (its precision, and LaSOT, as other papers quote "
        "them), OTB recalled, unverified",
    ),
}
RECIPES["tiny_hard"] = replace(
    RECIPES["tiny"], about="tiny on built-in sequences whose targets change their look, size and shape",
    dataset="hard_sequences",
)
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", pairs_per_epoch=32, detection_epochs=1,
    epochs=1, batch=4, val_pairs=4,
)

# Members of a comparison, and what each changes in its recipe.
MEMBERS = {
    "detection": {"epochs": 0},
    "detection_long": {"inner_steps": 0},  # as long as maml
    "maml": {},
    "last_step": {"multi_step": "last"},
    "fixed_rate": {"rate_lr": 0.0},
    "per_filter": {"granularity": "per_filter"},
    "first_order": {"second_order": False},
}
# An outer step of MAML takes about as long as this many of plain detection.
MAML_TO_DETECTION = 20
# From so large a rate as detection training's, longer outer steps blow up within tens of steps.
META_CLIP_NORM = 1.0


def members(recipe: Recipe) -> dict[str, Recipe]:
    """What a comparison trains, by label. "detection" is the first stage that all others go on from."""
    found = {}
    for label in recipe.compare:
        member = replace(recipe, compare=(), val_pairs=0, **MEMBERS[label])
        if label != "detection":
            member = replace(member, detection_epochs=0)
        if label == "detection_long":
            milestones = tuple(MAML_TO_DETECTION * epoch for epoch in recipe.milestones)
            member = replace(member, epochs=MAML_TO_DETECTION * recipe.epochs, milestones=milestones)
        elif label != "detection":
            member = replace(member, clip_norm=META_CLIP_NORM)
        found[label] = member
    return found
