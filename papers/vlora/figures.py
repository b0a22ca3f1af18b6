"""Pictures of a run: curves, answers under their images, accuracy beside its controls."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from common import run
from common.metrics.captions import exact_match
from common.run import drawing
from papers.vlora.data import CaptionDataset, Samples
from papers.vlora.evaluate import Question, pictures, questions


def draw(folder: Path, data: Samples | None, samples: Sequence[dict[str, Any]]) -> None:
    """All pictures of a finished run into its folder."""
    drawing.curves(folder, [["loss", "val/loss"], ["lr"], ["grad_norm"]])
    if samples:
        answers(folder / "answers.png", data, samples)
        controls(folder / "controls.png", samples)


def answers(path: Path, data: Samples, samples: Sequence[dict[str, Any]], count: int = 15) -> None:
    """Evenly spread images, each with what was asked and answered; wrong answers in red with the right one."""
    asked = questions(data, len(samples))
    images, captions, colors = [], [], []
    for row in drawing.evenly_spaced(len(samples), count):
        sample, picture = samples[row], _pictures(asked[row], data)
        right = exact_match(sample["answer"], sample["truths"])
        words = [sample["question"], sample["answer"]] if sample["question"] else [sample["answer"]]
        if not right and sample["category"] != "caption":
            words.append(f"({sample['truths'][0]})")
        images.append(np.asarray(picture[0]) if picture else np.full((8, 8, 3), 255, np.uint8))
        captions.append("\n".join(wrapped(text) for text in words))
        colors.append("black" if sample["category"] == "caption" else "green" if right else "red")
    drawing.gallery(path, images, captions, colors, columns=5)


def _pictures(question: Question, data: Samples) -> list[Image.Image]:
    if isinstance(data, CaptionDataset) and hasattr(data.data, "picture"):  # features took its place
        return [data.data.picture(question.images)]
    return pictures(question, data)


def write_answers(folder: Path, samples: Sequence[dict[str, Any]], count: int = 50) -> None:
    """All of them, and fifty captions beside their pictures' names, for a person to count."""
    run.write_json(folder / "answers.json", samples)
    named = [sample for sample in samples if "name" in sample]
    if named:
        shown = named[:: max(1, len(named) // count)][:count]
        lines = [f"| {sample['name']} | {sample['answer']} | {sample['truths'][0]} |\n" for sample in shown]
        run.write_text(folder / "captions.md", "".join(["| picture | caption | a person's |\n|---|---|---|\n", *lines]))


def wrapped(text: str) -> str:
    """At most three lines of a caption's width."""
    return "\n".join(textwrap.wrap(text, 26)[:3])


def controls(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Per category, the right answers with the right image and with another; for captions, the two losses."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    if all(sample["category"] == "caption" for sample in samples):
        own, other = (np.array([s[key] for s in samples]) for key in ("loss", "loss_exchanged"))
        axis.scatter(own, other, s=12, c=np.where(own < other, "tab:green", "tab:red"))
        axis.axline((own.mean(), own.mean()), slope=1, color="gray", linewidth=1)
        axis.set_xlabel("loss with the right image")
        axis.set_ylabel("with another image")
    else:
        groups = defaultdict(list)
        for sample in samples:
            groups[sample["category"]].append(sample)
        place = np.arange(len(groups))
        for shift, key, label in ((-0.2, "answer", "right image"), (0.2, "exchanged", "another image")):
            fractions = [np.mean([exact_match(s[key], s["truths"]) for s in rows]) for rows in groups.values()]
            axis.bar(place + shift, fractions, 0.4, label=label)
        axis.set_xticks(place, list(groups))
        axis.set_ylim(0, 1)
        axis.set_ylabel("right answers")
        axis.legend(frameon=False)
    drawing.save(figure, path)
