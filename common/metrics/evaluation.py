"""What the command lines that evaluate share: weights of others, what may be called comparable, figures in print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import run
from common.data.text import printable

ConvertWeights = Callable[[Mapping[str, torch.Tensor], torch.nn.Module], Mapping[str, torch.Tensor]]
"""(state dict of a file, ours or the authors', and the network) -> state dict of the network"""


def load_file(path: Path, network: torch.nn.Module, convert_weights: ConvertWeights, what: str) -> None:
    """Loads a file of weights, ours or the authors', into a network; `UserError` if it does not fit `what`."""
    run.fit(network, convert_weights(run.load_weights(path), network), f"{path} does not fit {what}")


def is_authors_file(path: Path, network: torch.nn.Module) -> bool:
    """Whether a file of weights that fits a network is as the authors publish theirs: under other names than ours.

    Of files, these alone may be called comparable: one of ours does not say what it was trained on.
    """
    return run.load_weights(path).keys() != network.state_dict().keys()


def is_untouched(name: str | None, recipe: Any, recipes: Mapping[str, Any]) -> bool:
    """Whether a recipe is as it stands in `recipes` under that name; one read from JSON has lists for tuples."""
    return name in recipes and _plain(recipe) == _plain(recipes[name])


def _plain(recipe: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints metrics, with the paper's figures where there are any."""
    names = [printable(row["name"]) for row in rows]  # of sequences, too
    width = max(map(len, names))
    for name, row in zip(names, rows):
        published = f"   the paper: {row['paper_value']}" if row["paper_value"] is not None else ""
        note = "" if row["comparable"] or not published else " (not comparable)"
        print(f"{name:>{width}} {row['value']:8.2f} {row['unit']}{published}{note}")
