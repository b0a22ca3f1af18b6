"""Generated scenes of coloured shapes, with captions, boxes and conversations.

A scene shows either one to three equal objects ("two red circles") or two different ones side by side or one above the
other ("a red circle left of a blue square"). What is asked has one right answer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.data.conversations import IMAGE
from common.data.tiny import written_once

COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 210), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
# Unit vector from the second object to the first; the opposite word.
RELATIONS = {"left of": (-1, 0, "right of"), "right of": (1, 0, "left of"), "above": (0, -1, "below"),
             "below": (0, 1, "above")}
QUESTIONS = {
    "colour": "What color is it?", "shape": "What shape is it?", "count": "How many objects are there?",
    "relation": "Where is the {0} seen from the {1}?",
}
DESCRIBE = "Describe the image."
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def scenes(train: int = 2000, val: int = 400, side: int = 64, seed: int = 0, root: Path | None = None) -> Path:
    """Scenes on `side` x `side` pixels, written once, to the cache unless `root` says otherwise. Returns the folder::

        train/000000.png ... val/000000.png ...
        annotations/captions_train.json, captions_val.json      COCO captions, two for each image
        annotations/instances_train.json, instances_val.json    COCO boxes; "phrase" says what is in them
        conversations_train.json    LLaVA's format; of each scene a description, and a dialogue of all questions
        conversations_val.json      the same, one question each, with its "category"

    The splits share no scene: other positions, sizes, shades and backgrounds.
    """

    def write(folder: Path) -> None:
        for split, count in (("train", train), ("val", val)):
            _write(folder, split, count, side, np.random.default_rng((seed, split == "val")))

    about = f"Generated scenes of coloured shapes: {train} for training, {val} for validation, {side} px, seed {seed}."
    return written_once(f"scenes-{train}-{val}-{side}-{seed}", write, about, root)


def word_tokenizer():
    """A tokenizer of whole words for these scenes' texts: ids 0 to 3 are <pad>, <s>, </s> and <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *COUNTS, *RELATIONS, *QUESTIONS.values(), DESCRIBE]
    words = " ".join([*texts, "a . USER : ASSISTANT"]).replace("?", " ?").replace(".", " .").split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *(w for w in words if w[0] != "{")]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="right",
    )


def _write(folder: Path, split: str, count: int, side: int, rng: np.random.Generator) -> None:
    (folder / split).mkdir()
    (folder / "annotations").mkdir(exist_ok=True)
    images, captions, boxes, talks = [], [], [], []
    for i in range(count):
        picture, objects, relation = _scene(side, rng)
        name = f"{i:06d}.png"
        picture.save(folder / split / name)
        images.append({"id": i, "file_name": name, "width": side, "height": side})
        for text in _captions(objects, relation):
            captions.append({"id": len(captions), "image_id": i, "caption": text})
        for color, shape, (x, y, r) in objects:
            boxes.append({
                "id": len(boxes), "image_id": i, "category_id": SHAPES.index(shape) + 1, "iscrowd": 0,
                "bbox": [x - r, y - r, 2 * r + 1, 2 * r + 1], "area": (2 * r + 1) ** 2, "phrase": f"a {color} {shape}",
            })
        asked = [("describe", DESCRIBE, _captions(objects, relation)[0]), *_questions(objects, relation)]
        described, *dialogue = asked
        rng.shuffle(dialogue)  # no answer is given away by an earlier turn
        for turns in [[described], dialogue] if split == "train" else [[each] for each in asked]:
            spoken = [{"from": who, "value": text} for _, *pair in turns for who, text in zip(("human", "gpt"), pair)]
            spoken[0]["value"] = f"{IMAGE}\n{spoken[0]['value']}"
            kind = turns[0][0] if len(turns) == 1 else "mixed"
            entry = {"id": f"{i}-{kind}", "image": f"{split}/{name}", "category": kind, "conversations": spoken}
            talks.append(entry)
    shapes = [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)]
    home = folder / "annotations"
    for path, content in (
        (home / f"captions_{split}.json", {"images": images, "annotations": captions}),
        (home / f"instances_{split}.json", {"images": images, "annotations": boxes, "categories": shapes}),
        (folder / f"conversations_{split}.json", talks),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")


def _scene(side: int, rng: np.random.Generator) -> tuple[Image.Image, list, str | None]:
    """(picture, [(colour, shape, (x, y, r))], relation of the first object to the second or None)."""
    picks = [(c, s) for c in COLORS for s in SHAPES]
    first = picks[rng.integers(len(picks))]
    relation = None
    if rng.random() < 0.4:
        others = [(c, s) for c, s in picks if c != first[0] and s != first[1]]
        kinds, relation = [first, others[rng.integers(len(others))]], str(rng.choice(list(RELATIONS)))
        dx, dy, _ = RELATIONS[relation]
        middle = side * (0.5 + rng.uniform(-0.08, 0.08, 2))
        gap = side * rng.uniform(0.2, 0.26)
        wobble = side * rng.uniform(-0.08, 0.08, 2) * (dx == 0, dy == 0)
        spots = [middle + gap * np.array([dx, dy]) + wobble, middle - gap * np.array([dx, dy]) - wobble]
    else:
        kinds = [first] * int(rng.integers(1, 4))
        cells = rng.permutation(4)[: len(kinds)]  # a 2 x 2 grid: objects never touch
        spots = [side * (0.28 + 0.44 * np.array([c % 2, c // 2]) + rng.uniform(-0.06, 0.06, 2)) for c in cells]
    background = rng.integers(0, 50, 3)
    picture = Image.new("RGB", (side, side), tuple(int(v) for v in background))
    draw, objects = ImageDraw.Draw(picture), []
    for (color, shape), spot in zip(kinds, spots):
        x, y = (int(v) for v in np.round(spot))
        r = int(np.round(side * rng.uniform(0.12, 0.17)))
        shade = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-20, 21, 3), 0, 255))
        _draw(draw, shape, x, y, r, shade)
        objects.append((color, shape, (x, y, r)))
    return picture, objects, relation


def _draw(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)


def _captions(objects: list, relation: str | None) -> list[str]:
    """Two ways to say what is there."""
    (color, shape, _), *rest = objects
    if relation:
        other = f"a {rest[0][0]} {rest[0][1]}"
        return [f"a {color} {shape} {relation} {other} .", f"{other} {RELATIONS[relation][2]} a {color} {shape} ."]
    plural = "s" if rest else ""
    short = f"{COUNTS[len(rest)]} {color} {shape}{plural} ."
    return [short if rest else f"a {color} {shape} .", short]


def _questions(objects: list, relation: str | None) -> list[tuple[str, str, str]]:
    """(category, question, answer)."""
    (color, shape, _), *rest = objects
    if relation:
        asked = QUESTIONS["relation"].format(f"{color} {shape}", f"{rest[0][0]} {rest[0][1]}")
        return [("count", QUESTIONS["count"], COUNTS[1]), ("relation", asked, relation)]
    found = {"count": COUNTS[len(rest)], "shape": shape, "colour": color}
    return [(category, QUESTIONS[category], answer) for category, answer in found.items()]
