"""COCO's annotation files, looked through once when they are opened."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.text import read_json
from common.run import UserError


@dataclass(frozen=True)
class Coco:
    """Content of an annotation file, its entries as they stand there."""

    images: dict[int | str, dict[str, Any]]
    """By id, in the file's order."""
    annotations: list[dict[str, Any]]
    categories: dict[int | str, str]
    """Name by id."""


def read_coco(path: Path, fields: Collection[str], *, sizes: bool = False) -> Coco:
    """Reads a file whose annotations must have `fields`: of "id", "caption", "bbox" and "category_id" those that the
    caller uses; and its images width and height with `sizes`.

    `UserError` names the file, and the entry that is wrong: an image or category that is not listed, a box that is not
    four finite numbers, an id used twice.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no COCO annotation file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no COCO annotation file: it holds a {type(content).__name__}, not an object")
    images = _by_id(path, content, "images", "file_name")
    for number, image in enumerate(images.values() if sizes else ()):
        if not all(type(image.get(side)) is int and image[side] > 0 for side in ("width", "height")):
            raise UserError(f"{path}: images[{number}] has no width and height in pixels: {_short(image)}")
    categories = _by_id(path, content, "categories", "name") if "category_id" in fields else {}
    annotations, ids = _entries(path, content, "annotations"), set()
    for number, entry in enumerate(annotations):
        wrong = _wrong(entry, fields, images, categories)
        if not wrong and "id" in fields:
            wrong = "has an id that an earlier one has" if entry["id"] in ids else ""
            ids.add(entry["id"])
        if wrong:
            raise UserError(f"{path}: annotations[{number}] {wrong}: {_short(entry)}")
    return Coco(images, annotations, {number: entry["name"] for number, entry in categories.items()})


def _wrong(entry: Any, fields: Collection[str], images: dict, categories: dict) -> str:
    """What is wrong with an annotation; empty if nothing is."""
    if not isinstance(entry, dict):
        return "is no object"
    if not _is_id(entry.get("image_id")) or entry["image_id"] not in images:
        return "belongs to an image that the file does not list"
    if "id" in fields and not _is_id(entry.get("id")):
        return "has no id"
    if "caption" in fields and not isinstance(entry.get("caption"), str):
        return "has no text as its caption"
    if "category_id" in fields and not (_is_id(entry.get("category_id")) and entry["category_id"] in categories):
        return "has a category that the file does not list"
    if "bbox" in fields and not _is_box(entry.get("bbox")):
        return "has no bbox of four finite numbers x, y, width, height"
    return ""


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    numbers = all(type(v) in (int, float) and -1e9 < v < 1e9 for v in value)
    return numbers and value[2] >= 0 and value[3] >= 0


def _by_id(path: Path, content: dict[str, Any], name: str, text: str) -> dict[int | str, dict[str, Any]]:
    """A list of the file as a dict; each entry has an id of its own and a `text`."""
    found = {}
    for number, entry in enumerate(_entries(path, content, name)):
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get(text), str):
            raise UserError(f"{path}: {name}[{number}] has no id and {text}: {_short(entry)}")
        if entry["id"] in found:
            raise UserError(f"{path}: {name}[{number}] has an id that an earlier one has: {_short(entry)}")
        found[entry["id"]] = entry
    return found


def _entries(path: Path, content: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(content.get(name), list):
        raise UserError(f"{path} is no COCO annotation file: it has no list {name!r}")
    return content[name]


def _short(entry: Any) -> str:
    text = ascii(entry)
    return text if len(text) < 200 else f"{text[:200]} ..."
