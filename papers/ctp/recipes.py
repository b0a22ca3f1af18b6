"""Named settings: one for each of the authors' configurations, and small ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
    """Chance of a change of hue and saturation; so for the next two."""
    brightness: float = 0.5
    contrast: float = 0.5
    brightness_reach: float = 30.0
    """Largest change, of 255."""
    contrast_reach: float = 0.12
    """Largest change, as a logarithm."""
    colours_move: bool = True
    """Brightness and contrast change during a clip."""
    patches: int = 3
    """The game's settings: see `patches.Game`."""
    scales: tuple[float, ...] = (16, 24, 28, 32, 48, 64)
    location_velocity: float = 3.0
    size_velocity: float = 0.025
    visible: float = 0.8
    head_std: float = 0.001
    """Standard deviation of the weights of the tracking head's first linear layer."""
    queue: int = 65_536
    """Keys that MoCo remembers."""
    epochs: int = 300
    batch: int = 32
    """Global batch: all devices and accumulated chunks together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with a momentum of 0.9, or AdamW."""
    lr: float = 0.01
    decay_epochs: tuple[int, ...] = (100, 200)
    """The learning rate falls to a tenth after each; without any, it follows a cosine to 0."""
    warmup_steps: int = 0
    """Steps on which the learning rate climbs from a tenth."""
    weight_decay: float = 1e-4
    """Of every parameter."""
    clip_norm: float = 40.0
    """Largest gradient norm."""
    dropout: float = 0.5
    """Before a classifier."""
    eval_every: int = 10
    """Epochs between evaluations."""
    test_clips: int = 10
    """Clips of a video whose logits are averaged."""
    test_stride: int = 2
    test_short_side_px: int = 128
    downstream: str = ""
    """Recipe that this one's backbone is judged by when it is trained, beside one that starts from nothing."""
    contenders: tuple[str, ...] = ()
    """Compare these under this recipe instead of training one network: names of `compare.CONTENDERS`."""
    seeds: int = 3
    """Trainings of each contender, with seeds from --seed on."""
    paper_top1: float | None = None
    """The paper's figure in percent for this row."""
    paper_source: str | None = None


_KINETICS = Recipe("", dataset="Kinetics-400", epochs=90, decay_epochs=(30, 60))
_FINETUNE = Recipe(
    "", method="recognize", strides=(2,), jitter=False, keep_aspect=False, flip=0.35, hue_saturation=0.2,
    brightness=0.2, contrast=0.2, brightness_reach=32.0, contrast_reach=0.2, colours_move=False,
    epochs=150, decay_epochs=(60, 120), weight_decay=5e-4,
)
_SSV1 = replace(
    _FINETUNE, dataset="Something-Something v1", frames=32, strides=(1,), keep_aspect=True, flip=0.0, epochs=90,
    decay_epochs=(40, 60, 80), warmup_steps=1000, test_clips=1, test_stride=1,
)
# What a baseline changes in the pre-training it is compared with.
BASELINES = {
    "vcop": dict(
        method="vcop", strides=(1,), jitter=False, short_sides_px=(128,), keep_aspect=False, flip=0.0,
        hue_saturation=0.0, brightness=0.0, contrast=0.0,
    ),
    "speed": dict(method="speed", jitter=False),
    "rotation": dict(method="rotation"),
    "moco": dict(method="moco", strides=(1, 2, 3, 4), decay_epochs=()),
}
_NETS = {"r3d18": "R3D-18", "r2plus1d18": "R(2+1)D-18"}
_NAMES = {"vcop": "VCOP", "speed": "SpeedNet", "rotation": "Rot3D", "moco": "MoCo-3D"}

# Fewer, smaller frames. AdamW, because SGD at rates that suit so short a training kills the units of the head.
_SMALL = replace(
    _KINETICS, dataset="clips", width=8, frames=8, strides=(1,), jitter=False, size_px=32, short_sides_px=(32, 36, 40),
    scales=(8, 10, 12), head_std=0.03, queue=512, epochs=60, batch=32, optimizer="adamw", lr=1e-3, weight_decay=0.05,
    decay_epochs=(), warmup_steps=30, eval_every=12, test_clips=3, test_stride=2, test_short_side_px=36,
)

RECIPES = {
    "tiny": replace(
        _SMALL, about="the tracking game on built-in clips, then camera motion recognised; minutes on 2 CPU cores",
        downstream="tiny_recognize",
    ),
    "tiny_recognize": replace(
        _FINETUNE, about="which way does the camera move? 8 classes of built-in clips", dataset="clips", width=8,
        frames=8, strides=(2,), size_px=32, short_sides_px=(32, 36, 40), keep_aspect=True, flip=0.0, epochs=10,
        batch=32, optimizer="adamw", lr=1e-3, weight_decay=0.05, decay_epochs=(), warmup_steps=10, eval_every=5,
        test_clips=3, test_stride=2, test_short_side_px=36,
    ),
    "compare": replace(
        _SMALL, about="CtP, its ablations, two baselines and no pre-training, 3 seeds, on built-in clips",
        downstream="tiny_recognize", epochs=30,
        contenders=("random", "ctp", "ctp_one_patch", "ctp_never_hidden", "rotation", "vcop"),
    ),
    "real_cpu": replace(
        _SMALL, about="the game on a handful of real videos and frame folders, for a CPU", dataset="real videos",
        strides=(1, 2, 3), epochs=60, eval_every=10,
    ),
    **{f"ucf101_{net}": Recipe(f"{name} pre-trained on UCF101 by tracking", backbone=net)
       for net, name in _NETS.items()},
    **{f"kinetics_{net}": replace(_KINETICS, about=f"{name} pre-trained on Kinetics-400 by tracking", backbone=net)
       for net, name in _NETS.items()},
    **{f"kinetics_{key}": replace(_KINETICS, about=f"{_NAMES[key]}, R3D-18, Kinetics-400: a baseline",
                                  **changes, **({"lr": 0.001} if key == "vcop" else {}))
       for key, changes in BASELINES.items()},
    **{f"{key}_{net}_finetune": replace(base, about=f"{name} fine-tuned on {base.dataset}: give --init", backbone=net)
       for key, base in (("ucf101", _FINETUNE), ("hmdb51", replace(_FINETUNE, dataset="HMDB51")), ("ssv1", _SSV1))
       for net, name in _NETS.items()},
}
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=1, warmup_steps=2, eval_every=1,
    downstream="",
)
