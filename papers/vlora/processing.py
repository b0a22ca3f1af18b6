"""Images and conversations -> what the model takes; chat templates as the paper's two stages have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration import InputError, VisualTokensConfig, VLoRAConfig

IMAGE = "<image>"

IGNORED = -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# What stands between the marks `generation` is learned; an image's mark opens its turn, followed by a newline.
_MACRO = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part.type == 'image' -%}" + IMAGE + "{{ '\\n' }}{%- endfor -%}"
    "{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
TEMPLATES = {
    # Pre-training: the image and its caption; the question is thrown away.
    "plain": _MACRO + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}"
        "{%- for part in message.content if part.type == 'image' -%}" + IMAGE + "{%- endfor -%}{%- else -%}"
        "{% generation %}{{ text(message.content) + '\\n' }}{% endgeneration %}{%- endif -%}{%- endfor -%}"
    ),
    # The same with a question, for a language model that is not trained along.
    "prompted": _MACRO + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}{{ text(message.content) }}"
        "{%- else -%}{{ ' ' }}{% generation %}{{ text(message.content) + '\\n' }}{% endgeneration %}{%- endif -%}"
        "{%- endfor -%}"
    ),
    # Fine-tuning: Vicuna's first version.
    "vicuna_v1": _MACRO + (
        "{{ bos_token }}" + SYSTEM + "{%- for message in messages -%}{%- if message.role == 'user' -%}"
        "{{ ' ' if loop.first }}USER: {{ text(message.content) }}{{ ' ASSISTANT:' }}{%- else -%}"
        "{{ ' ' }}{% generation %}{{ text(message.content) + eos_token }}{% endgeneration %}{%- endif -%}{%- endfor -%}"
    ),
    # The same without the system's sentences, for vocabularies of a few words.
    "short": _MACRO + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}"
        "USER: {{ text(message.content) }}{{ ' ASSISTANT:' }}{%- else -%}"
        "{{ ' ' }}{% generation %}{{ text(message.content) + eos_token }}{% endgeneration %}{%- endif -%}{%- endfor -%}"
    ),
    # SmolLM2's and others' own.
    "chatml": _MACRO + (
        "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.role == 'assistant' -%}{% generation %}{{ text(message.content) + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\\n' }}{%- else -%}"
        "{{ text(message.content) + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
}


class VLoRAProcessor(ProcessorMixin):
    """An image processor and a tokenizer, which gets ``<image>`` as a token of its own.

    The token stands for a whole image. Its id may lie beyond the language model's vocabulary: the model never embeds
    it. `pad_to_square` pads images with the processor's mean colour before they are resized, as fine-tuning and
    inference do; pre-training crops instead.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, pad_to_square: bool = True):
        if tokenizer is not None:
            if IMAGE not in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
            self.image_token, self.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
        self.pad_to_square = pad_to_square
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, *, padding_side: str = "left",
        add_special_tokens: bool = False, **_: Any,
    ) -> BatchFeature:
        """Texts with a mark ``<image>`` for each image, and the images in that order.

        Returns input_ids and attention_mask (B, L), and pixel_values (I, 3, H, W) if there are images. A prompt from
        `apply_chat_template` has its special tokens already.
        """
        images, data = _flat(images), {}
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            marks = [each.count(IMAGE) for each in text]
            if sum(marks) != len(images):
                raise InputError(f"{sum(marks)} marks {IMAGE} in the text, but {len(images)} images")
            _check(max(marks, default=0))
            data |= self.tokenizer(
                text, padding=True, padding_side=padding_side, add_special_tokens=add_special_tokens,
                return_tensors="pt", return_token_type_ids=False,
            )
        if images:
            data["pixel_values"] = self.pixels(images)
        return BatchFeature(data)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """PIL images -> (I, 3, H, W)."""
        if self.pad_to_square:
            mean = tuple(int(255 * x) for x in self.image_processor.image_mean)
            images = [_padded(image, mean) for image in images]
        return self.image_processor(list(images), return_tensors="pt").pixel_values

    def encode(self, messages: Sequence[dict[str, Any]], max_length: int | None = None) -> dict[str, torch.Tensor]:
        """A conversation -> input_ids (L) and labels (L), which are `IGNORED` outside the assistant's words."""
        out = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.chat_template, return_dict=True, return_assistant_tokens_mask=True,
        )
        ids, learned = (torch.tensor(out[key][:max_length]) for key in ("input_ids", "assistant_masks"))
        return {"input_ids": ids, "labels": ids.masked_fill(learned == 0, IGNORED)}

    def collate(
        self, samples: Sequence[tuple[Sequence[Image.Image], dict[str, torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        """(images, `encode`d conversation) pairs -> one training batch, padded on the right."""
        rows = [row for _, row in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {
            "input_ids": pad([row["input_ids"] for row in rows], True, self.tokenizer.pad_token_id),
            "labels": pad([row["labels"] for row in rows], True, IGNORED),
            "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
        }
        if images := [image for images, _ in samples for image in images]:
            batch["pixel_values"] = self.pixels(images)
        marks = (batch["input_ids"] == self.image_token_id).sum(1)
        if marks.sum() != len(images):
            raise InputError(f"{len(images)} images, but {marks.sum()} placeholders; is the maximal length too short?")
        _check(int(marks.max()))
        return batch

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _check(most: int) -> None:
    """On a GPU the model does not count, which would make it wait."""
    if most > 1:
        raise InputError(f"{most} images in one row: the model takes one")


def _flat(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    return [image for each in images for image in _flat(each)] if isinstance(images, list | tuple) else [images]


def _padded(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


for _config in (VLoRAConfig, VisualTokensConfig):
    AutoProcessor.register(_config, VLoRAProcessor)
