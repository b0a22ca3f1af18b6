"""Named settings: the paper's two stages with TinyLlama and ViT-L, and smaller ones that run on what is at hand.

Of the paper only the abstract and summaries of its text were available: a setting marked [ours] is a choice of this
reproduction, not the paper's. Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

NAME = "MM-GEM"
TITLE = "Multi-Modal Generative Embedding Model (arXiv 2405.19333)"
CLAIM = "One language model embeds texts for retrieval and describes images and regions; the two objectives get along."
BUILT_IN = ("scenes",)  # data sets that come with the repository


@dataclass(frozen=True)
class Recipe:
    """Defaults are stage 1 of the full model; all but the two networks and the two losses is [ours]."""

    about: str
    """What this recipe is, in one line."""
    llm: str = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    """The language model: a name or folder for from_pretrained, "smollm2" of the installed package, or "tiny". The
    paper says TinyLlama; which of its checkpoints is [ours]."""
    vision: str = "openai/clip-vit-large-patch14"
    """The vision encoder: likewise, "efficientnet-lite0" of the installed package, or "tiny". The paper says ViT-Large;
    CLIP's weights at 224 px are [ours]."""
    grid: int = 4
    """[ours] g of the PoolAggregator: an image or region becomes g x g tokens."""
    joint_width: int = 768
    """[ours] Width of the joint embedding space."""
    cap_position: Literal["last", "first"] = "last"
    """[ours] Whether [CAP] stands after the visual tokens, or before them as two of three summaries say."""
    standardize: bool = False
    """[ours] Give visual features mean 0 and variance 1; for encoders that do not end in a norm."""
    objectives: Literal["both", "embedding", "generation"] = "both"
    """The paper: both, equally weighted."""
    duplicates: bool = False
    """[ours] Pairs with equal texts are positives of each other; evaluation counts them as right, too."""
    max_text_length: int = 512
    """[ours] Tokens of a text; nothing is cut at CLIP's 77."""
    tune: Literal["full", "lora"] = "full"
    """[ours] All of the LLM and the vision encoder, or LoRA on the LLM with the vision encoder frozen."""
    lora_rank: int = 16
    """[ours] With tune=lora."""
    length_groups: int = 1
    """[ours] The LLM sees a batch's texts in so many groups of like lengths: less is computed for padding alone."""
    keep_features: bool = False
    """[ours] Compute the maps of a frozen vision encoder once, and train on them."""
    compare: tuple[str, ...] = ()
    """Compare these members under this recipe, over several seeds, instead of training one model: both, embedding,
    captions, cap_first."""
    init: str | None = None
    """Run folder, or model folder, of stage 1 that stage 2 starts from."""
    region_fraction: float = 0.0
    """Part of a batch that is regions; [ours] half of it in stage 2."""
    image_steps: int = 0
    """Steps on images alone before regions are mixed in: both stages in one run."""
    dataset: str = "image-text pairs"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    samples: int = 12_000_000
    """Training images of those data: for planning, and to tell them from others."""
    epochs: int = 1
    """[ours]"""
    steps: int = 0
    """Steps instead of epochs; 0: whole epochs."""
    batch: int = 4096
    """[ours] Global batch, all devices together: every pair is a negative of every other. --micro-batch does not change
    it: it sets the rows that the networks see at a time."""
    lr: float = 1e-4
    """[ours] Of the projections and the temperature."""
    llm_lr: float = 2e-5
    """[ours] Of the language model."""
    vision_lr: float = 1e-4
    """[ours] Of the vision encoder."""
    beta2: float = 0.98
    """[ours]"""
    weight_decay: float = 0.05
    """[ours] Not on norms, biases and the temperature."""
    warmup_steps: int = 2000
    """[ours]"""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """[ours]"""
    clip_norm: float = 1.0
    """[ours] Most norm of the gradient; 0: as it is."""
    gradient_checkpointing: bool = True
    """[ours] In the language model."""
    deepspeed: Literal["", "zero2", "zero3"] = "zero2"
    """[ours] scripts/zero2.json or zero3.json; empty: plain DDP, or one process."""
    eval_rows: int = 5000
    """Most validation images that are used, with all their regions."""
    beams: int = 3
    """[ours] Of captions in evaluation."""


STAGE1 = Recipe(about="stage 1 in full: TinyLlama and ViT-L/14 on image-text pairs, both objectives")
TINY = Recipe(
    about="", llm="tiny", vision="tiny", joint_width=64, duplicates=True, max_text_length=64, region_fraction=0.5,
    image_steps=800, dataset="scenes", samples=2000, steps=1400, batch=32, lr=1e-3, llm_lr=1e-3, vision_lr=1e-3,
    warmup_steps=20, gradient_checkpointing=False, deepspeed="", eval_rows=400, beams=1,
)
OBJECTIVES = replace(TINY, region_fraction=0.0, image_steps=0, steps=400)
SMOLLM2 = replace(
    TINY, llm="smollm2", vision="efficientnet-lite0", joint_width=256, standardize=True, duplicates=False, tune="lora",
    max_text_length=512, image_steps=0, region_fraction=0.25, dataset="COCO captions", samples=239, steps=120, batch=16,
    llm_lr=5e-4, eval_rows=60,
)
FLICKR8K = replace(
    SMOLLM2, dataset="Flickr8k", samples=4500, region_fraction=0.0, keep_features=True, length_groups=4, grid=3,
    batch=64, steps=80, warmup_steps=8, lr=2e-3, llm_lr=1e-3, eval_rows=500,
)

RECIPES = {
    "tiny": replace(TINY, about="both stages from scratch on generated scenes, minutes on a CPU"),
    "objectives_both": replace(OBJECTIVES, about="whether the objectives hurt each other: both, on generated scenes"),
    "objectives_embedding": replace(OBJECTIVES, about="the same, contrastive loss alone", objectives="embedding"),
    "objectives_generation": replace(OBJECTIVES, about="the same, captioning loss alone", objectives="generation"),
    "tiny_stage1": replace(
        TINY, about="the first stage of tiny in a run of its own", region_fraction=0.0, image_steps=0, steps=800,
    ),
    "tiny_stage2": replace(
        TINY, about="the second: regions, from tiny_stage1 given with --init", image_steps=0, steps=600,
        llm_lr=5e-4, lr=5e-4, vision_lr=5e-5,
    ),
    "smollm2": replace(SMOLLM2, about="SmolLM2-135M by LoRA and EfficientNet-Lite0 on a few hundred COCO images"),
    "smollm2_embedding": replace(SMOLLM2, about="the same with the contrastive loss alone", objectives="embedding"),
    "smollm2_generation": replace(SMOLLM2, about="the same with the captioning loss alone", objectives="generation"),
    "flickr8k": replace(FLICKR8K, about="the same parts on thousands of captions that people wrote"),
    "flickr8k_objectives": replace(
        FLICKR8K, about="do the objectives hurt each other, and where does [CAP] belong: on Flickr8k, 3 seeds",
        compare=("both", "embedding", "captions", "cap_first"),
    ),
    "smoke_objectives": replace(
        OBJECTIVES, about="a comparison cut to seconds", tune="lora", keep_features=True, steps=2, batch=16,
        warmup_steps=0, eval_rows=8, compare=("both", "captions"),
    ),
    "stage1": STAGE1,
    "stage1_336": replace(
        STAGE1, about="the same with the vision encoder at 336 px", vision="openai/clip-vit-large-patch14-336"
    ),
    "stage2": replace(
        STAGE1, about="stage 2 in full: regions with phrases and images, half each, from stage 1",
        region_fraction=0.5, dataset="image-text pairs and regions", samples=4_000_000, epochs=3, batch=1024, lr=2e-5,
        llm_lr=2e-5, vision_lr=2e-6, warmup_steps=500, max_text_length=77,
    ),
}
RECIPES["smoke"] = replace(
    TINY, about="tiny cut to seconds: does everything run?", image_steps=6, steps=12, eval_rows=24
)
