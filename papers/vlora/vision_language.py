"""A vision tower and a language model under one roof: what VLoRA and the token baseline share.

Shapes: B rows of a batch, L tokens of a row, V visual features of width D per image, I images of a batch.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from .configuration import InputError, VisionLanguageConfig


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
            raise InputError("use_reentrant=True loses the gradient of the visual weights; leave it False")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def visual_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) prepared images -> (I, V, D), which may also be given as they are. The tower is frozen."""
        return visual_features(self.vision_tower, self.config, pixel_values)

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
        """Raises `InputError` unless there is one image for every row with a placeholder. Waits for the device.

        A row's image may be named more than once; two images in a row are refused.
        """
        marks, images = self.placeholders(input_ids).sum(1), 0 if pixel_values is None else len(pixel_values)
        if int((marks > 0).sum()) == images:
            return
        if int(marks.sum()) == images:
            raise InputError(f"{int(marks.max())} images in one row: the model takes one")
        raise InputError(f"{int(marks.sum())} image placeholders in the text, but {images} images")

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


@torch.no_grad()
def visual_features(tower: PreTrainedModel, config: VisionLanguageConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """(I, 3, H, W) prepared images, or (I, V, D) their features -> (I, V, D)."""
    if pixel_values.dim() == 3:
        return pixel_values
    layer = config.visual_layer
    out = tower(pixel_values.to(tower.dtype), output_hidden_states=layer is not None)
    features = out.last_hidden_state if layer is None else out.hidden_states[layer]
    if features.dim() == 4:  # a convolutional network's map
        features = features.flatten(2).mT
    if config.class_token:
        features = features[:, 1:]
    if config.standardize:
        features = nn.functional.layer_norm(features.float(), features.shape[-1:])
    expected = (config.num_features, config.visual_width)
    if features.shape[1:] != expected:
        raise InputError(f"the vision tower gives features of shape {tuple(features.shape[1:])}, not {expected}")
    return features


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... over the tokens of each row, placeholders counted, wherever the padding is. (B, L)"""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
