"""Conversations about images in LLaVA's format: one JSON list of

    {"id": "7", "image": "train/7.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat color is it?"}, {"from": "gpt", "value": "red"}, ...]}

"image" may be missing (text only) or a list; each image has its mark ``<image>`` in a human turn. "category" may name
the kind of question, for evaluation. What else LLaVA's files hold is taken as LLaVA's code takes it: a first turn of
the model's side is dropped; several marks of one turn are one; an image without a mark is not looked at; without an
image the mark is ordinary text; texts keep their blanks, but for a turn with a mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from common.data.picture import read_picture
from common.data.text import inside, printable, read_json
from common.run import UserError, write_text

IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """One dialogue, and the images it is about."""

    name: str
    images: tuple[Path, ...]
    messages: tuple[dict[str, Any], ...]
    """As transformers' chat templates take them: {"role": "user", "content": [{"type": "image"}, {"type": "text",
    "text": ...}]}. Images stand before the text of their turn, wherever the file has their mark. An image that several
    turns name stands in each."""
    category: str = ""

    @property
    def answer(self) -> str:
        """Text of the last turn."""
        return self.messages[-1]["content"][-1]["text"]


class Conversations(Dataset):
    """Samples ([PIL RGB images], conversation) of `rows`."""

    def __init__(self, rows: list[Conversation]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], Conversation]:
        row = self.rows[index]
        return [read_picture(path) for path in row.images], row

    def name(self, index: int) -> str:
        row = self.rows[index]
        return printable(f"{row.name} ({', '.join(map(str, row.images)) or 'text only'})")


def read_conversations(
    path: str | Path, images: str | Path | None = None, *, strict: bool = False, report: Path | None = None,
    limit: float = 0.01, most_images: int | None = None, captions: bool = False,
) -> list[Conversation]:
    """The conversations of a file; image names are relative to `images`, by default the file's folder.

    An entry that is malformed, or has more than `most_images`, is written to `report` and left out, until more than
    `limit` (a share of the file) are; then, or at the first one with `strict` (for evaluation), a `UserError` names it.
    `captions`: of a file for pre-training, each entry a question with an image, and a caption, which may be empty.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no conversation file at {path}")
    try:
        entries = read_json(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(entries, list) or not entries:
        found = "an empty one" if entries == [] else type(entries).__name__
        raise UserError(f"{path}: expected a list of conversations, found {found}")
    rows, bad = [], []
    for number, entry in enumerate(entries):
        try:
            row = parse(entry, Path(images or path.parent), captions=captions)
            if most_images is not None and len(row.images) > most_images:
                raise ValueError(f"id {row.name}: {len(row.images)} images; expected {most_images} at most")
            rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error if isinstance(error, ValueError) else f"malformed, {error!r}"
            bad.append(printable(f"entry {number}: {reason}"))
    if bad and report and not report.exists():  # a resumed run knows them
        write_text(report, "\n".join(bad) + "\n")
    if len(bad) > (0 if strict else max(1, limit * len(entries))) or not rows:
        raise UserError(f"{path}: {len(bad)} of {len(entries)} conversations cannot be read, the first {bad[0]}")
    return rows


def parse(entry: dict[str, Any], images: Path, *, captions: bool = False) -> Conversation:
    """One entry of a file; `ValueError` says what is wrong with it."""
    name, category = str(entry.get("id", "")), str(entry.get("category", ""))
    files = entry.get("image") or []
    files = [files] if isinstance(files, str) else list(files)
    turns, messages, marks = entry["conversations"], [], []
    if turns and turns[0]["from"] == "gpt" and not captions:
        turns = turns[1:]
    for turn, expected in zip(turns, ["human", "gpt"] * len(turns)):
        if turn["from"] != expected:
            raise ValueError(f"id {name}: turn {len(messages)} is from {turn['from']!r}, not {expected!r}")
        text = turn["value"]
        if not isinstance(text, str):
            raise TypeError(f"a text that is a {type(text).__name__}")
        here = text.count(IMAGE) if files else 0
        if here:
            text = text.replace(IMAGE, "")
        if here and expected == "human":
            text = text.strip()
            marks.append(here)
        if not text and expected == "human" and not here:
            raise ValueError(f"id {name}: an empty question")
        content = [{"type": "text", "text": text}]
        if here and expected == "human":
            content = [{"type": "image"}] * (here if len(files) > 1 else 1) + content
        messages.append({"role": ROLES[expected], "content": content})
    if not messages or len(messages) % 2:
        raise ValueError(f"id {name}: {len(messages)} turns; expected questions and answers in pairs")
    if captions and (len(messages) != 2 or messages[0]["content"][0]["type"] != "image"):
        raise ValueError(f"id {name}: expected one question with the mark {IMAGE} of its image, and a caption")
    if not messages[-1]["content"][0]["text"] and not captions:
        raise ValueError(f"id {name}: an empty answer at the end")
    if len(files) > 1 and sum(marks) != len(files):
        raise ValueError(f"id {name}: {len(files)} images, but {sum(marks)} marks {IMAGE} in the questions")
    if not marks:
        files = []  # the authors' code goes on with the text alone
    return Conversation(name, tuple(inside(images, file) for file in files), tuple(messages), category)
