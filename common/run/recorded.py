"""A recipe as a run's config.json has it, which anybody may have written: looked through before a network is built."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Recipe = TypeVar("Recipe")
# Arguments with which timm and transformers fetch or open what they name.
FETCHING = ("pretrained", "checkpoint", "url", "hub", "file", "cache_dir")
LARGEST = 2048  # of a number that a model is built from, unless its weights show a larger one


def recipe(kind: type[Recipe], fields: Any, largest: int = LARGEST) -> Recipe:
    """`kind` with these fields. ValueError names one that it has not, or whose value is of another type than its own;
    and, of the arguments of a model, one that would fetch something, or a number above `largest`."""
    if not isinstance(fields, dict):
        raise ValueError(f"the recipe is a {type(fields).__name__}, not an object")
    if not dataclasses.is_dataclass(kind):
        return kind(**fields)
    hints = typing.get_type_hints(kind)
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"the recipe has a field {name!r}")
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} is {_short(value)}, expected {hints[name]}")
        if name.endswith(("_args", "_px")) or "depth" in name:
            _check_arguments(name, value, largest)
    return kind(**fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON may stand for one of a type: a list for a tuple, a whole number for a float."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        hints = inner[:1] * len(value) if inner[1:] == (...,) and isinstance(value, list) else inner
        return isinstance(value, list) and len(value) == len(hints) and all(map(_fits, value, hints))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    return type(value) in ((int, float) if hint is float else (hint,))


def _check_arguments(name: str, value: Any, largest: int) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if any(word in key.lower() for word in FETCHING):
                raise ValueError(f"{name} has {key!r}, which could fetch or open what it names")
            _check_arguments(f"{name}.{key}", each, largest)
    elif isinstance(value, list):
        for each in value:
            _check_arguments(name, each, largest)
    elif isinstance(value, int | float) and not -largest <= value <= largest:
        raise ValueError(f"{name} is {_short(value)}, far from what the weights show")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:80]} ..."
