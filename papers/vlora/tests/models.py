"""The models that this folder's tests ask, and their shapes."""

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from papers.vlora import (
    VisualTokensConfig,
    VisualTokensForConditionalGeneration,
    VLoRAConfig,
    VLoRAForConditionalGeneration,
)

IMAGE, PAD = 70, 0
VISION = CLIPVisionConfig(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)
TEXT = dict(
    vocab_size=61, hidden_size=48, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)
SHARED = dict(vision_config=VISION, num_features=9, visual_width=24, image_token_id=IMAGE)


def vlora(text=None, zero=False, **config):
    torch.manual_seed(0)
    config = dict(width=32, blocks=2, rank=3, alpha=6, every=2) | config
    model = VLoRAForConditionalGeneration(VLoRAConfig(text_config=text or LlamaConfig(**TEXT), **SHARED, **config))
    if not zero:
        for letter in model.config.weight_types:
            nn.init.normal_(getattr(model.generator, f"B_{letter}"), std=0.3)
    return model.eval()


def tokens():
    torch.manual_seed(0)
    return VisualTokensForConditionalGeneration(VisualTokensConfig(text_config=LlamaConfig(**TEXT), **SHARED)).eval()
