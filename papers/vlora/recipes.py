"""Named settings: the paper's two stages with the rows of its tables, and smaller ones that run on what is at hand.

Standard library only, so that ``make list`` works before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

NAME = "VLoRA"
TITLE = "Visual Perception by Large Language Model's Weights (NeurIPS 2024, arXiv 2405.20339)"
CLAIM = "An image can change a language model's weights instead of lengthening its input."
BUILT_IN = ("scenes",)  # data sets that come with the repository
# Training samples of the data sets that recipes are meant for.
SAMPLES = {
    "scenes": 4_000, "COCO captions": 239, "Flickr8k": 22_500, "CapsFusion-30M": 30_000_000,
    "LLaVA-1.5 mixture": 665_298,
}


@dataclass(frozen=True)
class Recipe:
    """Defaults are the authors' fine-tuning of Vicuna-7B: 8 GPUs x 16 conversations."""

    about: str
    """What this recipe is, in one line."""
    method: Literal["vlora", "tokens"] = "vlora"
    """"tokens" trains the baseline: visual tokens in the LLM's input, as LLaVA has them."""
    stage: Literal["pretrain", "finetune"] = "finetune"
    """What is learned from: captions, or conversations."""
    llm: str = "lmsys/vicuna-7b-v1.5"
    """The language model: a name or folder for from_pretrained, "smollm2" of the installed package, or "tiny"."""
    vision: str = "openai/clip-vit-large-patch14-336"
    """The frozen vision tower: likewise, "efficientnet-lite0" of the installed package, or "tiny"."""
    width: int = 512
    """h, width of the perceptual weights generator. The authors' two scripts contradict each other (1024 and 512);
    512 is what their parameter count and their FLOPs fit."""
    blocks: int = 8
    """N, blocks of each of its sub-generators."""
    rank: int = 64
    """r, rank of the change of a weight."""
    alpha: float = 64
    """The change is (alpha / rank) B A^T."""
    weight_types: str = "qkvom"
    """What is changed: the attention projections q, k, v, o and the MLP branch m."""
    separate: bool = True
    """One sub-generator for each weight type."""
    every: int = 4
    """Every so many layers are changed."""
    standardize: bool = False
    """Give visual features mean 0 and variance 1; for towers that do not end in a norm."""
    init: str | None = None
    """Run folder, or file, of a pre-training whose generator (or projector) this training starts from."""
    tune: Literal["frozen", "full", "lora"] = "full"
    """What happens to the LLM; the generator is always trained, the vision tower never."""
    lora_rank: int = 128
    """With tune=lora: LLaVA's setting, on all linear layers of the LLM."""
    lora_alpha: int = 256
    template: Literal["plain", "prompted", "vicuna_v1", "short", "chatml"] = "vicuna_v1"
    """How a conversation is written."""
    prompt: str = ""
    """With captions: what stands before them, if the template shows it."""
    pad_to_square: bool = True
    """Pad images to a square before resizing; else crop them."""
    max_length: int = 2048
    """Tokens of a conversation that are kept."""
    grouped: bool = True
    """Batches of images or of text alone, micro-batches of like length."""
    length_groups: int = 128
    """With grouped: so many global batches are sorted by length together, as in the authors' trainer, so that each is
    of one length; their order stays random. 1: a global batch holds any lengths."""
    features: bool = False
    """Compute the visual features once and keep them in the user's cache; with captions only, which are then a sample
    each."""
    blind: bool = False
    """With features: every image has the mean of all, a control that sees nothing."""
    llm_dtype: Literal["float32", "bfloat16", "nf4"] = "float32"
    """Type of a frozen LLM's weights; what is trained stays float32. "nf4": 4 bits, by bitsandbytes; what is exported
    has the LLM in bfloat16 again."""
    dataset: str = "LLaVA-1.5 mixture"
    """Data the recipe is meant for; all but the built-in ones are given with --data."""
    epochs: int = 1
    steps: int = 0
    """Steps instead of epochs; 0: whole epochs."""
    batch: int = 128
    """Global batch: all devices and accumulated chunks together."""
    lr: float = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    """Part of the steps in which the learning rate rises, as the authors' scripts have it."""
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    """Most norm of the gradient; 0: as it is, as in the authors' runs under DeepSpeed."""
    gradient_checkpointing: bool = True
    deepspeed: Literal["", "zero2", "zero3"] = "zero2"
    """scripts/zero2.json or zero3.json; empty: plain DDP, or one process."""
    eval_every: int = 1000
    """Steps between evaluations of the validation loss; 0: once an epoch."""
    eval_rows: int = 2000
    """Most validation samples that are used."""
    new_tokens: int = 64
    """Most tokens of an answer or caption in evaluation."""
    others: int = 1
    """With captions: other images that the right one is compared with."""
    other_rows: int = 0
    """Most captions for which the others after the first are tried; 0: all."""
    compare: tuple[str, ...] = ()
    """Recipes that are trained with every seed and reported in one table."""


FINETUNE = Recipe(about="VLoRA-7B, second stage: generator and LLM on LLaVA-1.5's 665 K conversations; MMBench 63.4")
PRETRAIN = replace(
    FINETUNE, about="VLoRA-7B, first stage: the generator alone on 30 M captions of CapsFusion", stage="pretrain",
    tune="frozen", template="plain", pad_to_square=False, grouped=False, dataset="CapsFusion-30M", batch=768, lr=5e-5,
    eval_every=10_000,
)
# Rows of the paper's tables 3 to 5: what differs, and MMBench.
ABLATIONS = {
    "qkvm": ({"weight_types": "qkvm"}, 59.6), "qkv": ({"weight_types": "qkv"}, 59.4),
    "qko": ({"weight_types": "qko"}, 57.2), "qk": ({"weight_types": "qk"}, 53.3),
    "rank16": ({"rank": 16, "alpha": 16}, 59.4), "rank32": ({"rank": 32, "alpha": 32}, 60.7),
    "rank128": ({"rank": 128, "alpha": 128}, 61.0), "blocks4": ({"blocks": 4}, 60.7),
    "blocks12": ({"blocks": 12}, 61.3),
}

TINY = Recipe(
    about="", llm="tiny", vision="tiny", width=64, blocks=2, rank=8, alpha=8, every=2, template="short",
    pad_to_square=False, max_length=64, dataset="scenes", batch=24, lr=1e-3, warmup_ratio=0.05,
    gradient_checkpointing=False, deepspeed="", eval_every=100, eval_rows=600, new_tokens=12, steps=800,
    clip_norm=1.0, length_groups=1,
)
SMOLLM2 = Recipe(
    about="", stage="pretrain", llm="smollm2", vision="efficientnet-lite0", width=128, blocks=2, rank=16, alpha=16,
    every=3, standardize=True, tune="frozen", template="prompted", prompt="A photo of:", pad_to_square=False,
    max_length=64, grouped=False, dataset="COCO captions", batch=10, steps=320, lr=1e-3, schedule="linear",
    warmup_ratio=0.1, gradient_checkpointing=False, deepspeed="", eval_every=40, eval_rows=60, new_tokens=24,
    clip_norm=1.0, length_groups=1,
)
# A quarter of an hour of a core; the generator is small enough to be shipped.
FLICKR8K = replace(
    SMOLLM2, rank=8, alpha=8, grouped=True, length_groups=32, features=True, llm_dtype="bfloat16", dataset="Flickr8k",
    batch=16, steps=600, eval_every=300, eval_rows=300, others=20, other_rows=100,
)

RECIPES = {
    "tiny": replace(TINY, about="everything from scratch on generated scenes, minutes on a CPU"),
    "tiny_tokens": replace(TINY, about="the same with visual tokens instead of weights", method="tokens"),
    "tiny_pretrain": replace(
        TINY, about="first stage on the scenes' captions, LLM trained along since there is none to start from",
        stage="pretrain", template="plain", steps=200,
    ),
    "smollm2": replace(SMOLLM2, about="frozen SmolLM2-135M and EfficientNet-Lite0 on a few hundred COCO captions"),
    "smollm2_tokens": replace(SMOLLM2, about="the same with visual tokens instead of weights", method="tokens"),
    "flickr8k": replace(FLICKR8K, about="frozen SmolLM2-135M and EfficientNet-Lite0 on 22,500 captions of Flickr8k"),
    "flickr8k_tokens": replace(
        FLICKR8K, about="the same with visual tokens instead of weights, for as long", method="tokens", steps=300,
    ),
    "flickr8k_tokens_steps": replace(
        FLICKR8K, about="the same with visual tokens instead of weights, for as many steps", method="tokens",
    ),
    "flickr8k_blind": replace(FLICKR8K, about="the same with the mean image in place of every image", blind=True),
    "flickr8k_compare": replace(
        FLICKR8K, about="weights against visual tokens at equal time, three seeds",
        compare=("flickr8k", "flickr8k_tokens"),
    ),
    "smollm2_scenes": replace(
        SMOLLM2, about="frozen SmolLM2-135M answers about the generated scenes", stage="finetune", template="chatml",
        prompt="", dataset="scenes", max_length=256, steps=120, lr=2e-3, eval_rows=200,
    ),
    "pretrain_7b": PRETRAIN,
    "pretrain_7b_24gb": replace(
        PRETRAIN, about="first stage on one card of 24 GB: the LLM in 4 bits, the generator on half a million captions",
        llm_dtype="nf4", deepspeed="", batch=64, steps=8_000, eval_every=2_000,
    ),
    "finetune_7b": FINETUNE,
    "finetune_7b_lora": replace(FINETUNE, about="second stage with LoRA on the LLM instead of all of it", tune="lora",
                                lr=2e-4),
    "pretrain_7b_tokens": replace(PRETRAIN, about="LLaVA's first stage on the same captions", method="tokens", lr=1e-3),
    "finetune_7b_tokens": replace(FINETUNE, about="LLaVA's second stage; table 2: MMBench 64.6", method="tokens"),
}
for _name, (_change, _mmbench) in ABLATIONS.items():
    RECIPES[f"pretrain_7b_{_name}"] = replace(PRETRAIN, about=f"first stage of the ablation {_name}", **_change)
    RECIPES[f"finetune_7b_{_name}"] = replace(
        FINETUNE, about=f"second stage of the ablation {_name}; MMBench {_mmbench}", **_change
    )
RECIPES["smoke"] = replace(RECIPES["tiny"], about="tiny cut to seconds: does everything run?", steps=20, eval_rows=64)
