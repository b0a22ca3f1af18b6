"""A model in use: any number of images, regions and texts are embedded, or described, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoProcessor, BatchFeature

from common import run
from common.data.images import Images
from common.data.loader import progress
from common.data.picture import Unreadable, read_picture
from common.data.text import printable
from common.run import UserError, World, model_folder, shipped
from common.run.hf import quiet
from papers.mm_gem import build
from papers.mm_gem.data import Captioned
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.processing import Box, MMGEMProcessor, wrong_box
from papers.mm_gem.recipes import Recipe

BATCH = 64  # most images, regions or texts at a time


class Pictures(Protocol):
    """A list of PIL images, or what opens them one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...


class Files:
    """`Pictures` of image files; an unreadable one is a `UserError`, and so is one in which one of its `boxes` lies
    outside."""

    def __init__(self, files: Sequence[Path], boxes: Sequence[Sequence[Box]] | None = None):
        self.files, self.boxes = files, boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        name = printable(self.files[index])
        try:
            picture = read_picture(self.files[index])
        except Unreadable as error:
            raise UserError(f"{name} is unreadable ({error})") from None
        for box in self.boxes[index] if self.boxes else ():
            if wrong := wrong_box(box, picture):
                raise UserError(f"{name}: {wrong}")
        return picture


class Chosen:
    """`Pictures` of some rows of a data set; an unreadable one is a `UserError`."""

    def __init__(self, data: Captioned | Images, rows: Sequence[int]):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return self.data[self.rows[index]][0]
        except Unreadable as error:
            raise UserError(f"cannot evaluate: {self.data.name(self.rows[index])} is unreadable ({error})") from None


class Prepared(Dataset):
    """Batches of pictures, and of their boxes if there are any, as the model takes them."""

    def __init__(self, processor: MMGEMProcessor, pictures: Pictures, boxes: Sequence[Sequence[Box]] | None):
        self.processor, self.pictures, self.boxes = processor, pictures, boxes
        self.batches: list[list[int]] = []
        rows = BATCH
        for i in range(len(pictures)):
            more = 1 if boxes is None else len(boxes[i])
            if rows + more > BATCH:
                self.batches.append([])
                rows = 0
            self.batches[-1].append(i)
            rows += more

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> BatchFeature:
        batch = self.batches[index]
        boxes = None if self.boxes is None else [self.boxes[i] for i in batch]
        return self.processor(images=[self.pictures[i] for i in batch], boxes=boxes)


@dataclass
class Embedder:
    """Embeddings (N, D), of length 1 and on the CPU, and captions."""

    model: MMGEMModel
    processor: MMGEMProcessor
    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu"), None))
    workers: int = 0
    """Processes that read images."""

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], what: str = "texts") -> Tensor:
        """(N, D) on the CPU."""
        found = []
        for first in self._progress(range(0, len(texts), BATCH), what):
            rows = self.processor(text=texts[first : first + BATCH]).to(self.world.device)
            with self.world.autocast():
                found.append(self.model.encode_text(**rows).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def images(self, pictures: Pictures, what: str = "images") -> Tensor:
        """(N, D) on the CPU."""
        found = []
        for batch in self._batches(pictures, None, what):
            with self.world.autocast():
                found.append(self.model.encode_image(**batch).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def prepared(self, pixels: Tensor) -> Tensor:
        """(I, D) on the CPU: of prepared images (I, 3, S, S)."""
        with self.world.autocast():
            return self.model.encode_image(pixels.to(self.world.device)).float().cpu()

    @torch.inference_mode()
    def regions(self, pictures: Pictures, boxes: Sequence[Sequence[Box]], what: str = "regions") -> Tensor:
        """(R, D) on the CPU: of each picture's boxes, in the pictures' order."""
        found = []
        for batch in self._batches(pictures, boxes, what):
            with self.world.autocast():
                found.append(self.model.encode_region(**batch).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def describe(
        self, pictures: Pictures, boxes: Sequence[Sequence[Box]] | None = None, *, beams: int = 1,
        new_tokens: int = 32, what: str = "describing",
    ) -> list[str]:
        """Captions of pictures, or of each picture's boxes."""
        found = []
        for batch in self._batches(pictures, boxes, what):
            with self.world.autocast():
                ids = self.model.generate(**batch, num_beams=beams, max_new_tokens=new_tokens)
            found += self.processor.captions(ids)
        return found

    def _batches(
        self, pictures: Pictures, boxes: Sequence[Sequence[Box]] | None, what: str
    ) -> Iterator[BatchFeature]:
        prepared = Prepared(self.processor, pictures, boxes)
        for batch in self._progress(DataLoader(prepared, batch_size=None, num_workers=self.workers), what):
            yield {key: value.to(self.world.device) for key, value in batch.items()}

    def _progress(self, rows: Sized, what: str):
        return progress(rows, what, active=self.world.is_main)


def load(folder: Path | None, world: World, workers: int = 0) -> Embedder:
    """A saved model, in eval mode, and its processor: of a run or model folder, or of shipped weights, "shipped" or
    "shipped:NAME"; None: shipped weights if there are any, else the newest run's. `UserError` for one without a model.
    """
    path = shipped.for_demo("mm_gem", folder)
    quiet()
    if about := shipped.header(path):
        recipe = Recipe(**about["recipe"])
        processor = build.processor(recipe)
        return Embedder(
            build.assembled(recipe, processor, run.load_weights(path)).to(world.device), processor, world, workers
        )
    folder = model_folder.model_folder(path)
    model = model_folder.load(AutoModel, folder, dtype="auto")
    if not isinstance(model, MMGEMModel):
        raise UserError(f"{folder} holds a {type(model).__name__}, not an MM-GEM model")
    return Embedder(model.to(world.device).eval(), model_folder.load(AutoProcessor, folder), world, workers)
