"""What a backbone's map knows of places, on COCO's pictures: a linear classifier for its cells, and regions that find
their like.

    n pictures · C, h, w: channels and sides of a map; a picture is shown SIDE x SIDE px, whatever its own sides
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_tensor

from common.data import loader
from common.data.coco import read_coco
from common.data.picture import Unreadable, read_picture
from common.data.text import inside, read_json
from common.metrics.retrieval import recall_at
from common.run import UserError, World

SIDE = 160
LEAST = 16  # px of a shown region's shorter side: two cells at a stride of 8
UNLABELLED = -1
SPLITS = ("train", "val")


def scores(backbone: nn.Module, coco: Path, world: World) -> dict[str, float]:
    """All scores of a backbone as it stands, in percent; COCO's folder holds `instances_*` and `panoptic_*`."""
    return cell_scores(backbone, coco, world) | region_scores(backbone, coco, world)


def feature_map(backbone: nn.Module, path: Path, world: World) -> Tensor:
    """(C, h, w) of a picture, float32 on the CPU."""
    try:
        picture = read_picture(path).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except Unreadable as error:
        raise UserError(f"cannot evaluate: {path} is unreadable ({error})") from None
    pixels = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(to_tensor(picture))[None]
    with torch.inference_mode(), world.autocast():
        return backbone.eval()(pixels.to(world.device))[0].float().cpu()


# Cells ----------------------------------------------------------------------------------------------------


def cell_scores(backbone: nn.Module, coco: Path, world: World) -> dict[str, float]:
    """A linear classifier on single cells, taught on the training split's masks: accuracy over the validation split's
    cells, and the mean over the kinds in them of intersection over union. Kinds are COCO's 27 supercategories."""
    x, y = {}, {}
    for split in SPLITS:
        pictures, masks = panoptic(coco, split)
        maps = [feature_map(backbone, path, world) for path in loader.progress(pictures, f"cells of {split}")]
        labels = np.concatenate([cell_labels(mask, maps[0].shape[1]).ravel() for mask in masks])
        cells = torch.stack(maps).permute(0, 2, 3, 1).flatten(0, 2).numpy()
        x[split], y[split] = cells[labels != UNLABELLED], labels[labels != UNLABELLED]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    found = classifier.fit(x["train"], y["train"]).predict(x["val"])
    overlaps = [
        ((found == kind) & (y["val"] == kind)).sum() / ((found == kind) | (y["val"] == kind)).sum()
        for kind in np.unique(y["val"])
    ]
    return {"cell_top1": 100 * float((found == y["val"]).mean()), "cell_miou": 100 * float(np.mean(overlaps))}


def panoptic(coco: Path, split: str) -> tuple[list[Path], list[np.ndarray]]:
    """Pictures, and the number (SIDE, SIDE) of the supercategory, in alphabetical order, of each of their pixels.

    Reads COCO's own files, where a pixel of a PNG names its segment: R + 256 G + 65536 B.
    """
    listing = coco / "annotations" / f"panoptic_{split}2017.json"
    try:
        content = read_json(listing)
        kinds = sorted({category["supercategory"] for category in content["categories"]})
        number = {category["id"]: kinds.index(category["supercategory"]) for category in content["categories"]}
        names = {image["id"]: image["file_name"] for image in content["images"]}
        paths, masks = [], []
        for entry in content["annotations"]:
            paths.append(inside(coco / f"{split}2017", names[entry["image_id"]]))
            kind_of = {segment["id"]: number[segment["category_id"]] for segment in entry["segments_info"]}
            picture = read_picture(inside(listing.with_suffix(""), entry["file_name"]))
            rgb = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(np.int64)
            segments, place = np.unique(rgb @ (1, 256, 65536), return_inverse=True)
            kind = np.array([kind_of.get(int(segment), UNLABELLED) for segment in segments])
            masks.append(kind[place].reshape(SIDE, SIDE))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listing} and the folder of that name do not hold COCO's panoptic masks: {error!r}") from None
    if not paths:
        raise UserError(f"{listing} lists no picture")
    return paths, masks


def cell_labels(mask: np.ndarray, cells: int) -> np.ndarray:
    """(side, side) -> (cells, cells): the number that more than half of a cell's pixels have, else `UNLABELLED`."""
    if mask.shape[0] % cells:
        raise ValueError(f"{mask.shape[0]} px are no whole number of pixels to each of {cells} cells")
    size = mask.shape[0] // cells
    pixels = mask.reshape(cells, size, cells, size).swapaxes(1, 2).reshape(cells, cells, -1)
    middle = np.sort(pixels, axis=2)[..., pixels.shape[2] // 2]  # what over half of them have is their median
    return np.where((pixels == middle[..., None]).sum(2) * 2 > pixels.shape[2], middle, UNLABELLED)


# Regions --------------------------------------------------------------------------------------------------


def region_scores(backbone: nn.Module, coco: Path, world: World) -> dict[str, float]:
    """Objects of the validation split look for their like among those of the training split, by the cosine of the
    map's mean over their boxes: how often one of the same category is the nearest, or among the five nearest."""
    (gallery, kinds), (queries, asked) = (regions(backbone, coco, split, world) for split in SPLITS)
    relevant = asked[:, None] == kinds
    there = relevant.any(1)
    if not there.any():
        raise UserError(f"{coco}: no category of the validation split's boxes is among the training split's")
    found = recall_at(queries[there] @ gallery.T, relevant[there], (1, 5))
    return {f"region_{key}": value for key, value in found.items()}


def regions(backbone: nn.Module, coco: Path, split: str, world: World) -> tuple[Tensor, Tensor]:
    """Features (boxes, C) of unit length, and the categories (boxes) of what is at least `LEAST` px wide and high."""
    annotated = read_coco(coco / "annotations" / f"instances_{split}2017.json", ("bbox", "category_id"), sizes=True)
    number = {category: i for i, category in enumerate(annotated.categories)}
    features: list[Tensor] = []
    kinds: list[int] = []
    for image_id, image in loader.progress(list(annotated.images.items()), f"regions of {split}"):
        scale = np.array([SIDE / image["width"], SIDE / image["height"]] * 2)
        entries = [entry for entry in annotated.annotations if entry["image_id"] == image_id]
        boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4) * scale
        large = (boxes[:, 2:] >= LEAST).all(1) if len(boxes) else np.zeros(0, dtype=bool)
        if large.any():
            features.append(pooled(feature_map(backbone, coco / f"{split}2017" / image["file_name"], world),
                                   boxes[large]))
            kinds += [number[entry["category_id"]] for entry, kept in zip(entries, large) if kept]
    if not features:
        raise UserError(f"{coco}: no box of {split}2017 is {LEAST} px wide and high in a picture shown at {SIDE} px")
    return F.normalize(torch.cat(features).double(), dim=1), torch.tensor(kinds)


def pooled(map_Chw: Tensor, boxes_xywh: Sequence[Sequence[float]] | np.ndarray) -> Tensor:
    """(boxes, C): RoIAlign's mean over boxes in shown pixels."""
    corners = torch.as_tensor(boxes_xywh, dtype=torch.float32).clone()
    corners[:, 2:] += corners[:, :2]
    cells = roi_align(map_Chw[None], [corners], 3, map_Chw.shape[-1] / SIDE, 2, aligned=True)
    return cells.mean((2, 3))
