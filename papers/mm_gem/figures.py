"""Pictures of a run: curves, what retrieval finds, captions, described regions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from common.run import drawing


def draw(folder: Path, said: dict[str, Any]) -> None:
    """All pictures of a finished run into its folder."""
    drawing.curves(folder, [["loss", "loss_emb", "loss_gen"], ["tau"], ["grad_norm"]])
    files = said["images"]
    if not Path(files[0]).is_file():  # in shards
        return
    if "similarity" in said:
        queries = _spread(len(said["texts"]), 4)
        similarity = said["similarity"].T
        nearest = [[files[i] for i in similarity[q].topk(min(5, len(files))).indices] for q in queries]
        hits(folder / "retrieval.png", [said["texts"][q] for q in queries], nearest, said)
    if "captions" in said:
        rows = _spread(len(files), 10)
        colors = ["green" if said["captions"][i] in said["truths"][i] else "black" for i in rows]
        captions = [_wrapped(said["captions"][i]) for i in rows]
        drawing.gallery(folder / "captions.png", [_picture(files[i]) for i in rows], captions, colors, columns=5)
    if said.get("regions"):
        rows = [said["regions"][i] for i in _spread(len(said["regions"]), 10)]
        pictures = [boxed(row["image"], row["box_xyxy_px"]) for row in rows]
        colors = ["green" if row["said"] == row["phrase"] else "black" for row in rows]
        drawing.gallery(folder / "regions.png", pictures, [_wrapped(row["said"]) for row in rows], colors, columns=5)


def hits(path: Path, queries: Sequence[str], found: Sequence[Sequence[str]], said: dict[str, Any]) -> None:
    """A line of pictures for each text query, the nearest first; green where the picture has that very caption."""
    pictures, captions, colors = [], [], []
    for query, files in zip(queries, found):
        for rank, file in enumerate(files, 1):
            truths = said["truths"][said["images"].index(file)]
            pictures.append(_picture(file))
            captions.append(_wrapped(query) if rank == 1 else str(rank))
            colors.append("green" if query in truths else "black")
    drawing.gallery(path, pictures, captions, colors, columns=len(found[0]))


def boxed(file: str | Path, box: Sequence[float]) -> np.ndarray:
    """A picture with a box drawn into it."""
    picture = Image.open(file).convert("RGB")
    ImageDraw.Draw(picture).rectangle(tuple(box), outline="magenta", width=max(1, picture.width // 100))
    return np.asarray(picture)


def _picture(file: str | Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def _spread(count: int, most: int) -> list[int]:
    return [count * i // min(most, count) for i in range(min(most, count))]


def _wrapped(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
