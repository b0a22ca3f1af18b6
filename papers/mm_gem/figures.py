"""Pictures of a run: curves, what retrieval finds, captions, described regions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageDraw

from common.data.picture import read_picture
from common.run import drawing
from common.run.drawing import evenly_spaced


def draw(folder: Path, outputs: dict[str, Any]) -> None:
    """All pictures of a finished run into its folder."""
    drawing.curves(folder, [["loss", "loss_emb", "loss_gen"], ["tau"], ["grad_norm"]])
    files, truths = outputs["images"], outputs["truths"]
    if not Path(files[0]).is_file():  # in shards
        return
    if "nearest" in outputs:
        hits(folder / "retrieval.png", outputs, evenly_spaced(len(outputs["texts"]), 4))
    if "captions" in outputs:
        rows = evenly_spaced(len(files), 10)
        captions = [outputs["captions"][i] for i in rows]
        colors = ["green" if caption in truths[i] else "black" for i, caption in zip(rows, captions)]
        pictures = [_picture(files[i]) for i in rows]
        drawing.gallery(folder / "captions.png", pictures, [_wrapped(x) for x in captions], colors, columns=5)
    if outputs.get("regions"):
        rows = [outputs["regions"][i] for i in evenly_spaced(len(outputs["regions"]), 10)]
        pictures = [boxed(row["image"], row["box_xyxy_px"]) for row in rows]
        colors = ["green" if row["caption"] == row["phrase"] else "black" for row in rows]
        captions = [_wrapped(row["caption"]) for row in rows]
        drawing.gallery(folder / "regions.png", pictures, captions, colors, columns=5)


def hits(path: Path, outputs: dict[str, Any], queries: Sequence[int]) -> None:
    """A line of pictures for each text, the nearest first; green where the picture has that very caption."""
    pictures, captions, colors = [], [], []
    for query in queries:
        text, nearest = outputs["texts"][query], outputs["nearest"][query]
        for rank, image in enumerate(nearest, 1):
            pictures.append(_picture(outputs["images"][image]))
            captions.append(_wrapped(text) if rank == 1 else str(rank))
            colors.append("green" if text in outputs["truths"][image] else "black")
    drawing.gallery(path, pictures, captions, colors, columns=len(outputs["nearest"][0]))


def boxed(file: str | Path, box: Sequence[float]) -> np.ndarray:
    """A picture with a box drawn into it."""
    picture = read_picture(file)
    ImageDraw.Draw(picture).rectangle(tuple(box), outline="magenta", width=max(1, picture.width // 100))
    return np.asarray(picture)


def _picture(file: str | Path) -> np.ndarray:
    return np.asarray(read_picture(file))


def _wrapped(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
