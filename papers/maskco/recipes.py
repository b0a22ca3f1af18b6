"""Named settings: full-scale ones, and small ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

NAME = "MaskCo"
TITLE = "MaskCo: Self-Supervised Visual Representations Learning by Contrastive Mask Prediction (ICCV 2021)"
CLAIM = "Predicting a masked region's features teaches from pictures of many objects, where comparing views fails."
BUILT_IN = ("digits",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are this project's reading of the method, on MoCo v2's settings: the paper's own are not at hand."""

    about: str
    """What this recipe is, in one line."""
    method: Literal["maskco", "moco_v2", "linear"] = "maskco"
    """What is learned: masked regions, views (the baseline), or classes on a frozen backbone ("linear")."""
    backbone: str = "resnet50"
    """Name of a timm network, or one of `model.NARROW`."""
    output_stride: int = 32
    """Pixels of a view to a cell of the map; less than 32 is reached by dilation."""
    init: str = ""
    """Run folder or exported backbone that a linear classifier stands on; "": a random one."""
    dataset: str = "ImageNet-1K"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    input_size_px: int = 224
    """Side of a view; the next settings in pixels are of a view, too."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Brightness, contrast, saturation, hue."""
    jitter_probability: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    blur_px: tuple[float, float] = (0.1, 2.0)
    overlap_px: int = 96
    """Least width and height, in either view, of what two views share."""
    overlap_tries: int = 10
    """Key crops drawn until they share enough; then the key's crop is the query's."""
    region_px: tuple[int, int] = (64, 112)
    """Least and greatest width and height of a masked region, in the query view."""
    regions: int = 1
    """Regions masked in a view; each is a query of its own."""
    mask: Literal["mean", "noise", "learned", "off"] = "mean"
    """What stands in a masked region: the data's mean, noise, or a learned color; "off" is an ablation."""
    same_image_negatives: int = 2
    """Other regions of the key view; all further negatives are other pictures' regions, from the queue."""
    negative_iou: float = 0.1
    """Their greatest overlap with the positive."""
    mph: Literal["bottleneck", "conv1x1", "none"] = "bottleneck"
    """Mask prediction head; the others are ablations."""
    mph_width: int = 512
    mph_depth: int = 2
    """3x3 convolutions: how many cells it looks in every direction."""
    mph_on_key: bool = False
    """The key passes through a momentum copy of the head."""
    roi_cells: int = 3
    roi_samples: int = 2
    features: int = 128
    """Dimensions that are compared."""
    queue: int = 65_536
    momentum: float = 0.999
    temperature: float = 0.2
    epochs: int = 200
    batch: int = 256
    """Global batch: all devices and accumulated chunks together."""
    lr: float = 0.03
    milestones: tuple[int, ...] = ()
    """Epochs after which the learning rate falls to a tenth; without any, it follows a cosine to 0."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no limit."""
    eval_every: int = 0
    """Steps between evaluations; 0: once an epoch."""
    eval_crop: float = 0.875
    """Fraction of the resized picture's side that the center crop keeps."""
    probe: str = ""
    """Labelled pictures for a linear probe at the end, few enough for one process: a folder. "": the built-in set's."""
    dense: str = ""
    """COCO's folder with panoptic masks: a comparison judges there what is known of places."""
    compare: tuple[str, ...] = ()
    """Compare these under this recipe instead of training one network: names of `compare.MEMBERS`."""


# Evaluations are 4 epochs of 22 steps apart.
_TINY = Recipe(
    "", dataset="digits", backbone="resnet10_narrow", output_stride=8, input_size_px=32, crop_scale=(0.4, 1.0),
    flip=0.0, blur=0.0, overlap_px=14, region_px=(8, 14), mph_width=64, queue=512, momentum=0.99, epochs=20, batch=64,
    lr=0.1, eval_every=88, eval_crop=1.0,
)
# The queue must hold fewer keys than there are pictures: a picture would be its own negative. Evaluations are 25 epochs
# of 5 steps apart.
_MINI = replace(
    _TINY, dataset="pictures", input_size_px=64, overlap_px=26, region_px=(16, 24), crop_scale=(0.2, 1.0), flip=0.5,
    blur=0.5, blur_px=(0.1, 0.6), queue=256, epochs=100, eval_every=125,
)
# 30 epochs of 46 steps; evaluations are 5 epochs apart. With its keys' copy the network is small enough to be shipped.
_PLACES = replace(
    _MINI, dataset="pictures of many objects or of one", backbone="resnet10_small", input_size_px=96, overlap_px=40,
    region_px=(24, 36), blur_px=(0.1, 0.8), queue=1024, epochs=30, eval_every=230,
)
_COCO = Recipe("", dataset="COCO", epochs=800, lr=0.3, eval_every=4_620)  # steps of ten epochs

RECIPES = {
    "tiny": replace(_TINY, about="built-in handwritten digits, a small ResNet, some minutes on 2 CPU cores"),
    "imagenet": Recipe("MaskCo, ResNet-50, ImageNet-1K, 200 epochs"),
    "imagenet_moco_v2": Recipe("baseline: MoCo v2 under the same trainer", method="moco_v2"),
    "imagenet_linear": Recipe(
        "linear classification on a frozen backbone (--init RUN), MoCo's protocol", method="linear", epochs=100,
        lr=30.0, milestones=(60, 80), weight_decay=0.0, crop_scale=(0.08, 1.0),
    ),
    "coco": replace(_COCO, about="MaskCo, ResNet-50, COCO train2017, 800 epochs"),
    "coco_moco_v2": replace(_COCO, about="baseline: MoCo v2 on COCO", method="moco_v2"),
    "coco_no_mph": replace(_COCO, about="ablation: no mask prediction head", mph="none"),
    "coco_conv1x1": replace(_COCO, about="ablation: a head that looks at no neighbours", mph="conv1x1"),
    "conceptual_captions": Recipe(
        "MaskCo, ResNet-50, Conceptual Captions, as many pictures seen as on ImageNet", dataset="Conceptual Captions",
        epochs=77,
    ),
    "mini": replace(_MINI, about="the paper's comparison in miniature: a few hundred pictures, 64 px"),
    "mini_moco_v2": replace(_MINI, about="the same, MoCo v2", method="moco_v2"),
    "mini_no_mph": replace(_MINI, about="the same, no mask prediction head", mph="none"),
    "compare": replace(
        _PLACES, about="MaskCo and MoCo v2 on pictures of many objects or of one, judged by place and as a whole",
        compare=("maskco_many_objects", "moco_v2_many_objects", "maskco_one_object", "moco_v2_one_object"),
    ),
}
RECIPES["smoke"] = replace(
    RECIPES["tiny"], about="tiny cut to seconds: does everything run?", epochs=1, batch=200
)
