"""Small trained weights that travel with a paper: ``papers/<paper>/weights/NAME.safetensors``, with a card NAME.md.

A file describes itself: in its header stands, as JSON, what a run folder says of its network (paper, recipe, classes).
It is loaded wherever a run folder is; on the command line it is called ``shipped:NAME``, or ``shipped``, the first one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.run.files import ROOT, UserError, written_whole
from common.run.folder import newest

KEYS = ("paper", "recipe_name", "recipe", "classes", "revision")


def folder(paper: str) -> Path:
    return ROOT / "papers" / paper / "weights"


def names(paper: str) -> list[str]:
    """Of the weights that travel with a paper."""
    return sorted(path.stem for path in folder(paper).glob("*.safetensors"))


def path_of(paper: str, checkpoint: Path) -> Path:
    """The path itself, or the file that ``shipped`` or ``shipped:NAME`` means; `UserError` for one that is not there.
    """
    word, _, name = str(checkpoint).partition(":")
    if word != "shipped" or checkpoint.exists():
        if not checkpoint.exists():
            raise UserError(f"no checkpoint at {checkpoint}")
        return checkpoint
    known = names(paper)
    if not known:
        raise UserError(f"no weights are shipped with {paper}; make some with make reproduce PAPER={paper}")
    if name and name not in known:
        raise UserError(f"no weights {name!r} are shipped with {paper}; there are {', '.join(known)}")
    return folder(paper) / f"{name or known[0]}.safetensors"


def for_demo(paper: str, checkpoint: Path | None, recipes: Collection[str] = ()) -> Path:
    """What a demo shows: the given checkpoint, else shipped weights, else the newest finished run (of `recipes`)."""
    if checkpoint:
        return path_of(paper, checkpoint)
    return path_of(paper, Path("shipped")) if names(paper) else newest(paper, recipes)


def header(path: Path) -> dict[str, Any] | None:
    """What a file says of itself, by `KEYS`; None for a file of bare weights, `UserError` for a damaged one."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        return {key: json.loads(said[key]) for key in KEYS} if "recipe" in said else None
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is truncated or not a checkpoint: {type(error).__name__}: {error}") from None


def is_run(checkpoint: Path) -> bool:
    """Whether a checkpoint says itself what network it holds: a run folder, or a file as they are shipped."""
    return checkpoint.is_dir() or header(checkpoint) is not None


def write(
    path: Path, weights: Mapping[str, torch.Tensor], *, paper: str, recipe_name: str, recipe: Any,
    classes: Sequence[str], revision: str, dtype: torch.dtype = torch.float16, most_bytes: int = 4_000_000,
) -> None:
    """Writes a file that describes itself, floating-point tensors as `dtype`. `UserError` if it would be too large, or
    if a weight does not survive `dtype`."""
    halves = {key: t.detach().cpu().to(dtype if t.is_floating_point() else t.dtype) for key, t in weights.items()}
    if broken := [k for k, t in halves.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise UserError(f"{broken[0]} holds numbers beyond {dtype}")
    said = dict(zip(KEYS, (paper, recipe_name, dataclasses.asdict(recipe), list(classes), revision)))
    with written_whole(path) as part:
        save_file(
            {key: t.contiguous().clone() for key, t in halves.items()}, part,
            {"format": "pt"} | {key: json.dumps(value, default=str) for key, value in said.items()},
        )
        if (size := Path(part).stat().st_size) > most_bytes:
            raise UserError(f"{path.name} would have {size:,} bytes, more than the {most_bytes:,} that may be shipped")
