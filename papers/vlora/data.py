"""Conversations and captions as training samples, and the order they come in.

A sample is (PIL images, messages): a captioned image is a conversation whose answer is the caption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from common import run
from common.data import captions, conversations
from common.data.captions import NoSplit
from common.data.loader import Augmented, steps_per_epoch
from common.data.picture import Unreadable
from common.data.tiny.scenes import scenes
from common.run import UserError
from papers.vlora.configuration import InputError
from papers.vlora.processing import IGNORED, VLoRAProcessor
from papers.vlora.recipes import BUILT_IN, RECIPES, SAMPLES, Recipe

Messages = list[dict[str, Any]]  # a conversation as transformers' chat templates take it

EXPECTED = """expected one of
  conversations  {root}/conversations_train.json (LLaVA's format; or the folder's only .json), conversations_val.json;
                 for pre-training, of one question and one caption each, as LLaVA-Pretrain has them
  captions       {root}/annotations/captions_train*.json beside image folders  (COCO's format)
  shards         {root}/train-000000.tar ..., val-000000.tar ...  (webdataset: KEY.jpg and KEY.txt)"""


class CaptionDataset(Dataset):
    """Captioned images as conversations; `pick` chooses one of several captions at random, else it is the first."""

    def __init__(self, data: captions.Captions | captions.CaptionShards, prompt: str, pick: bool):
        self.data, self.prompt, self.pick = data, prompt, pick

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], Messages]:
        image, texts = self.data[index]
        texts = self.spoken(texts, index)
        return [image], caption_messages(self.prompt, random.choice(texts) if self.pick else texts[0])

    def captions(self, index: int) -> tuple[str, ...]:
        return self.spoken(self.data.captions(index), index)

    def spoken(self, texts: Sequence[str], index: int) -> tuple[str, ...]:
        """Captions without the mark of an image, which some of the web's hold; `Unreadable` if nothing is left."""
        found = tuple(filter(None, (text.replace(conversations.IMAGE, "").strip() for text in texts)))
        if not found:
            raise Unreadable(f"{self.name(index)} has an empty caption")
        return found

    def name(self, index: int) -> str:
        return self.data.name(index)


class ChatDataset(Dataset):
    """Conversations of a file."""

    def __init__(self, data: conversations.Conversations):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], Messages]:
        images, row = self.data[index]
        return images, list(row.messages)

    def name(self, index: int) -> str:
        return self.data.name(index)


Samples = ChatDataset | CaptionDataset


class Encoded(Dataset):
    """(PIL images, `processor.encode`d conversation) of either. A row that nothing can be learned from within
    `max_length` tokens is `Unreadable`, like an image; with `strict` that is an error."""

    def __init__(self, data: Samples, processor: VLoRAProcessor, max_length: int, strict: bool = False):
        self.data, self.processor, self.max_length, self.strict = data, processor, max_length, strict

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        try:
            images, messages = self.data[index]
            try:
                row = self.processor.encode(messages, self.max_length)
            except InputError as error:
                raise Unreadable(str(error)) from None
            marks = int((row["input_ids"] == self.processor.image_token_id).sum())
            if bool(marks) != bool(images):
                raise Unreadable(f"{len(images)} images, but {marks} marks within {self.max_length} tokens")
            if (row["labels"] == IGNORED).all():
                raise Unreadable(f"no word of an answer within {self.max_length} tokens")
        except Unreadable as error:
            if self.strict:
                raise UserError(f"cannot evaluate: {self.name(index)} is unreadable ({error})") from None
            raise
        return images, row

    def name(self, index: int) -> str:
        return self.data.name(index)


def caption_messages(prompt: str, text: str) -> Messages:
    question = [{"type": "image"}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": question}, assistant_message(text)]


def assistant_message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def data_folder(recipe: Recipe, data: Path | None) -> Path:
    """Where a recipe's data are: as given, or the built-in scenes for a recipe meant for them."""
    return run.data_folder(recipe, data, {"scenes": scenes})


def describe(recipe: Recipe, data: Path | None, train: int, val: int) -> str:
    """What a result was measured on: the recipe's data set if what was given is of its size, else the folder's name."""
    own = data is None or (recipe.dataset not in BUILT_IN and train == SAMPLES.get(recipe.dataset))
    name = recipe.dataset if own else data.resolve().name
    return f"{name}: {train:,} training, {val:,} validation samples"


def open_dataset(root: Path, split: str, recipe: Recipe, report: Path | None = None) -> Samples:
    """A split of a folder in one of the layouts above: captions for pre-training, conversations for fine-tuning.

    Malformed conversations of the training split go to `report`. `NoSplit` where the folder has no such split.
    """
    if not root.is_dir():
        raise UserError(f"no data folder {root}: {EXPECTED.format(root=root)}")
    if recipe.stage == "pretrain":
        if shards := sorted(root.glob(f"{split}-*.tar")):
            return CaptionDataset(captions.CaptionShards(shards), recipe.prompt, split == "train")
        if (root / "annotations").is_dir():
            rows = captions.read_captions(root, split)
            return CaptionDataset(captions.Captions(rows), recipe.prompt, split == "train")
    path = root / f"conversations_{split}.json"
    if not path.exists() and split == "train":
        only = [found for found in root.glob("*.json") if not found.name.startswith("conversations_")]
        path = only[0] if len(only) == 1 else path
    if not path.exists():
        what = "captions" if recipe.stage == "pretrain" else "conversations"
        raise NoSplit(f"{root} has no {what} for {split!r}: {EXPECTED.format(root=root)}")
    rows = conversations.read_conversations(
        path, root, strict=split != "train", report=report, most_images=1, captions=recipe.stage == "pretrain"
    )
    return ChatDataset(conversations.Conversations(rows))


def open_if_there(root: Path, split: str, recipe: Recipe) -> Samples | None:
    """`open_dataset`, or None where there is no such split: LLaVA's mixture, for one, comes without validation."""
    try:
        return open_dataset(root, split, recipe)
    except NoSplit:
        return None


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly spread."""
    most = min(most, count)
    return [count * i // most for i in range(most)]


class TrainingBatches(Sampler):
    """One rank's micro-batches of (sample index, seed) for all the steps of a training, `chunks` to a step.

    A function of the seed: the global batches depend neither on the number of ranks nor of chunks. `kinds` tells for
    each sample whether it has an image, and its length: then, as in the authors' trainer, every global batch is all
    images or all text (the last rows of both share one), and micro-batches hold rows of like length; so do global
    batches where `length_groups` of them are sorted together.
    """

    def __init__(
        self, samples: int, batch: int, steps: int, *, seed: int, rank: int = 0, world: int = 1, chunks: int = 1,
        kinds: Sequence[tuple[bool, int]] | None = None, length_groups: int = 1,
    ):
        self.length_groups = length_groups
        self.samples, self.batch, self.steps, self.seed = samples, batch, steps, seed
        self.rank, self.world, self.chunks, self.kinds = rank, world, chunks, kinds
        self.per_epoch = steps_per_epoch(samples, batch)

    def __len__(self) -> int:
        return self.steps * self.chunks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = -1
        for step in range(self.steps):
            if epoch != step // self.per_epoch:
                epoch = step // self.per_epoch
                rng = np.random.default_rng((self.seed, epoch))
                order, seeds = self.order(rng), rng.integers(2**32, size=self.samples)
            rows = order[step % self.per_epoch * self.batch :][: self.batch]
            if self.kinds:
                rows = np.array(sorted(rows, key=lambda row: self.kinds[row][1]))
            for chunk in np.array_split(rows.reshape(-1, self.world), self.chunks):
                yield [(int(row), int(seeds[row])) for row in chunk[:, self.rank]]

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All samples in an epoch's order."""
        order = rng.permutation(self.samples)
        if not self.kinds:
            return order
        seen = np.array([self.kinds[row][0] for row in order])
        batches, left = [], []
        for rows in (order[seen], order[~seen]):
            whole = len(rows) // self.batch * self.batch
            if self.length_groups > 1:
                group = self.length_groups * self.batch
                lengths = np.array([self.kinds[row][1] for row in rows])
                for first in range(0, whole, group):
                    part = slice(first, min(first + group, whole))
                    rows[part] = rows[part][np.argsort(lengths[part], kind="stable")]
            batches += list(rows[:whole].reshape(-1, self.batch))
            left.append(rows[whole:])
        left = np.concatenate(left)
        whole = len(left) // self.batch * self.batch
        batches += list(left[:whole].reshape(-1, self.batch))
        return np.concatenate([*(batches[i] for i in rng.permutation(len(batches))), left[whole:]])


def kinds(data: Samples) -> list[tuple[bool, int]]:
    """(has an image, length in words) of every sample."""
    if isinstance(data, CaptionDataset):
        lengths = data.data.lengths() if hasattr(data.data, "lengths") else [1] * len(data)
        return [(True, length) for length in lengths]
    return [
        (bool(row.images), sum(len(m["content"][-1]["text"].split()) for m in row.messages)) for row in data.data.rows
    ]


def train_loader(
    data: Samples, processor: VLoRAProcessor, recipe: Recipe, steps: int, *, seed: int, rank: int = 0,
    world: int = 1, chunks: int = 1, workers: int = 0, report: Path | None = None,
) -> DataLoader:
    """`TrainingBatches` of a recipe, collated. Unreadable images are counted, reported and passed over."""
    batches = TrainingBatches(
        len(data), recipe.batch, steps, seed=seed, rank=rank, world=world, chunks=chunks,
        kinds=kinds(data) if recipe.grouped else None, length_groups=recipe.length_groups,
    )
    samples = Augmented(Encoded(data, processor, recipe.max_length), list, report=report)
    return DataLoader(
        samples, batch_sampler=batches, collate_fn=processor.collate, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
    )


def main(folder: Path, /) -> None:
    """Prints what a data folder holds for either stage, and which images are missing; or what is expected."""
    found = False
    for stage in ("pretrain", "finetune"):
        for split in ("train", "val"):
            try:
                data = open_dataset(folder, split, replace(RECIPES["tiny"], stage=stage))
            except UserError as error:
                missing = error
                continue
            found = True
            files = {p for row in data.data.rows for p in row.images} if isinstance(data, ChatDataset) else set()
            lost = sorted(path for path in files if not path.is_file())
            print(f"{stage}, {split}: {len(data):,} samples, {len(files):,} image files named"
                  + (f", {len(lost):,} of them missing, such as {lost[0]}" if lost else ""))
    if not found:
        raise missing


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
