"""What an MM-GEM is made of, as config.json says it.

This file, pooling.py, contrastive.py, model.py and processing.py import nothing of this repository but each other:
`save_pretrained` lays them beside the weights, so that transformers can load the model where the repository is not
(``trust_remote_code=True``).
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig


class InputError(ValueError):
    """A mistake in what was asked for, which a person can mend; the command line shows its text alone."""

    mendable = True


class MMGEMConfig(PreTrainedConfig):
    """A vision encoder of transformers whose last hidden state is a map, or the patches of a grid after any class and
    register tokens, and a causal language model.

    visual_width: C. standardize: give every feature of the map mean 0 and variance 1 over its width, for encoders that
        do not end in a norm [ours].
    grid: g [ours]; 0 keeps the map's own resolution.
    joint_width: D [ours].
    emb_token_id, cap_token_id: [EMB] and [CAP], the two ids added to the LLM's vocabulary; end_token_id ends a caption.
    max_text_length: most tokens of a text, [EMB] included; limited by the LLM alone, not by CLIP's 77.
    objectives: what the loss holds: L_Emb + L_Gen, or one of them.
    duplicates: pairs with equal texts count as positives of each other [ours]; else as negatives, as usual.
    cap_position: whether [CAP] stands after the visual tokens [ours] or before them, as most summaries say.
    """

    model_type = "mm_gem"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    visual_width: int = 1024
    standardize: bool = False
    grid: int = 4
    joint_width: int = 768
    emb_token_id: int = 32000
    cap_token_id: int = 32001
    end_token_id: int = 2
    max_text_length: int = 512
    objectives: Literal["both", "embedding", "generation"] = "both"
    duplicates: bool = False
    cap_position: Literal["last", "first"] = "last"

    def __post_init__(self, **kwargs):
        self.text_config = part(self.text_config, "llama")
        self.vision_config = part(self.vision_config, "clip_vision_model")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        for name, known in (("objectives", ("both", "embedding", "generation")), ("cap_position", ("last", "first"))):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name}={value!r} must be {' or '.join(map(repr, known))}")
        if (limit := self.text_config.max_position_embeddings) < self.max_text_length + self.grid**2 + 1:
            raise InputError(
                f"max_text_length={self.max_text_length} with {self.grid**2} visual tokens and [CAP] exceeds the LLM's "
                f"{limit} positions"
            )


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


AutoConfig.register("mm_gem", MMGEMConfig, exist_ok=True)
MMGEMConfig.register_for_auto_class()
