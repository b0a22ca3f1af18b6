"""Images and conversations -> what the model takes; chat templates as the paper's two stages have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils.chat_template_utils import render_jinja_template

from .configuration import InputError, VisualTokensConfig, VLoRAConfig
from .tokens import Stretches, mend

IMAGE = "<image>"
_LITERAL = "\ue000" * len(IMAGE)  # stands for the mark's letters where they are no mark

IGNORED = -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# What stands between the marks `generation` is learned; an image's mark opens its turn, with a newline if text follows.
_MACRO = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- set words = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- for part in images -%}" + IMAGE + "{%- endfor -%}{{ '\\n' if images and words }}{{ words }}"
    "{%- endif -%}{%- endmacro -%}"
)
_NO_SYSTEM = (
    "{%- if messages and messages[0].role == 'system' -%}"
    "{{ raise_exception('this chat template has no place for a system message') }}{%- endif -%}"
)


def _dialogue(opening: str) -> str:
    """Turns as Vicuna's first version has them. A text that is empty leaves nothing but its speaker's name."""
    return _MACRO + opening + (
        "{%- for message in messages if message.role != 'system' -%}{%- set words = text(message.content) -%}"
        "{%- if message.role == 'user' -%}USER:{{ ' ' + words if words }}"
        "{{ ' ASSISTANT:' if not loop.last or add_generation_prompt }}"
        "{%- elif words -%}{% generation %}{{ ' ' + words + eos_token }}{% endgeneration %}{%- endif -%}{%- endfor -%}"
    )


TEMPLATES = {
    # Pre-training: the image and its caption; the question is thrown away.
    "plain": _MACRO + _NO_SYSTEM + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}"
        "{%- for part in message.content if part.type == 'image' -%}" + IMAGE + "{%- endfor -%}{%- else -%}"
        "{% generation %}{{ text(message.content) + '\n' }}{% endgeneration %}{%- endif -%}{%- endfor -%}"
    ),
    # The same with a question, for a language model that is not trained along.
    "prompted": _MACRO + _NO_SYSTEM + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}{{ text(message.content) }}"
        "{%- else -%}{{ ' ' }}{% generation %}{{ text(message.content) + '\n' }}{% endgeneration %}{%- endif -%}"
        "{%- endfor -%}"
    ),
    # Fine-tuning: Vicuna's first version; a system message takes the place of its own two sentences.
    "vicuna_v1": _dialogue(
        "{{ bos_token }}{%- if messages and messages[0].role == 'system' -%}{{ text(messages[0].content) }}{%- else -%}"
        + SYSTEM + "{%- endif -%}{{ ' ' }}"
    ),
    # The same without the system's sentences, for vocabularies of a few words.
    "short": _dialogue(_NO_SYSTEM + "{{ bos_token }}"),
    # SmolLM2's and others' own.
    "chatml": _MACRO + (
        "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.role == 'assistant' -%}{% generation %}{{ text(message.content) + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{%- else -%}"
        "{{ text(message.content) + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
}


class VLoRAProcessorKwargs(ProcessingKwargs, total=False):
    """Options go to the tokenizer and to the image processor; one that neither knows is an error."""

    _defaults = {
        "text_kwargs": {"padding": True, "add_special_tokens": False, "return_token_type_ids": False},
        "common_kwargs": {"return_tensors": "pt"},
    }


class VLoRAProcessor(ProcessorMixin):
    """An image processor and a tokenizer, which gets ``<image>`` as a token of its own.

    The token stands for a whole image. Its id may lie beyond the language model's vocabulary: the model never embeds
    it. `pad_to_square` pads images with the processor's mean colour before they are resized, as fine-tuning and
    inference do; pre-training crops instead. A tokenizer of LLaMA's kind is mended (tokens.py).
    """

    valid_processor_kwargs = VLoRAProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, pad_to_square: bool = True):
        if tokenizer is not None:
            mend(tokenizer)
            if IMAGE not in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
            self.image_token, self.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
        self.pad_to_square = pad_to_square
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Unpack[VLoRAProcessorKwargs]
    ) -> BatchFeature:
        """Texts with a mark ``<image>`` for each image, and the images in that order.

        Returns input_ids and attention_mask (B, L), and pixel_values (I, 3, H, W) if there are images. A prompt from
        `apply_chat_template` has its special tokens already. Prompts are padded on the left, unless told otherwise.
        """
        images = _flat(images)
        if text is None and not images:
            raise InputError("the processor was given neither images nor text")
        side = (kwargs.get("text_kwargs") or {}).get("padding_side", kwargs.get("padding_side", "left"))
        options = self._merge_kwargs(
            VLoRAProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **copy.deepcopy(kwargs)
        )
        data, tensors = {}, options["text_kwargs"].pop("return_tensors", None)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            marks = [each.count(IMAGE) for each in text if isinstance(each, str)]
            if sum(marks) != len(images):
                raise InputError(f"{sum(marks)} marks {IMAGE} in the text, but {len(images)} images")
            _check(max(marks, default=0))
            data |= self.tokenizer(text, **options["text_kwargs"] | {"padding_side": side})
        if images:
            data["pixel_values"] = self.pixels(images, **options["images_kwargs"])
        return BatchFeature(data, tensor_type=tensors)

    def pixels(self, images: Sequence[Any], **options: Any) -> torch.Tensor:
        """Pictures -> (I, 3, H, W); visual features (V, D), which need nothing more, -> (I, V, D)."""
        if isinstance(images[0], torch.Tensor) and images[0].dim() == 2:
            return torch.stack(list(images))
        if self.pad_to_square:
            mean = tuple(int(255 * x) for x in self.image_processor.image_mean)
            images = [_padded(image, mean) for image in self.image_processor.fetch_images(list(images))]
        return self.image_processor(list(images), **{"return_tensors": "pt"} | options)["pixel_values"]

    def encode(self, messages: Sequence[dict[str, Any]], max_length: int | None = None) -> dict[str, torch.Tensor]:
        """A conversation -> input_ids (L) and labels (L), which are `IGNORED` outside the assistant's words.

        A mark within a text part is ordinary text. `InputError` for a conversation of which the authors' code, finding
        its pieces elsewhere than it thought, learns nothing.
        """
        hidden = [_with_texts(message, lambda text: text.replace(IMAGE, _LITERAL)) for message in messages]
        if self.chat_template in (TEMPLATES["vicuna_v1"], TEMPLATES["short"]):
            self._check_texts(messages)
        (text,), (spans,) = render_jinja_template(
            [hidden], chat_template=self.chat_template, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if not hasattr(self, "_stretches"):
            self._stretches = Stretches(self.tokenizer, IMAGE)
        ids, learned, at = [], [], 0
        for stretch in text.split(IMAGE):
            found, places = self._stretches.encode(stretch.replace(_LITERAL, IMAGE))
            ids += [*found, self.image_token_id]
            learned += [
                any(at + first < end and (at + last > begin or at + first >= begin) for begin, end in spans)
                for first, last in places
            ]
            learned.append(False)
            at += len(stretch) + len(IMAGE)
        ids, learned = torch.tensor(ids[:-1][:max_length]), torch.tensor(learned[:-1][:max_length])
        return {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}

    def _check_texts(self, messages: Sequence[dict[str, Any]]) -> None:
        forbidden = [self.tokenizer.eos_token, self.tokenizer.unk_token, " ASSISTANT: "]
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            for mark in filter(None, forbidden):
                if any(mark in part for part in parts):
                    raise InputError(f"{mark!r} within a text: the authors' code learns nothing of such a conversation")

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
        for images, row in samples:
            marks = int((row["input_ids"] == self.image_token_id).sum())
            _check(len(images))
            if bool(marks) != bool(images):
                raise InputError(f"{len(images)} images, but {marks} placeholders; is the maximal length too short?")
        if images := [image for images, _ in samples for image in images]:
            batch["pixel_values"] = self.pixels(images)
        return batch

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        written = super().save_pretrained(*args, **kwargs)
        self.__dict__.pop("auto_map", None)  # of the folder, not of this object: a loaded one has none either
        return written

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _with_texts(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The message with its text parts changed; a content that is one string, marks and all, stays."""
    if isinstance(message["content"], str):
        return message
    return message | {"content": [
        part | {"text": change(part["text"])} if part["type"] == "text" else part for part in message["content"]
    ]}


def _check(most: int) -> None:
    """On a GPU the model does not count, which would make it wait."""
    if most > 1:
        raise InputError(f"{most} images in one row: the model takes one")


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for each in images for image in _flat(each)]
    batch = isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    return list(images) if batch else [images]


def _padded(image: Any, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    image = image if isinstance(image, Image.Image) else to_pil_image(image)
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


for _config in (VLoRAConfig, VisualTokensConfig):
    AutoProcessor.register(_config, VLoRAProcessor, exist_ok=True)
VLoRAProcessor.register_for_auto_class()
