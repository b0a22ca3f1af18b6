"""VLoRA: an image becomes low-rank weights of a language model, instead of tokens of its input.

Ma et al., "Visual Perception by Large Language Model's Weights", NeurIPS 2024, arXiv 2405.20339.

B rows of a batch, I images, L tokens, d width of the LLM, o width of a changed module's output; T weight types, S
sites (the changed layers), r rank. A weight's change is ΔW = (α / r) B Aᵀ: A (d, r) generated from the image
(generator.py), B (o, r) learned. How the change reaches the language model's modules: injection.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import InputError, VLoRAConfig
from .generator import GroupedLinear, PerceptualWeightsGenerator
from .injection import Guard, Places, Weights, added, back, in_force, put, remembered
from .vision_language import VisionLanguageModel, positions

# transformers renamed the argument and the output in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class VLoRAForConditionalGeneration(VisionLanguageModel, GenerationMixin):
    """Any LLaMA-like causal LM whose weights see an image. Its modelling code is transformers' own, with hooks.

    A call keeps its image to itself, so any number of threads may share a model.
    """

    config_class = VLoRAConfig
    _no_split_modules = ["PerceptualWeightsGenerator"]  # it reads its parts' weights
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    def __init__(self, config: VLoRAConfig, **parts: Any):
        super().__init__(config, **parts)
        self.places, self.guard = Places(config), Guard()
        widths = {
            site.letter: getattr(module, "out_features", config.text_config.hidden_size)
            for site, module in zip(self.places.sites, self.places.hook(self.language_model))
        }
        self.generator = PerceptualWeightsGenerator(config, widths)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GroupedLinear | PerceptualWeightsGenerator):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        options = {"use_reentrant": False, "context_fn": remembered} | (gradient_checkpointing_kwargs or {})
        super().gradient_checkpointing_enable(options, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        perceptual_weights: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Rows of text with at most one placeholder each -> logits (B, L, vocabulary), and the loss if `labels`.

        input_ids (B, L). pixel_values (I, 3, H, W): images in the order of their placeholders; rows without a
        placeholder are computed by the plain LLM. attention_mask (B, L), 1 for tokens, 0 for padding on either side;
        once a cache is in use (`past_key_values`, or `cache` as it is called since transformers 5.24), (B, all so
        far), with 0 at earlier placeholders. perceptual_weights (B, T, S, d, r), or one row for all, instead of images:
        what `perceive` returns. inputs_embeds (B, L, d) in place of the tokens; with input_ids beside them, these say
        where the placeholders are. Further arguments go to the language model.
        """
        if past_key_values is not None:
            if CACHE == "cache" and not torch.compiler.is_compiling():
                warnings.warn("`past_key_values` is deprecated; transformers calls it `cache` now", stacklevel=2)
            cache = past_key_values
        weights = self._weights(input_ids, inputs_embeds, pixel_values, perceptual_weights)
        tokens, attention_mask, position_ids = self._without_placeholders(
            input_ids, inputs_embeds, attention_mask, position_ids, cache
        )
        eager = not torch.compiler.is_compiling()
        with self.guard.call() if eager else contextlib.nullcontext():
            if eager:
                self.places.hook(self.language_model)
            token = put(weights)
            try:
                out = self.language_model(
                    **tokens, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
                    logits_to_keep=logits_to_keep, **{CACHE: cache}, **kwargs,
                )
            finally:
                back(token)
        if weights is not None and weights.reached != len(self.places.sites):
            raise RuntimeError(
                f"the image reached {weights.reached} of {len(self.places.sites)} modules: something keeps forward "
                f"hooks from the modules of this {type(self.language_model).__name__}"
            )
        return out

    def _weights(self, input_ids, inputs_embeds, pixel_values, perceptual_weights) -> Weights | None:
        """What is in force in this call; None: the plain LLM."""
        if pixel_values is not None and perceptual_weights is not None:
            raise InputError("both pixel_values and perceptual_weights are given; an image comes as one of them")
        given = pixel_values is not None or perceptual_weights is not None
        if self.guard.mine:
            if given:
                raise InputError("an image is merged into this model; it can see no second one meanwhile")
            merged = in_force()
            return Weights(merged.A, merged.B, merged=True)
        if perceptual_weights is not None:
            rows = len(input_ids if inputs_embeds is None else inputs_embeds)
            shape = tuple(perceptual_weights.shape)
            if shape[1:] != self.generator.shape or shape[0] not in (1, rows):
                expected = ", ".join(map(str, self.generator.shape))
                raise InputError(f"perceptual_weights of shape {shape}; expected (1 or {rows}, {expected})")
            return Weights(perceptual_weights, self.generator.learned())
        if input_ids is None and given:
            raise InputError("pixel_values need input_ids, whose placeholders say which row sees which image")
        if given or (input_ids is not None and not torch.compiler.is_compiling() and input_ids.device.type == "cpu"):
            self._check_images(input_ids, pixel_values)  # elsewhere it would wait; the processor has counted already
        if given:
            A, B = self.generator(self.visual_features(pixel_values))
            return Weights(self._rows(input_ids, A), B)
        if self.training:  # all processes of a parallel training must use all parameters
            A, B = self.generator(self.no_features())
            return Weights(0 * A, B)
        return None

    def _check_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> None:
        if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
            return
        if pixel_values is None and self.placeholders(input_ids).any():
            raise InputError(
                "image placeholders in the text, but neither pixel_values nor perceptual_weights: the image is in the "
                "weights, not in a cache, and is given with every call"
            )
        self.check_images(input_ids, pixel_values)

    def _rows(self, input_ids: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Factors of images (I, T, S, d, r) -> of rows (B, T, S, d, r), 0 without an image."""
        marks = self.placeholders(input_ids).any(1).long()
        row = torch.arange(len(input_ids), device=A.device).repeat_interleave(marks, output_size=len(A))
        return A.new_zeros(len(input_ids), *A.shape[1:]).index_add(0, row, A)

    def _without_placeholders(self, input_ids, inputs_embeds, attention_mask, position_ids, cache):
        """A placeholder keeps its position and becomes token 0, which no later token sees.

        Returns the tokens as the language model's argument, mask and positions.
        """
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if attention_mask is None and cache is None:
            attention_mask = (input_ids if inputs_embeds is None else inputs_embeds[..., 0]).new_ones(shape).long()
        elif attention_mask is None and not torch.compiler.is_compiling():
            attention_mask = torch.ones(
                shape[0], int(cache.get_seq_length()) + shape[1], dtype=torch.long, device=self._device(input_ids)
            )
        marks = None if input_ids is None else self.placeholders(input_ids)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            if marks is not None:
                marked = F.pad(marks, (attention_mask.shape[1] - marks.shape[1], 0))
                counted, attention_mask = attention_mask.masked_fill(marked, 1), attention_mask.masked_fill(marked, 0)
            else:
                counted = attention_mask
            if position_ids is None and attention_mask.shape == shape:
                position_ids = positions(counted)
        if inputs_embeds is not None:
            return {"inputs_embeds": inputs_embeds}, attention_mask, position_ids
        return {"input_ids": input_ids.masked_fill(marks, 0)}, attention_mask, position_ids

    def prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None,
        keep: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What decoding needs of a prompt: tokens, mask and positions (B, L - placeholders of a row).

        No token sees a placeholder's slot, so it is left out, and leaves a gap in the positions. It stays, as token 0
        (its id need not be in the vocabulary), with `keep`, or where rows would differ in length or go on from it.
        """
        marks = self.placeholders(input_ids)
        if position_ids is None:
            position_ids = positions(attention_mask.masked_fill(marks, 1))
        position_ids = position_ids.expand_as(input_ids)
        if not keep and (marks.sum(1) == marks[0].sum()).all() and not marks[:, -1].any():
            return tuple(x[~marks].view(len(x), -1) for x in (input_ids, attention_mask, position_ids))
        return input_ids.masked_fill(marks, 0), attention_mask.masked_fill(marks, 0), position_ids

    def perceive(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The perceptual weights of a batch's rows, (B, T, S, d, r): all that is needed of its images."""
        self.check_images(input_ids, pixel_values)
        return self._rows(input_ids, self.generator(self.visual_features(pixel_values))[0])

    def deltas(self, perceptual_weights: torch.Tensor) -> list[torch.Tensor]:
        """ΔW (o, d) for each of `places.sites`, for the first row of `perceptual_weights`."""
        B = self.generator.learned()
        return [
            B[site.type_index][site.site_index] @ perceptual_weights[0, site.type_index, site.site_index].mT
            for site in self.places.sites
        ]

    @contextlib.contextmanager
    @torch.no_grad()
    def merged(self, perceptual_weights: torch.Tensor) -> Iterator[None]:
        """Within, one image's weights (1, T, S, d, r) are in force for every row: q, k, v and o hold W + ΔW.

        There is no weight to merge m into, so its product stays beside the MLP. The model is this thread's alone
        meanwhile: another call, or another image, is an `InputError`. On leaving, the weights are what they were.
        """
        if len(perceptual_weights) != 1:
            raise InputError(f"one image's weights can be merged, not those of {len(perceptual_weights)} rows")
        with self.guard.alone():
            places = zip(self.places.sites, self.places.hook(self.language_model), self.deltas(perceptual_weights))
            linear = [(module, delta) for site, module, delta in places if site.letter != "m"]
            with added([module for module, _ in linear], [delta for _, delta in linear]):
                token = put(Weights(perceptual_weights, self.generator.learned(), merged=True))
                try:
                    yield
                finally:
                    back(token)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        perceptual_weights: torch.Tensor | None = None,
        apply: Literal["side", "merge"] = "side",
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate; the perceptual weights are computed once. Prompts are padded on the left.

        `apply`: "side" keeps them beside the LLM's weights; "merge" adds them for the time of this call, which then has
        the model to itself (see `merged`): one image, for any number of prompts.
        """
        if apply not in ("side", "merge"):
            raise InputError(f'apply={apply!r}; it is "side" or "merge"')
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        if input_ids is None and inputs_embeds is None:
            start = (kwargs.get("generation_config") or self.generation_config).bos_token_id
            if start is None:
                raise InputError("generate without input_ids begins with bos_token_id, and there is none")
            input_ids = torch.full((1, 1), start, device=self.device)
        perceptual_weights = self._perceived(input_ids, pixel_values, perceptual_weights)
        if perceptual_weights is None:
            within = self.guard.call()
        elif apply == "merge":
            within = self.merged(perceptual_weights)
        else:
            within = self.guard.call()
            rows = len(input_ids if inputs_embeds is None else inputs_embeds)
            if len(perceptual_weights) not in (1, rows):
                raise InputError(f"perceptual_weights of {len(perceptual_weights)} rows for {rows} prompts")
            # repeated by generate for beams and several sequences of a row
            kwargs["perceptual_weights"] = perceptual_weights.expand(rows, -1, -1, -1, -1)
        with within:
            if inputs_embeds is not None:
                return self._generate_from_embeddings(input_ids, inputs_embeds, attention_mask, **kwargs)
            return self._generate(input_ids, attention_mask, **kwargs)

    def _perceived(self, input_ids, pixel_values, perceptual_weights) -> torch.Tensor | None:
        """What one answer is given from; every placeholder must have its image, whatever a cache holds."""
        if pixel_values is None:
            if perceptual_weights is None and not self.guard.mine and input_ids is not None:
                self._check_images(input_ids.cpu(), None)
            return perceptual_weights
        if perceptual_weights is not None:
            raise InputError("both pixel_values and perceptual_weights are given; an image comes as one of them")
        if input_ids is None:
            raise InputError("pixel_values need input_ids, whose placeholders say which row sees which image")
        return self.perceive(input_ids, pixel_values)

    def _generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> Any:
        """From tokens: without the placeholders' slots where nobody counts on them."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        settings = kwargs.get("generation_config") or self.generation_config
        # A cache that is handed in or out holds the slots, as `forward`'s does; a sliding window counts them.
        keep = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        keep |= bool(kwargs.get("return_dict_in_generate", settings.return_dict_in_generate))
        keep |= getattr(self.config.text_config, "sliding_window", None) is not None
        ids, mask, kwargs["position_ids"] = self.prompt(
            input_ids, attention_mask, kwargs.pop("position_ids", None), keep=keep
        )
        for key in ("max_length", "min_length"):  # they count the prompt
            if length := kwargs.get(key) or getattr(settings, key):
                kwargs[key] = length - input_ids.shape[1] + ids.shape[1]
        out = super().generate(ids, attention_mask=mask, **self._suppressed(kwargs, settings))
        return _with_prompt(out, input_ids, ids.shape[1])

    def _generate_from_embeddings(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> Any:
        """From embeddings; with ids beside them these say where placeholders are, and stand before the answer."""
        settings = kwargs.get("generation_config") or self.generation_config
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        if input_ids is None:
            kwargs = self._suppressed(kwargs, settings)
            return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        ids, mask, kwargs["position_ids"] = self.prompt(
            input_ids, attention_mask, kwargs.pop("position_ids", None), keep=True
        )
        kwargs = self._suppressed(kwargs, settings)
        out = super().generate(ids, inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)
        return _with_prompt(out, input_ids, ids.shape[1])

    def _suppressed(self, kwargs: dict[str, Any], settings: Any) -> dict[str, Any]:
        """Options with which no placeholder is generated, where its id is of the vocabulary."""
        if not 0 <= self.config.image_token_id < self.config.text_config.vocab_size:
            return kwargs
        others = kwargs.get("suppress_tokens") or settings.suppress_tokens or []
        return kwargs | {"suppress_tokens": [*others, self.config.image_token_id]}

    def _device(self, input_ids: torch.Tensor | None) -> torch.device:
        return self.device if input_ids is None else input_ids.device


def _with_prompt(out: Any, input_ids: torch.Tensor, length: int) -> Any:
    """What generate returned after a prompt of `length` tokens, with the prompt as it was given in its place."""
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    prompt = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
    sequences = torch.cat([prompt, sequences[:, length:]], 1)
    if isinstance(out, torch.Tensor):
        return sequences
    out.sequences = sequences
    return out


AutoModelForImageTextToText.register(VLoRAConfig, VLoRAForConditionalGeneration, exist_ok=True)
VLoRAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
