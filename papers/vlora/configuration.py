"""What the models of this folder are made of, as config.json says it.

This file, vision_language.py, generator.py, injection.py, model.py, baseline.py, tokens.py and processing.py import
nothing of this repository but each other: `save_pretrained` lays them beside the weights, so that transformers can load
the model where the repository is not (``trust_remote_code=True``).
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

# Where each weight type acts in a decoder layer. "m" acts on the whole MLP branch, in parallel.
MODULES = {letter: f"self_attn.{letter}_proj" for letter in "qkvo"} | {"m": "mlp"}


class InputError(ValueError):
    """A mistake in what was asked for, which a person can mend; the command line shows its text alone."""

    mendable = True


class VisionLanguageConfig(PreTrainedConfig):
    """Any vision tower and any causal language model that transformers knows.

    visual_layer: entry of the tower's hidden states that is seen (-2: the output of the last but one block); None
        takes its last hidden state, which may be a map of a convolutional network.
    class_token: the tower's first feature is a class token, and dropped.
    standardize: give every visual feature mean 0 and variance 1 over its width. Not in the paper: for towers that do
        not end in a norm.
    num_features, visual_width: V and D, the shape of what the tower makes of one image.
    image_token_id: what stands for an image in input_ids; need not be in the vocabulary.
    """

    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    visual_layer: int | None = -2
    class_token: bool = True
    standardize: bool = False
    num_features: int = 576
    visual_width: int = 1024
    image_token_id: int = -200  # LLaVA's

    def __post_init__(self, **kwargs):
        self.text_config = part(self.text_config, "llama")
        self.vision_config = part(self.vision_config, "clip_vision_model")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


class VLoRAConfig(VisionLanguageConfig):
    """The defaults are the authors' 7B setting.

    width h, blocks N, heads and mlp_ratio of the perceptual weights generator; rank r; alpha α; weight_types, a choice
    of the letters q, k, v, o, m; separate, one sub-generator for each type instead of one for all; every, the layer
    spacing: layer i (from 0) is changed when (i + 1) % every == 0.
    """

    model_type = "vlora"

    width: int = 512
    blocks: int = 8
    heads: int = 16
    mlp_ratio: int = 4
    rank: int = 64
    alpha: float = 64
    weight_types: str = "qkvom"
    separate: bool = True
    every: int = 4

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layers, letters = self.text_config.num_hidden_layers, self.weight_types
        if not letters or set(letters) - set(MODULES) or len(set(letters)) < len(letters):
            raise InputError(f"weight_types={self.weight_types!r} must be different letters of {''.join(MODULES)!r}")
        if layers % self.every:
            raise InputError(f"the LLM's {layers} layers are not a multiple of every={self.every}")
        if self.width % self.heads:
            raise InputError(f"the generator's width={self.width} is not a multiple of its {self.heads} heads")

    @property
    def sites(self) -> list[int]:
        """Layers that get perceptual weights, S of them."""
        return list(range(self.every - 1, self.text_config.num_hidden_layers, self.every))


class VisualTokensConfig(VisionLanguageConfig):
    """The baseline with visual tokens."""

    model_type = "vlora_visual_tokens"


def part(given: dict[str, Any] | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """The config of a model's part, from what config.json says of it; `default` is its model_type if it says none.

    The folder may be a stranger's: a network of timm's is timm's own, and its weights come from the folder alone.
    """
    if isinstance(given, PreTrainedConfig):
        return copy.deepcopy(given)  # the whole model resets the attention of configs it holds; a part keeps its own
    given = dict(given or {})
    kind = given.pop("model_type", default)
    if kind not in CONFIG_MAPPING:
        raise InputError(f"config.json names a part of model_type {kind!r}; transformers has no such model")
    config = CONFIG_MAPPING[kind].from_dict(given)
    if kind == "timm_wrapper":
        if not re.fullmatch(r"[\w.]+", config.architecture):
            raise InputError(f"config.json names the architecture {config.architecture!r}; expected one of timm's own")
        if names := [key for key in config.model_args or {} if key.startswith(("pretrained", "checkpoint", "cache"))]:
            raise InputError(f"config.json has {', '.join(names)} in model_args: weights come from the folder alone")
    return config


for _kind in (VLoRAConfig, VisualTokensConfig):
    AutoConfig.register(_kind.model_type, _kind, exist_ok=True)
    _kind.register_for_auto_class()
