"""Visual features of a frozen tower, computed once and kept in the user's cache.

A training that changes no pixel sees the same features again and again; with them at hand an epoch costs the language
model alone. F images, V features of width D each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from common.data.captions import Captioned, Captions
from common.data.loader import progress
from common.data.picture import read_picture
from common.run import UserError
from common.run.files import cache_dir
from papers.vlora import build
from papers.vlora.data import CaptionDataset
from papers.vlora.processing import VLoRAProcessor
from papers.vlora.recipes import Recipe
from papers.vlora.vision_language import visual_features

BATCH = 25


class FeaturedCaptions(Dataset):
    """Samples (features (V, D), captions) in place of pictures. With `each` every caption is a sample of its own.

    `mean`: all images have the same features, the mean over the images, and nothing can be learned of any.
    """

    def __init__(self, rows: Sequence[Captioned], features: np.ndarray, *, each: bool, mean: np.ndarray | None = None):
        self.rows, self.features, self.mean = list(rows), features, mean
        counts = [len(row.captions) if each else 1 for row in rows]
        self.image = np.repeat(np.arange(len(rows)), counts)
        self.caption = [k if each else None for count in counts for k in range(count)]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tuple[str, ...]]:
        features = self.features[self.image[index]] if self.mean is None else self.mean
        return torch.from_numpy(np.array(features)), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        texts, which = self.rows[self.image[index]].captions, self.caption[index]
        return texts if which is None else texts[which : which + 1]

    def picture(self, index: int) -> Image.Image:
        return read_picture(self.rows[self.image[index]].image)

    def name(self, index: int) -> str:
        return self.rows[self.image[index]].image.name

    def lengths(self) -> list[int]:
        """In words, of the samples' captions."""
        return [len(self.captions(i)[0].split()) for i in range(len(self))]


def featured(data: CaptionDataset, recipe: Recipe, processor: VLoRAProcessor, *, train: bool) -> CaptionDataset:
    """The same captions with the kept features of their images; computed now if they are not there.

    In training every caption is a sample, so an epoch sees them all.
    """
    if not isinstance(data, CaptionDataset) or not isinstance(data.data, Captions):
        raise UserError("features are kept for COCO's caption annotations; conversations and shards need their images")
    rows = data.data.rows
    path = _kept(rows, recipe, processor)
    found = np.load(path, mmap_mode="r")
    mean = found.mean(0, dtype=np.float64).astype(found.dtype) if recipe.blind else None
    return CaptionDataset(FeaturedCaptions(rows, found, each=train, mean=mean), data.prompt, pick=False)


def _kept(rows: Sequence[Captioned], recipe: Recipe, processor: VLoRAProcessor) -> Path:
    """File of the features (F, V, D), float16, of these images by this tower; its name says what they depend on."""
    tower = build.load_vision_tower(recipe.vision, torch.float32).eval()
    plain = replace(recipe, method="tokens")  # any language model will do
    config = build.config(plain, build.CONFIGS["tiny"], tower.config, processor.image_token_id)
    mark = hashlib.sha256(f"{recipe.vision} {processor.pad_to_square} {recipe.standardize}".encode())
    mark.update(processor.image_processor.to_json_string().encode())
    for name, tensor in sorted(tower.state_dict().items()):
        mark.update(f"{name} {tensor.double().sum().item():.9e}".encode())
    for row in rows:
        about = os.stat(row.image)
        mark.update(f"{row.image.name} {about.st_size} {about.st_mtime_ns}".encode())
    path = cache_dir("features") / f"{mark.hexdigest()[:32]}.npy"
    if not path.exists():
        _compute(path, rows, processor, tower, config)
    return path


@torch.no_grad()
def _compute(path: Path, rows: Sequence[Captioned], processor: VLoRAProcessor, tower: Any, config: Any) -> None:
    part = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    out = np.lib.format.open_memmap(part, "w+", np.float16, (len(rows), config.num_features, config.visual_width))
    try:
        for first in progress(range(0, len(rows), BATCH), "visual features", active=True):
            images = [read_picture(row.image) for row in rows[first : first + BATCH]]
            out[first : first + BATCH] = visual_features(tower, config, processor.pixels(images)).half().numpy()
        out.flush()
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
