"""A vision tower and a language model under one roof: what VLoRA and the token baseline share.

Shapes: B rows of a batch, L tokens of a row, V visual features of width D per image, I images of a batch.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from common.run import UserError
from common.run.model_folder import part_config


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

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    visual_layer: int | None = -2
    class_token: bool = True
    standardize: bool = False
    num_features: int = 576
    visual_width: int = 1024
    image_token_id: int = -200  # LLaVA's

    def __post_init__(self, **kwargs):
        self.text_config = part_config(self.text_config, "llama")
        self.vision_config = part_config(self.vision_config, "clip_vision_model")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


class VisionLanguageModel(PreTrainedModel, GenerationMixin):
    """`vision_tower`, always frozen and in eval mode, and `language_model`; subclasses connect them."""

    config_class = VisionLanguageConfig
    supports_gradient_checkpointing = True
    # Eager and SDPA attention give the placeholder's dead slot the same output; flash attention would not.
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(
        self, config: VisionLanguageConfig, vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = vision_tower if vision_tower is not None else AutoModel.from_config(config.vision_config)
        self.vision_tower.requires_grad_(False)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.generation_config = language_model.generation_config or GenerationConfig()

    def train(self, mode: bool = True):
        super().train(mode)
        self.vision_tower.eval()
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        """As transformers'; the reentrant kind, which would lose the visual weights' gradient, is refused."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError("use_reentrant=True loses the gradient of the visual weights; leave it False")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @torch.no_grad()
    def visual_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) prepared images -> (I, V, D), which may also be given as they are. The tower is frozen."""
        if pixel_values.dim() == 3:
            return pixel_values
        layer = self.config.visual_layer
        out = self.vision_tower(pixel_values.to(self.vision_tower.dtype), output_hidden_states=layer is not None)
        features = out.last_hidden_state if layer is None else out.hidden_states[layer]
        if features.dim() == 4:  # a convolutional network's map
            features = features.flatten(2).mT
        if self.config.class_token:
            features = features[:, 1:]
        if self.config.standardize:
            features = nn.functional.layer_norm(features.float(), features.shape[-1:])
        expected = (self.config.num_features, self.config.visual_width)
        if features.shape[1:] != expected:
            raise UserError(f"the vision tower gives features of shape {tuple(features.shape[1:])}, not {expected}")
        return features

    def no_features(self) -> torch.Tensor:
        """(1, V, D) features of a blank image, for training on text alone: under ZeRO-3 the weights of the tower are
        gathered from all processes, and a process without images must not leave the others waiting."""
        config = self.config.vision_config
        if not any(hasattr(p, "ds_id") for p in self.vision_tower.parameters()):
            return self.get_input_embeddings().weight.new_zeros(1, self.config.num_features, self.config.visual_width)
        side = config.image_size
        return self.visual_features(next(self.vision_tower.parameters()).new_zeros(1, config.num_channels, side, side))

    def placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) where an image stands."""
        return input_ids == self.config.image_token_id

    def check_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> None:
        """Raises `UserError` unless there is one image for every placeholder, and one in a row at most. Waits for the
        device."""
        marks, images = self.placeholders(input_ids).sum(1), 0 if pixel_values is None else len(pixel_values)
        if int(marks.sum()) != images:
            raise UserError(f"{int(marks.sum())} image placeholders in the text, but {images} images")
        if (most := int(marks.max())) > 1:
            raise UserError(f"{most} images in one row: the model takes one")

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... over the tokens of each row, placeholders counted, wherever the padding is. (B, L)"""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
