"""Pictures of a run: curves, what retrieval finds, captions, described regions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
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


def draw_objectives(path: Path, rows: Mapping[str, Mapping[str, Mapping[str, Any]]], long: Sequence[str]) -> None:
    """Scores of the members of a comparison, by label and name, with their spread: retrieval, captions, long texts."""
    panels = {
        "text -> image R@, %": {f"text -> image R@{k}": str(k) for k in (1, 5, 10)},
        "image -> text R@, %": {f"image -> text R@{k}": str(k) for k in (1, 5, 10)},
        "captions": {name: name for name in ("CIDEr-D", "BLEU-4", "ROUGE-L")},
        "five captions as one text, text -> image R@1, %": {
            f"five captions {how}, text -> image R@1": how.replace(" tokens", "") for how in long
        },
    }
    figure, axes = drawing.plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        shown = {label: its for label, its in rows.items() if any(key in its for key in keys)}
        width = 0.8 / max(1, len(shown))
        for number, (label, its) in enumerate(shown.items()):
            present = [(i, its[key]) for i, key in enumerate(keys) if key in its]
            axis.bar(
                [i + width * (number - (len(shown) - 1) / 2) for i, _ in present], [row["value"] for _, row in present],
                width, yerr=[row.get("spread", 0) for _, row in present], capsize=2, label=label,
            )
        axis.set_xticks(range(len(keys)), list(keys.values()), fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(frameon=False, fontsize=7)
    drawing.save(figure, path)


def boxed(file: str | Path, box: Sequence[float]) -> np.ndarray:
    """A picture with a box drawn into it."""
    picture = read_picture(file)
    ImageDraw.Draw(picture).rectangle(tuple(box), outline="magenta", width=max(1, picture.width // 100))
    return np.asarray(picture)


def _picture(file: str | Path) -> np.ndarray:
    return np.asarray(read_picture(file))


def _wrapped(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
