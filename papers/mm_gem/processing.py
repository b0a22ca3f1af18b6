"""Images, boxes and texts -> what the model takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

from common.run import UserError
from papers.mm_gem.model import MMGEMConfig

EMB, CAP = "[EMB]", "[CAP]"
Box = Sequence[float]  # left, top, right, bottom in pixels of the image as it came


class MMGEMProcessor(ProcessorMixin):
    """An image processor and a tokenizer, which gets [EMB] and [CAP] as tokens of its own.

    Images are resized to a square without cropping, so that no region is cut off and boxes only scale [ours]. Texts are
    tokenized without the tokenizer's own special tokens, and [EMB] is appended as an id: a literal "[EMB]" in a text
    remains ordinary text. Texts longer than `max_text_length` tokens are cut with a warning; [EMB] stays.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_text_length: int = 512, chat_template=None):
        if image_processor is not None:
            side = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None) or {}
            size = {key: side.get(key) for key in ("height", "width")}
            if None in size.values():
                kind = type(image_processor).__name__
                raise UserError(f"{kind} has neither a crop_size nor a size with height and width: {side}")
            image_processor.size, image_processor.do_center_crop = size, False
        if tokenizer is not None:
            missing = [token for token in (EMB, CAP) if token not in tokenizer.get_vocab()]
            if missing:
                tokenizer.add_special_tokens({"extra_special_tokens": missing})
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self.emb_token_id, self.cap_token_id = tokenizer.convert_tokens_to_ids([EMB, CAP])
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Image.Image | Sequence[Image.Image] | None = None, text: str | Sequence[str] | None = None,
        boxes: Sequence[Sequence[Box]] | None = None, padding_side: str = "right", **_: Any,
    ) -> BatchFeature:
        """pixel_values (I, 3, S, S) of `images`; boxes (R, 5) of each image's list of `boxes`, in the images' order;
        input_ids and attention_mask (B, L) of `text`, ready to be embedded."""
        data = {}
        if images is not None:
            images = [images] if isinstance(images, Image.Image) else list(images)
            data["pixel_values"] = self.pixels(images)
        if boxes is not None:
            if images is None or len(boxes) != len(images):
                raise UserError(f"{len(boxes)} lists of boxes for {0 if images is None else len(images)} images")
            rows = [self.scaled(image, box, i) for i, image in enumerate(images) for box in boxes[i]]
            data["boxes"] = torch.tensor(rows).view(-1, 5)
        if text is not None:
            data |= self.texts([text] if isinstance(text, str) else list(text), padding_side)
        return BatchFeature(data)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """PIL images -> (I, 3, S, S)."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values

    def scaled(self, image: Image.Image, box: Box, index: int) -> list[float]:
        """A box of an image as the model takes it."""
        size = self.image_processor.size
        x, y = size["width"] / image.width, size["height"] / image.height
        if wrong := wrong_box(box, image):
            raise UserError(wrong)
        left, top, right, bottom = map(float, box)
        return [float(index), left * x, top * y, right * x, bottom * y]

    def texts(self, texts: Sequence[str], padding_side: str = "right") -> dict[str, torch.Tensor]:
        """input_ids and attention_mask (B, L): token ids and [EMB]."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids
        if (longest := max(map(len, rows))) >= self.max_text_length:
            warnings.warn(f"a text of {longest} tokens is cut to {self.max_text_length}, [EMB] included", stacklevel=2)
        rows = [torch.tensor([*row[: self.max_text_length - 1], self.emb_token_id]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, True, self.tokenizer.pad_token_id, padding_side=padding_side),
            "attention_mask": pad([torch.ones_like(row) for row in rows], True, 0, padding_side=padding_side),
        }

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
        return ["input_ids", "attention_mask", "pixel_values", "boxes"]


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


AutoProcessor.register(MMGEMConfig, MMGEMProcessor)
