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
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from common.run import UserError, gather, gather_with_gradient, processes
from common.run.model_folder import part_config
from papers.mm_gem.pooling import PoolAggregator, clipped, whole_images

MAX_SCALE = 100.0  # 1 / tau stays below


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
        self.text_config = part_config(self.text_config, "llama")
        self.vision_config = part_config(self.vision_config, "clip_vision_model")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        for name, known in (("objectives", ("both", "embedding", "generation")), ("cap_position", ("last", "first"))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name}={value!r} must be {' or '.join(map(repr, known))}")
        if (limit := self.text_config.max_position_embeddings) < self.max_text_length + self.grid**2 + 1:
            raise UserError(
                f"max_text_length={self.max_text_length} with {self.grid**2} visual tokens and [CAP] exceeds the LLM's "
                f"{limit} positions"
            )


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


def contrastive(v_bD: Tensor, t_bD: Tensor, scale: Tensor, keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(L_v2t, L_t2v) in nats: cross-entropy of own images among all texts, and of own texts among all images.

    Embeddings of unit length; scale = 1 / tau; all processes bring equally many rows. With `keys`, pairs of equal key
    count as positives of each other (the mean of their log-probabilities), instead of as wrong negatives.

    The mean of the losses over the processes is the loss of the joined batch, and so, for gradients, is the mean that
    data-parallel training takes: a gathered row's gradient is summed over the processes before.
    """
    v_BD, t_BD = gather_with_gradient(v_bD), gather_with_gradient(t_bD)
    first = dist.get_rank() * len(v_bD) if processes() > 1 else 0
    keys_B = torch.arange(len(v_BD), device=v_bD.device) if keys_B is None else keys_B
    positive = keys_B[first : first + len(v_bD), None] == keys_B
    target = positive / positive.sum(1, keepdim=True)

    def cross_entropy(queries, items):
        log_p = (scale * queries.float() @ items.float().mT).log_softmax(1)
        return -(target * log_p).sum(1).mean()

    return cross_entropy(v_bD, t_BD), cross_entropy(t_bD, v_BD)


def text_keys(input_ids: Tensor, end: Tensor) -> Tensor:
    """For each text of all processes an integer, the same for equal texts. (B,)

    input_ids (b, L), padded on the right to a length of this process's own; end (b,), where [EMB] is. The integer is
    the value modulo 2^64 of a polynomial whose coefficients are the tokens, which different texts do not share but by a
    chance of about one in 2^64: for texts to be compared themselves, the host would have to wait for the device.
    """
    place = torch.arange(input_ids.shape[1], device=end.device)
    powers = torch.full_like(place, 0x5851F42D4C957F2D).cumprod(0)
    return gather(((input_ids + 1) * powers).masked_fill(place > end[:, None], 0).sum(1))


def like_lengths(input_ids: Tensor, end: Tensor, groups: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Texts in so many groups of like lengths, each without the columns that hold padding alone: (rows of the group,
    its input_ids, its end)."""
    if groups == 1:
        return [(torch.arange(len(end), device=end.device), input_ids, end)]
    parts = end.argsort(stable=True).tensor_split(min(groups, len(end)))
    return [(rows, input_ids[rows, : int(end[rows].max()) + 1], end[rows]) for rows in parts]


class MMGEMModel(PreTrainedModel):
    """`encode_image`, `encode_region` and `encode_text` embed; `generate` describes; `forward` is the training loss."""

    config_class = MMGEMConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
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
            raise UserError(f"the vision encoder gives features of width {features.shape[1]}, not {expected}")
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

    # Language --------------------------------------------------------------------------------------------

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
            raise UserError(
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
        """`UserError` where `forward` would raise one. On a GPU each look at a tensor makes the host wait: who has the
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
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
        boxes: Tensor | None = None, features: Tensor | None = None, chunk: int = 0, groups: int = 1,
        checked: bool = False,
    ) -> MMGEMOutput:
        """Pairs of images or regions and texts -> L = L_Emb + L_Gen.

        input_ids (R, L): texts ending in [EMB]. pixel_values (I, 3, height, width). boxes (R, 5): the region of each
        text, as `encode_region` takes them; None: row i is about the whole of image i. features (I, C, H, W) in place
        of pixel_values: feature maps that were kept; boxes are then in cells of the map.

        `checked`: by `check`, on the CPU. With `chunk`, the networks see so many rows at a time and their activations
        are computed again in the backward pass, so that memory grows with the chunk while the contrastive loss is that
        of the whole batch, exactly.
        With `groups`, the LLM sees so many groups of texts of like lengths, each padded to its own longest alone.
        """
        kept = features is not None
        pixel_values = features if kept else pixel_values
        if boxes is None:
            boxes = whole_images(len(pixel_values), pixel_values.shape[2:], pixel_values.device)
        else:
            boxes = clipped(boxes, len(pixel_values), pixel_values.shape[2:], checked=checked)
        if len(boxes) != len(input_ids):
            raise UserError(f"{len(input_ids)} texts, but {len(boxes)} images or regions")
        input_ids, end = self._texts(input_ids, attention_mask, checked)
        if chunk and chunk < len(input_ids):
            rows = zip(boxes.split(chunk), input_ids.split(chunk), end.split(chunk))
            terms = [
                checkpoint(
                    self._row_terms, pixel_values, kept, groups, *row, True, use_reentrant=False,
                    determinism_check="none",
                )
                for row in rows
            ]
            v, t, tokens = zip(*terms)
            tokens = sum(tokens)
            v, t = (torch.cat(x) if x[0].dim() else x[0] for x in (v, t))
        else:
            v, t, tokens = self._row_terms(pixel_values, kept, groups, boxes, input_ids, end, False)
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
    def generate(self, pixel_values: Tensor, boxes: Tensor | None = None, **kwargs: Any) -> Any:
        """Captions of images, or of boxes (R, 5): token ids (R, new tokens). Options: transformers' own."""
        prefix = self._prefix(self.cells(pixel_values, boxes))
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        end = self.config.end_token_id
        options = {"eos_token_id": end, "pad_token_id": end, "max_new_tokens": 32, "do_sample": False}
        options["suppress_tokens"] = [self.config.emb_token_id, self.config.cap_token_id]
        return self.language_model.generate(inputs_embeds=prefix, attention_mask=mask, **options | kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()


AutoConfig.register("mm_gem", MMGEMConfig)
AutoModel.register(MMGEMConfig, MMGEMModel)
AutoModelForImageTextToText.register(MMGEMConfig, MMGEMModel)
