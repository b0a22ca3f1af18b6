"""Named settings: one for each of the authors' configurations, and small ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

NAME = "CtP"
TITLE = "CtP: Unsupervised Visual Representation Learning by Tracking Patches in Video (arXiv 2105.02545)"
CLAIM = "Tracking patches pasted onto a clip, even where they are hidden, teaches a video network without labels."
BUILT_IN = ("clips",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are the authors' for pre-training on UCF101: 8 processes x 4 clips, SGD, 300 epochs."""

    about: str
    """What this recipe is, in one line."""
    method: Literal["ctp", "vcop", "speed", "rotation", "moco", "recognize"] = "ctp"
    """What is learned: the tracking game, one of the baselines, or classes of actions ("recognize")."""
    backbone: Literal["r3d18", "r2plus1d18"] = "r3d18"
    width: int = 64
    """Channels of the first stage."""
    init: str = ""
    """Run folder, or file of weights, ours or the authors', whose backbone the training starts from; "": none."""
    dataset: str = "UCF101"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    fold: int = 1
    """Which of UCF101's and HMDB51's three splits."""
    frames: int = 16
    """Frames of a clip."""
    strides: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Frames from one to the next; a clip draws one of them."""
    jitter: bool = True
    """Move every frame at random within its stride."""
    size_px: int = 112
    """Side of the square crop."""
    short_sides_px: tuple[int, ...] = (112, 128, 144)
    """Shorter sides that frames are resized to before the crop; a clip draws one of them."""
    keep_aspect: bool = True
    """Without, frames are resized to 4:3."""
    flip: float = 0.5
    hue_saturation: float = 0.25
    """Probability of a change of hue and saturation; so for the next two."""
    brightness: float = 0.5
    contrast: float = 0.5
    brightness_reach: float = 30.0
    """Largest change, of 255."""
    contrast_reach: float = 0.12
    """Largest change, as a logarithm."""
    colors_move: bool = True
    """Brightness and contrast change during a clip, after hue and saturation; else hue and saturation come last."""
    patches: int = 3
    """The game's settings: see `patches.Game`."""
    scales: tuple[float, ...] = (16, 24, 28, 32, 48, 64)
    location_velocity: float = 3.0
    size_velocity: float = 0.025
    visible: float = 0.8
    head_std: float = 0.001
    """Standard deviation of the weights of the tracking head's first linear layer."""
    target_mean: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """What is taken from dx, dy (px) and the logarithms dw, dh before they are divided by `target_std`."""
    target_std: tuple[float, float, float, float] = (0.8, 0.8, 0.04, 0.04)
    order_clips: int = 3
    """Clips that VCOP shuffles."""
    queue: int = 65_536
    """Keys that MoCo remembers."""
    epochs: int = 300
    batch: int = 32
    """Global batch: all devices and accumulated chunks together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with a momentum of 0.9, or AdamW."""
    lr: float = 0.01
    milestones: tuple[int, ...] = (100, 200)
    """Epochs after which the learning rate falls to a tenth; without any, it follows a cosine to 0."""
    warmup_steps: int = 0
    """Steps on which the learning rate climbs from a tenth."""
    weight_decay: float = 1e-4
    """Of every parameter."""
    clip_norm: float = 40.0
    """Largest gradient norm; 0: no limit."""
    dropout: float = 0.5
    """Before a classifier."""
    eval_every: int = 2980
    """Steps between evaluations, ten epochs of UCF101; 0: once an epoch."""
    test_clips: int = 10
    """Clips of a video whose logits are averaged."""
    test_stride: int = 2
    test_short_side_px: int = 128
    downstream: str = ""
    """Recipe that this one's backbone is fine-tuned by when it is trained, beside one that starts from nothing."""
    compare: tuple[str, ...] = ()
    """Compare these under this recipe instead of training one network: names of `compare.MEMBERS`."""
    paper_top1: float | None = None
    """The paper's figure in percent for this row."""
    paper_source: str | None = None


# Evaluations are ten epochs apart, in steps of 32 clips.
_UCF101 = Recipe("")
# Colours of all but the game: constant over a clip.
_CONSTANT_COLORS = dict(
    hue_saturation=0.2, brightness=0.2, contrast=0.2, brightness_reach=32.0, contrast_reach=0.2, colors_move=False,
)
_KINETICS = replace(_UCF101, dataset="Kinetics-400", epochs=90, milestones=(30, 60), eval_every=75_130)
_UCF101_FINETUNE = replace(
    _UCF101, method="recognize", strides=(2,), jitter=False, keep_aspect=False, flip=0.35, **_CONSTANT_COLORS,
    epochs=150, milestones=(60, 120), weight_decay=5e-4,
)
_HMDB51_FINETUNE = replace(_UCF101_FINETUNE, dataset="HMDB51", eval_every=1_110)
_SSV1_FINETUNE = replace(
    _UCF101_FINETUNE, dataset="Something-Something v1", frames=32, strides=(1,), keep_aspect=True, flip=0.0, epochs=90,
    milestones=(40, 60, 80), warmup_steps=1000, eval_every=26_880, test_clips=1, test_stride=1,
)
# What a baseline changes in the pre-training it is compared with.
BASELINES = {
    "vcop": dict(
        method="vcop", strides=(1,), jitter=False, short_sides_px=(128,), keep_aspect=False, flip=0.0,
        hue_saturation=0.0, brightness=0.0, contrast=0.0,
    ),
    "speed": dict(method="speed", jitter=False, **_CONSTANT_COLORS),
    "rotation": dict(method="rotation", keep_aspect=False, **_CONSTANT_COLORS),
    "moco": dict(method="moco", strides=(1, 2, 3, 4), milestones=(), keep_aspect=False, **_CONSTANT_COLORS),
}

# Fewer, smaller frames. AdamW, because SGD at rates that suit so short a training kills the units of the head.
# An epoch of the built-in clips is 9 steps.
_SMALL = Recipe(
    "", dataset="clips", width=8, frames=8, strides=(1,), jitter=False, size_px=32, short_sides_px=(32, 36, 40),
    scales=(8, 10, 12), head_std=0.03, queue=512, epochs=60, batch=32, optimizer="adamw", lr=1e-3, weight_decay=0.05,
    milestones=(), warmup_steps=30, eval_every=108, test_clips=3, test_stride=2, test_short_side_px=36,
)

RECIPES = {
    "tiny": replace(
        _SMALL, about="the tracking game on built-in clips, then camera motion recognised; minutes on 2 CPU cores",
        downstream="tiny_recognize",
    ),
    "tiny_recognize": replace(
        _UCF101_FINETUNE, about="which way does the camera move? 8 classes of built-in clips", dataset="clips", width=8,
        frames=8, strides=(2,), size_px=32, short_sides_px=(32, 36, 40), keep_aspect=True, flip=0.0, epochs=10,
        batch=32, optimizer="adamw", lr=1e-3, weight_decay=0.05, milestones=(), warmup_steps=10, eval_every=45,
        test_clips=3, test_stride=2, test_short_side_px=36,
    ),
    # Wider than tiny, and still small enough to be shipped; the queue holds fewer keys than there are videos.
    "compare": replace(
        _SMALL, about="CtP, an ablation, two baselines and no pre-training, 3 seeds, judged by what needs motion",
        width=12, strides=(1, 2, 3), queue=256, downstream="tiny_recognize", epochs=48, eval_every=180,
        compare=("ctp", "ctp_never_hidden", "rotation", "moco", "random"),
    ),
    "real_cpu": replace(
        _SMALL, about="the game on a handful of real videos and frame folders, for a CPU", dataset="real videos",
        strides=(1, 2, 3), epochs=60, eval_every=80,  # ten epochs of the 272 that the README tells of
    ),
    "ucf101_r3d18": replace(_UCF101, about="R3D-18 pre-trained on UCF101 by tracking"),
    "ucf101_r2plus1d18": replace(
        _UCF101, about="R(2+1)D-18 pre-trained on UCF101 by tracking", backbone="r2plus1d18"
    ),
    "kinetics_r3d18": replace(_KINETICS, about="R3D-18 pre-trained on Kinetics-400 by tracking"),
    "kinetics_r2plus1d18": replace(
        _KINETICS, about="R(2+1)D-18 pre-trained on Kinetics-400 by tracking", backbone="r2plus1d18"
    ),
    "kinetics_vcop": replace(
        _KINETICS, about="VCOP, R3D-18, Kinetics-400: a baseline", lr=0.001, **BASELINES["vcop"]
    ),
    "kinetics_speed": replace(_KINETICS, about="SpeedNet, R3D-18, Kinetics-400: a baseline", **BASELINES["speed"]),
    "kinetics_rotation": replace(_KINETICS, about="Rot3D, R3D-18, Kinetics-400: a baseline", **BASELINES["rotation"]),
    "kinetics_moco": replace(_KINETICS, about="MoCo-3D, R3D-18, Kinetics-400: a baseline", **BASELINES["moco"]),
    "ucf101_r3d18_finetune": replace(_UCF101_FINETUNE, about="R3D-18 fine-tuned on UCF101: give --init"),
    "ucf101_r2plus1d18_finetune": replace(
        _UCF101_FINETUNE, about="R(2+1)D-18 fine-tuned on UCF101: give --init", backbone="r2plus1d18"
    ),
    "hmdb51_r3d18_finetune": replace(_HMDB51_FINETUNE, about="R3D-18 fine-tuned on HMDB51: give --init"),
    "hmdb51_r2plus1d18_finetune": replace(
        _HMDB51_FINETUNE, about="R(2+1)D-18 fine-tuned on HMDB51: give --init", backbone="r2plus1d18"
    ),
    "ssv1_r3d18_finetune": replace(
        _SSV1_FINETUNE, about="R3D-18 fine-tuned on Something-Something v1: give --init"
    ),
    "ssv1_r2plus1d18_finetune": replace(
        _SSV1_FINETUNE, about="R(2+1)D-18 fine-tuned on Something-Something v1: give --init", backbone="r2plus1d18"
    ),
}
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=1, warmup_steps=2, eval_every=0,
    downstream="",
)
