"""Images, boxes and texts -> what the model takes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .configuration import InputError, MMGEMConfig

EMB, CAP = "[EMB]", "[CAP]"
Box = Sequence[float]  # left, top, right, bottom in pixels of the image as it came
# A text is no instruction to this model: it is how the caption begins.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set words = message.content if message.content is string else "
    "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- if message.role == 'assistant' -%}{{ words }}{%- elif words -%}"
    "{{ raise_exception('MM-GEM follows no instructions: how a caption begins is a message of the assistant') }}"
    "{%- endif -%}{%- endfor -%}"
)


class MMGEMProcessorKwargs(ProcessingKwargs, total=False):
    """Options go to the tokenizer and to the image processor; transformers warns of one that neither knows."""

    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "right", "return_token_type_ids": False},
        "common_kwargs": {"return_tensors": "pt"},
    }


class MMGEMProcessor(ProcessorMixin):
    """An image processor and a tokenizer, which gets [EMB] and [CAP] as tokens of its own, and appends [EMB].

    Images are resized to a square without cropping, so that no region is cut off and boxes only scale [ours]. Texts are
    tokenized without the tokenizer's own special tokens; a literal "[EMB]" in a text remains ordinary text. Texts
    longer than `max_text_length` tokens are cut with a warning; [EMB] stays.
    """

    valid_processor_kwargs = MMGEMProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, max_text_length: int = 512, chat_template=None):
        if image_processor is not None:
            side = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None) or {}
            size = {key: side.get(key) for key in ("height", "width")}
            if None in size.values():
                kind = type(image_processor).__name__
                raise InputError(f"{kind} has neither a crop_size nor a size with height and width: {side}")
            image_processor.size, image_processor.do_center_crop = size, False
        if tokenizer is not None:
            self._prepare(tokenizer)
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def _prepare(self, tokenizer: Any) -> None:
        """The two tokens, and [EMB] at the end of whatever it tokenizes, also where it is loaded by itself."""
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} is a slow tokenizer; MM-GEM needs a fast one")
        missing = [token for token in (EMB, CAP) if token not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": missing})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.emb_token_id, self.cap_token_id = tokenizer.convert_tokens_to_ids([EMB, CAP])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {EMB}", special_tokens=[(EMB, self.emb_token_id)]
        )
        tokenizer.model_input_names = ["input_ids", "attention_mask"]

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None,
        boxes: Sequence[Sequence[Box]] | None = None, **kwargs: Unpack[MMGEMProcessorKwargs],
    ) -> BatchFeature:
        """pixel_values (I, 3, S, S) of `images`; boxes (R, 5) of each image's list of `boxes`, in the images' order;
        input_ids and attention_mask (B, L) of `text`, ready to be embedded, or to begin captions."""
        images = _flat(self.image_processor.fetch_images(images)) if images is not None else []
        if text is None and not images and boxes is None:
            raise InputError("the processor was given neither images nor text")
        options = self._merge_kwargs(
            MMGEMProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **copy.deepcopy(kwargs)
        )
        data, tensors = {}, options["text_kwargs"].pop("return_tensors", None)
        if images:
            data["pixel_values"] = self.pixels(images, **options["images_kwargs"])
        if boxes is not None:
            if len(boxes) != len(images):
                raise InputError(f"{len(boxes)} lists of boxes for {len(images)} images")
            rows = [self.scaled(image, box, i) for i, image in enumerate(images) for box in boxes[i]]
            data["boxes"] = torch.tensor(rows).view(-1, 5)
        if text is not None:
            data |= self._texts([text] if isinstance(text, str) else list(text), options["text_kwargs"])
        return BatchFeature(data, tensor_type=tensors)

    def pixels(self, images: Sequence[Any], **options: Any) -> torch.Tensor:
        """Pictures -> (I, 3, S, S)."""
        images = [image.convert("RGB") if isinstance(image, Image.Image) else image for image in images]
        return self.image_processor(images, **{"return_tensors": "pt"} | options)["pixel_values"]

    def scaled(self, image: Image.Image, box: Box, index: int) -> list[float]:
        """A box of an image as the model takes it."""
        size = self.image_processor.size
        x, y = size["width"] / image.width, size["height"] / image.height
        if wrong := wrong_box(box, image):
            raise InputError(wrong)
        left, top, right, bottom = map(float, box)
        return [float(index), left * x, top * y, right * x, bottom * y]

    def texts(self, texts: Sequence[str], padding_side: str = "right") -> dict[str, torch.Tensor]:
        """input_ids and attention_mask (B, L): token ids and [EMB]."""
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        return dict(self._texts(list(texts), options))

    def _texts(self, texts: list[str], options: dict[str, Any]) -> BatchFeature:
        """Tokenized, [EMB] kept where a text is cut."""
        options = {"return_token_type_ids": False} | options
        # whatever is asked for: nothing but [EMB] is added, and it is never read out of a text
        options |= {"add_special_tokens": True, "split_special_tokens": True}
        if not options.get("truncation"):
            rows = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
            if (longest := max(map(len, rows))) >= self.max_text_length:
                warnings.warn(
                    f"a text of {longest} tokens is cut to {self.max_text_length}, [EMB] included", stacklevel=3
                )
                options |= {"truncation": True, "max_length": self.max_text_length}
        return self.tokenizer(texts, **options)

    def collate(self, samples: Sequence[tuple[Image.Image, Box | None, str]]) -> dict[str, torch.Tensor]:
        """(image, box or None for the whole, text) -> a training batch, one row each."""
        images, boxes, texts = zip(*samples)
        batch = {"pixel_values": self.pixels(images), **self.texts(texts)}
        if any(box is not None for box in boxes):
            whole = [box or (0, 0, *image.size) for image, box in zip(images, boxes)]
            batch["boxes"] = torch.tensor([self.scaled(*each, i) for i, each in enumerate(zip(images, whole))])
        return batch

    def captions(self, ids: torch.Tensor) -> list[str]:
        """What `generate` returned, as texts."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def wrong_box(box: Box, image: Image.Image) -> str:
    """What is wrong with a box of an image; empty if it is four finite numbers and holds something of the image."""
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError):
        return f"box {box!r} is not four numbers: left, top, right, bottom"
    if not all(map(math.isfinite, (left, top, right, bottom))):
        return f"box {list(box)} is not of finite numbers"
    if min(right, image.width) > max(left, 0) and min(bottom, image.height) > max(top, 0):
        return ""
    return f"box {list(box)} holds nothing of the image of {image.width} x {image.height} px"


def _flat(images: Any) -> list[Any]:
    """Pictures out of lists of lists, and of batches."""
    if isinstance(images, list | tuple):
        return [image for each in images for image in _flat(each)]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]


AutoProcessor.register(MMGEMConfig, MMGEMProcessor, exist_ok=True)
MMGEMProcessor.register_for_auto_class()
