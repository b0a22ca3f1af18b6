"""The usual way, to compare with: visual tokens in the language model's input, as in LLaVA-1.5.

Tower and language model are VLoRA's; between them stands LLaVA's projector, two linear layers with GELU. Shapes as in
vision_language.py; a row of L tokens with a placeholder becomes L + V - 1 slots for the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import VisualTokensConfig
from .vision_language import VisionLanguageModel, positions


class VisualTokensForConditionalGeneration(VisionLanguageModel):
    config_class = VisualTokensConfig

    def __init__(self, config: VisualTokensConfig, **parts: Any):
        super().__init__(config, **parts)
        d = config.text_config.hidden_size
        self.projector = nn.Sequential(nn.Linear(config.visual_width, d), nn.GELU(), nn.Linear(d, d))
        self.post_init()

    def sequence(self, input_ids, pixel_values, attention_mask):
        """Embeddings (B, L + V - 1, d), their mask, and for each token the slot it went to (B, L).

        The placeholder goes to its image's last visual token. Rows without an image are padded on the left.
        """
        embed = self.get_input_embeddings()
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if pixel_values is None:
            token = torch.arange(input_ids.shape[1], device=input_ids.device)
            return embed(input_ids), attention_mask, token.expand_as(input_ids)
        if input_ids.device.type == "cpu":
            self.check_images(input_ids, pixel_values)
        marks = self.placeholders(input_ids)
        visual = self.projector(self.visual_features(pixel_values).to(self.projector[0].weight.dtype))
        V, (B, L) = visual.shape[1], input_ids.shape
        has = marks.any(1, keepdim=True)
        image_of_row = (has[:, 0].long().cumsum(0) - 1).clamp(min=0)
        first = torch.where(has, marks.int().argmax(1, keepdim=True), -1)  # of the visual slots
        slot = torch.arange(L + V - 1, device=input_ids.device).expand(B, -1)
        is_visual = (slot >= first) & (slot < first + V)
        source = torch.where(slot < first, slot, slot - V + 1).clamp(0, L - 1)
        tokens = embed(input_ids.masked_fill(marks, 0).gather(1, source))
        which = (slot - first).clamp(0, V - 1)[..., None].expand(-1, -1, visual.shape[-1])
        embeds = torch.where(is_visual[..., None], visual[image_of_row].gather(1, which).to(tokens.dtype), tokens)
        mask = torch.where(is_visual, has.long(), attention_mask.long().gather(1, source))
        token = torch.arange(L, device=input_ids.device).expand(B, -1)
        return embeds, mask, torch.where(token < first, token, token + V - 1)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As VLoRA's without a cache: logits (B, L, vocabulary), the placeholder's from the last visual token."""
        embeds, mask, slots = self.sequence(input_ids, pixel_values, attention_mask)
        if pixel_values is None and self.training:  # all processes of a parallel training must use all parameters
            blank = self.projector(self.no_features()[:, :1].to(self.projector[0].weight.dtype))
            embeds = embeds + 0 * blank.to(embeds.dtype)
        hidden = self.language_model.get_decoder()(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state
        hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.language_model.get_output_embeddings()(hidden)
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.language_model.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, **kwargs: Any,
    ) -> torch.Tensor:
        """transformers' generate after the expanded prompt; prompts are padded on the left. (B, L + new tokens)"""
        embeds, mask, _ = self.sequence(input_ids, pixel_values, attention_mask)
        new = self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], 1)


AutoModelForImageTextToText.register(VisualTokensConfig, VisualTokensForConditionalGeneration, exist_ok=True)
VisualTokensForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
