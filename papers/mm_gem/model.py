"""MM-GEM: one language model that embeds texts and describes images, and regions, from the same vision encoder.

Ma et al., "Multi-Modal Generative Embedding Model", arXiv 2405.19333. What the paper leaves open is marked [ours].

R rows of a batch (an image or a region, with its text), b rows of this process, B of all processes, I images, L tokens,
C width of the feature map, H x W its grid; g x g cells of a pooled region, d width of the LLM, D width of the joint
space.

                  image -> F -> PoolAggregator -> mean -> h1 -> v  \\
    embedding                                                       contrastive loss
                  text [EMB] -> LLM, last hidden state  -> h3 -> t /
    generation    image -> F -> PoolAggregator -> h2 -> V_in [CAP] text -> LLM -> cross-entropy of the text
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    GenerationConfig,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration import InputError, MMGEMConfig
from .contrastive import contrastive, gather, processes, text_keys
from .pooling import PoolAggregator, clipped, whole_images

MAX_SCALE = 100.0  # 1 / tau stays below


@dataclass
class MMGEMOutput(ModelOutput):
    """loss = loss_emb + loss_gen; in a parallel training the mean over the processes is that of the joined batch."""

    loss: Tensor | None = None
    loss_emb: Tensor | None = None
    loss_gen: Tensor | None = None
    logits_per_image: Tensor | None = None
    """(R, R): similarity of this process's images and texts, divided by tau."""
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    text_model_output: BaseModelOutput | None = None
    """With output_hidden_states or output_attentions: the language model's, of a pass over the texts alone."""
    vision_model_output: BaseModelOutput | None = None


def like_lengths(input_ids: Tensor, end: Tensor, groups: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Texts in so many groups of like lengths, each without the columns that hold padding alone: (rows of the group,
    its input_ids, its end)."""
    if groups == 1:
        return [(torch.arange(len(end), device=end.device), input_ids, end)]
    parts = end.argsort(stable=True).tensor_split(min(groups, len(end)))
    return [(rows, input_ids[rows, : int(end[rows].max()) + 1], end[rows]) for rows in parts]


class MMGEMModel(PreTrainedModel, GenerationMixin):
    """`encode_image`, `encode_region` and `encode_text` embed, as CLIP's `get_image_features` and `get_text_features`
    do; `generate` describes; `forward` compares, and is the training loss."""

    config_class = MMGEMConfig
    base_model_prefix = "mm_gem"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self, config: MMGEMConfig, vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = vision_tower if vision_tower is not None else AutoModel.from_config(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.pool = PoolAggregator(config.grid)
        C, d, D = config.visual_width, config.text_config.hidden_size, config.joint_width
        self.h1 = nn.Linear(C, D, bias=False)
        self.h2 = nn.Sequential(nn.Linear(C, d), nn.GELU(), nn.Linear(d, d))
        self.h3 = nn.Linear(d, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # log(1 / tau); DeepSpeed takes no scalars
        self.generation_config = GenerationConfig(
            eos_token_id=config.end_token_id, pad_token_id=config.end_token_id, max_new_tokens=32, do_sample=False,
            suppress_tokens=[config.emb_token_id, config.cap_token_id],
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif module is self:
            init.constant_(self.log_scale, math.log(1 / 0.07))
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True):
        super().train(mode)
        if not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()  # frozen, statistics of batch norms included
        return self

    # Vision ----------------------------------------------------------------------------------------------

    def feature_map(self, pixel_values: Tensor) -> Tensor:
        """Prepared images (I, 3, height, width) -> F (I, C, H, W)."""
        height, width = pixel_values.shape[2:]
        tower, options = self.vision_tower, {}
        side, patch = (getattr(tower.config, name, None) for name in ("image_size", "patch_size"))
        if isinstance(patch, int) and (height, width) != (side, side):
            options["interpolate_pos_encoding"] = True
        features = tower(pixel_values.to(tower.dtype), **options).last_hidden_state
        if features.dim() == 3:  # a transformer's tokens
            H, W = height // patch, width // patch
            features = features[:, -H * W :]  # without class and register tokens, which stand before the patches
            if tower.config.model_type == "clip_vision_model":  # transformers applies it to the class token alone
                features = tower.post_layernorm(features)
            features = features.mT.unflatten(2, (H, W))
        if features.shape[1] != self.config.visual_width:
            expected = self.config.visual_width
            raise InputError(f"the vision encoder gives features of width {features.shape[1]}, not {expected}")
        if self.config.standardize:
            features = F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)
        return features

    def cells(
        self, pixel_values: Tensor, boxes: Tensor | None = None, *, kept: bool = False, checked: bool = False
    ) -> Tensor:
        """(R, C, g, g) of the boxes (R, 5), or of whole images. `kept`: of feature maps, computed before."""
        size = pixel_values.shape[2:]
        if boxes is None:
            boxes, checked = whole_images(len(pixel_values), size, pixel_values.device), True
        return self.pool(pixel_values.float() if kept else self.feature_map(pixel_values), boxes, size, checked)

    def _image_embedding(self, cells_RCgg: Tensor) -> Tensor:
        return F.normalize(self.h1(cells_RCgg.mean((2, 3))).float(), dim=-1)

    def _prefix(self, cells_RCgg: Tensor) -> Tensor:
        """V_in and the embedding of [CAP]: (R, g² + 1, d). What comes last predicts the first word."""
        V_in = self.h2(cells_RCgg.flatten(2).mT)
        cap = torch.full((len(V_in), 1), self.config.cap_token_id, device=V_in.device)
        words = self.get_input_embeddings()(cap)
        parts = [V_in.to(words.dtype), words]
        return torch.cat(parts if self.config.cap_position == "last" else parts[::-1], 1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Prepared images (I, 3, height, width) -> v (I, D), of length 1."""
        return self._image_embedding(self.cells(pixel_values))

    def encode_region(self, pixel_values: Tensor, boxes: Tensor) -> Tensor:
        """v (R, D) of boxes (R, 5): image index, left, top, right, bottom in pixels of `pixel_values`."""
        return self._image_embedding(self.cells(pixel_values, boxes))

    def get_image_features(self, pixel_values: Tensor, boxes: Tensor | None = None) -> Tensor:
        """v of images, or of boxes (R, 5): `encode_image` and `encode_region` under CLIP's name. (R, D), of length 1"""
        return self._image_embedding(self.cells(pixel_values, boxes))

    # Language --------------------------------------------------------------------------------------------

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`encode_text` under CLIP's name. (R, D), of length 1"""
        return self.encode_text(input_ids, attention_mask)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts ending in [EMB] (R, L) -> t (R, D), of length 1. Padding may be on either side; what follows [EMB] is
        not read."""
        return self._text_embedding(*self._texts(input_ids, attention_mask))

    def _text_embedding(self, input_ids: Tensor, end: Tensor) -> Tensor:
        decoder, mask = self.language_model.get_decoder(), self._mask(input_ids)
        hidden = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return F.normalize(self.h3(hidden[torch.arange(len(end), device=end.device), end]).float(), dim=-1)

    def _mask(self, tokens_RL: Tensor) -> Tensor:
        """Nothing is masked but what comes later. On a GPU this is said at full length: else transformers would ask the
        device whether anything is masked, and the host would wait."""
        mask = torch.ones(tokens_RL.shape, dtype=torch.long, device=tokens_RL.device)
        if not mask.is_cuda or not self.training:
            return mask
        like = tokens_RL[..., None].to(self.dtype)
        return create_causal_mask(self.language_model.config, like, None, None, allow_is_causal_skip=False)

    def _texts(
        self, input_ids: Tensor, attention_mask: Tensor | None, checked: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Token ids with all padding on the right, where a causal model does not see it, and where [EMB] is."""
        if attention_mask is not None:
            order = (attention_mask == 0).int().argsort(dim=1, stable=True)
            input_ids = input_ids.gather(1, order)
        marks = input_ids == self.config.emb_token_id
        if not checked and (wrong := marks.sum(1) != 1).any():
            raise InputError(
                f"{int(wrong.sum())} of {len(marks)} texts do not hold [EMB], {self.config.emb_token_id}, just once; "
                "the processor appends it"
            )
        return input_ids, marks.int().argmax(1)

    def _caption_loss(self, cells_RCgg: Tensor, input_ids: Tensor, end: Tensor) -> Tensor:
        """Sum over the caption tokens and the end token, in nats."""
        words = self.get_input_embeddings()(input_ids[:, :-1])
        embeds = torch.cat([self._prefix(cells_RCgg), words], 1)
        L = input_ids.shape[1]
        mask = self._mask(embeds[..., 0])
        logits = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=L
        ).logits
        labels = input_ids.masked_fill(input_ids == self.config.emb_token_id, self.config.end_token_id)
        labels = labels.masked_fill(torch.arange(L, device=end.device) > end[:, None], -100)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    # Objectives ------------------------------------------------------------------------------------------

    def check(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
        boxes: Tensor | None = None, features: Tensor | None = None,
    ) -> None:
        """`InputError` where `forward` would raise one. On a GPU each look at a tensor makes the host wait: who has the
        batch on the CPU checks it there, and says so."""
        maps = pixel_values if features is None else features
        if boxes is not None:
            clipped(boxes, len(maps), maps.shape[2:])
        self._texts(input_ids, attention_mask)

    def _row_terms(
        self, pixel_values, kept, groups, boxes, input_ids, end, part: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, t and the summed caption loss of some rows: all that the losses take from the two networks. Of a `part`
        of the batch only its own images are looked at."""
        if part:
            images, index = boxes[:, 0].long().unique(return_inverse=True)
            pixel_values, boxes = pixel_values[images], torch.cat([index[:, None].to(boxes.dtype), boxes[:, 1:]], 1)
        cells = self.cells(pixel_values, boxes, kept=kept, checked=True)
        v = t = tokens = cells.new_zeros(())
        parts = like_lengths(input_ids, end, groups)
        if self.config.objectives != "generation":
            rows = torch.cat([rows for rows, *_ in parts])
            v, t = self._image_embedding(cells), torch.cat([self._text_embedding(*texts) for _, *texts in parts])
            t = t[rows.argsort()]
        if self.config.objectives != "embedding":
            tokens = sum(self._caption_loss(cells[rows], *texts) for rows, *texts in parts)
        return v, t, tokens

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, boxes: Tensor | None = None, features: Tensor | None = None,
        chunk: int = 0, groups: int = 1, return_loss: bool | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, return_dict: bool | None = None, checked: bool = False,
    ) -> MMGEMOutput | tuple:
        """Pairs of images or regions and texts -> L = L_Emb + L_Gen; either alone -> its embeddings; so many of the one
        and so many of the other -> their similarities.

        input_ids (R, L): texts ending in [EMB]. pixel_values (I, 3, height, width). boxes (R, 5): the region of each
        text, as `encode_region` takes them; None: row i is about the whole of image i. features (I, C, H, W) in place
        of pixel_values: feature maps that were kept; boxes are then in cells of the map.

        `checked`: by `check`, on the CPU. With `chunk`, the networks see so many rows at a time and their activations
        are computed again in the backward pass, so that memory grows with the chunk while the contrastive loss is that
        of the whole batch, exactly.
        With `groups`, the LLM sees so many groups of texts of like lengths, each padded to its own longest alone.

        return_loss: None: where there are pairs; in training there must be. False: similarities alone.
        """
        kept = features is not None
        source, end, out = features if kept else pixel_values, None, None
        if source is None and input_ids is None:
            raise InputError("give input_ids, pixel_values, or both")
        if source is not None:
            size = source.shape[2:]
            if boxes is None:
                boxes = whole_images(len(source), size, source.device)
            else:
                boxes = clipped(boxes, len(source), size, checked=checked)
        if input_ids is not None:
            ids, end = self._texts(input_ids, attention_mask, checked)
        if source is not None and end is not None and return_loss is not False:
            if len(boxes) == len(ids):
                out = self._losses(source, kept, boxes, ids, end, chunk, groups)
            elif self.training or return_loss:
                raise InputError(f"{len(ids)} texts, but {len(boxes)} images or regions")
        if out is None:
            out = MMGEMOutput()
            if source is not None:
                out.image_embeds = self._image_embedding(self.cells(source, boxes, kept=kept, checked=True))
            if end is not None:
                out.text_embeds = self._text_embedding(ids, end)
            if source is not None and end is not None:
                out.logits_per_image = self._bounded_log_scale().exp() * out.image_embeds @ out.text_embeds.mT
                out.logits_per_text = out.logits_per_image.mT
        self._add_states(out, input_ids, attention_mask, pixel_values, output_hidden_states, output_attentions)
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return out.to_tuple() if as_tuple else out

    def _losses(self, source, kept, boxes, input_ids, end, chunk, groups) -> MMGEMOutput:
        """What training needs of pairs."""
        if chunk and chunk < len(input_ids):
            rows = zip(boxes.split(chunk), input_ids.split(chunk), end.split(chunk))
            terms = [
                checkpoint(
                    self._row_terms, source, kept, groups, *row, True, use_reentrant=False, determinism_check="none"
                )
                for row in rows
            ]
            v, t, tokens = zip(*terms)
            tokens = sum(tokens)
            v, t = (torch.cat(x) if x[0].dim() else x[0] for x in (v, t))
        else:
            v, t, tokens = self._row_terms(source, kept, groups, boxes, input_ids, end, False)
        out = MMGEMOutput(loss=0.0)
        if self.config.objectives != "generation":
            keys = text_keys(input_ids, end) if self.config.duplicates else None
            scale = self._bounded_log_scale().exp()
            out.loss_emb = sum(contrastive(v, t, scale, keys))  # L_v2t + L_t2v, not their mean
            out.image_embeds, out.text_embeds, out.logits_per_image = v, t, scale * v @ t.mT
            out.logits_per_text = out.logits_per_image.mT
            out.loss = out.loss + out.loss_emb
        if self.config.objectives != "embedding":
            count = gather((end + 1).sum()[None]).sum()  # mean over the tokens of the global batch [ours]
            out.loss_gen = tokens * processes() / count
            out.loss = out.loss + out.loss_gen
        return out

    def _add_states(self, out, input_ids, attention_mask, pixel_values, hidden: bool | None, attentions: bool | None):
        """Hidden states and attentions of both networks, if they are asked for: of passes of their own."""
        options = {
            "output_hidden_states": self.config.output_hidden_states if hidden is None else hidden,
            "output_attentions": self.config.output_attentions if attentions is None else attentions,
        }
        if not any(options.values()):
            return
        if input_ids is not None:
            decoder = self.language_model.get_decoder()
            out.text_model_output = decoder(input_ids, attention_mask, use_cache=False, **options)
        if pixel_values is not None:
            out.vision_model_output = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **options)

    def _bounded_log_scale(self) -> Tensor:
        """log(1 / tau) in float32, 1 / tau between 1 and 100 as in CLIP.

        Here and not in the parameter, which may be DeepSpeed's bf16 copy of the one that is trained. So beyond a bound
        there is no gradient: a parameter that a step carried over it goes no further, and does not come back.
        """
        return self.log_scale.float().clamp(0, math.log(MAX_SCALE))

    @property
    def temperature(self) -> float:
        """tau."""
        return 1 / self._bounded_log_scale().exp().item()

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor | None = None, boxes: Tensor | None = None, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any,
    ) -> Any:
        """Captions of images, or of boxes (R, 5): token ids (R, new tokens). Options: transformers' own.

        input_ids (R, L): how each caption begins, as the processor makes it, [EMB] and padding left out; what is
        returned is what follows.
        """
        if pixel_values is None:
            raise InputError("generate describes images: it needs pixel_values")
        prefix = self._prefix(self.cells(pixel_values, boxes))
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is not None:
            prefix, mask = self._begun(prefix, mask, input_ids, attention_mask)
        options = self.generation_config.to_diff_dict()
        if generation_config is not None:
            options |= generation_config.to_diff_dict()
        options.pop("transformers_version", None)
        return self.language_model.generate(inputs_embeds=prefix, attention_mask=mask, **options | kwargs)

    def _begun(self, prefix, mask, input_ids, attention_mask) -> tuple[Tensor, Tensor]:
        """Prefixes with the beginnings of their captions, padded on the left."""
        if len(input_ids) != len(prefix):
            raise InputError(f"{len(input_ids)} beginnings of captions for {len(prefix)} images or regions")
        words = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = words * (input_ids != self.config.emb_token_id)
        whole, mask = torch.cat([prefix, self.get_input_embeddings()(input_ids)], 1), torch.cat([mask, words], 1)
        order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
        return whole.gather(1, order[..., None].expand(-1, -1, whole.shape[2])), mask.gather(1, order)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    @property
    def vocab_size(self) -> int:
        return self.get_input_embeddings().num_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """The language model's, as transformers has it; [EMB] and [CAP] must remain."""
        if new_num_tokens is not None and new_num_tokens <= max(self.config.emb_token_id, self.config.cap_token_id):
            raise InputError(f"{new_num_tokens} tokens: [EMB] or [CAP] would be none of them")
        table = self.language_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.text_config.vocab_size = self.language_model.config.vocab_size
        return table

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.config.auto_map = {kind.__name__: f"model.{type(self).__name__}" for kind in AUTO}
        super().save_pretrained(*args, **kwargs)


AUTO = (AutoModel, AutoModelForImageTextToText, AutoModelForZeroShotImageClassification)
for _kind in AUTO:
    _kind.register(MMGEMConfig, MMGEMModel, exist_ok=True)
MMGEMModel.register_for_auto_class("AutoModel")
