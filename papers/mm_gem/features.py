"""A frozen vision encoder's feature maps, computed once and kept: training then costs the language model alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.data.captions import CaptionShards
from common.data.loader import progress
from common.data.picture import Unreadable
from common.data.tiny import written_once
from common.run import UserError, read_json, write_json
from common.run.files import cache_dir
from papers.mm_gem.data import Captioned
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.processing import MMGEMProcessor

BATCH = 64


def _stat(file: Path) -> tuple[str, int, int]:
    """What changes with a file: its name, bytes and time; of one that is not there, zeros."""
    found = file.stat() if file.exists() else None
    return str(file.resolve()), found.st_size if found else 0, found.st_mtime_ns if found else 0


def fingerprint(module: nn.Module, *more: Any) -> str:
    """64 hexadecimal digits that follow from a module's weights, and from what else JSON can say."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Kept(Dataset):
    """Samples (feature map (C, H, W) in float16, captions): `images` as a frozen encoder sees them."""

    def __init__(self, images: Captioned, folder: Path):
        self.images, self.maps = images, np.load(folder / "maps.npy", mmap_mode="r")
        self.unreadable: dict[str, str] = read_json(folder / "unreadable.json")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...]]:
        if (name := self.name(index)) in self.unreadable:
            raise Unreadable(self.unreadable[name])
        return torch.from_numpy(np.array(self.maps[index])), self.images.captions(index)

    def name(self, index: int) -> str:
        return self.images.name(index)


class _Pixels(Dataset):
    """(prepared image (3, S, S), reason why it could not be read)"""

    def __init__(self, images: Captioned, processor: MMGEMProcessor):
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.processor.pixels([self.images[index][0]])[0], ""
        except Unreadable as error:
            size = self.processor.image_processor.size
            return torch.zeros(3, size["height"], size["width"]), str(error) or "unreadable"


def keep(model: MMGEMModel, processor: MMGEMProcessor, images: Captioned, workers: int = 0) -> Kept:
    """The images with their feature maps, from the cache, or computed now and put there.

    They are those of these very weights, of these files as they are, and of this preparation.
    """
    if any(p.requires_grad for p in model.vision_tower.parameters()):
        raise UserError("feature maps are kept of a frozen vision encoder alone: --tune lora, or --no-keep-features")
    files = images.shards if isinstance(images, CaptionShards) else [row.image for row in images.rows]
    stats = [_stat(Path(file)) for file in files]
    preparation = processor.image_processor.to_dict()
    key = fingerprint(model.vision_tower, stats, len(images), preparation, model.config.standardize)

    def write(folder: Path) -> None:
        unreadable, maps, first = {}, None, 0
        batches = DataLoader(_Pixels(images, processor), batch_size=BATCH, num_workers=workers)
        model.eval()
        for pixels, reasons in progress(batches, "feature maps"):
            with torch.inference_mode():
                found = model.feature_map(pixels.to(model.device)).half().cpu().numpy()
            if maps is None:
                maps = np.lib.format.open_memmap(
                    folder / "maps.npy", "w+", np.float16, (len(images), *found.shape[1:])
                )
            maps[first : first + len(found)] = found
            unreadable |= {images.name(first + i): why for i, why in enumerate(reasons) if why}
            first += len(found)
        maps.flush()
        write_json(folder / "unreadable.json", unreadable)

    about = f"Feature maps of {len(images)} images, kept by papers/mm_gem."
    return Kept(images, written_once("", write, about, cache_dir("features") / key[:32]))
