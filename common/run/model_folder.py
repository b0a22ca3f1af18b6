"""Model folders as transformers has them, out and in. One that is read may be a stranger's: of what its config.json
names only what transformers and timm hold themselves is made; nothing is fetched, no code of it is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from common.run.files import UserError, open_as_umask, read_json

Recipe = TypeVar("Recipe")


def save(folder: Path, *parts: Any) -> None:
    """Writes a model and what belongs to it with their ``save_pretrained``."""
    for part in parts:
        part.save_pretrained(folder)
    for file in filter(Path.is_file, folder.iterdir()):
        open_as_umask(file)


def model_folder(folder: Path) -> Path:
    """The folder itself, or a run folder's ``model``; `UserError` if there is no model in it."""
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no model: expected config.json and *.safetensors of save_pretrained")
    return folder


def recipe_of(checkpoint: Path, name: str | None, recipes: Mapping[str, Recipe]) -> Recipe:
    """The named recipe; without a name that of a run folder."""
    path = checkpoint / "config.json"
    if name is None and path.is_file():
        try:
            if "recipe" in (found := read_json(path)):
                return type(next(iter(recipes.values())))(**found["recipe"])
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version ({error}): name the recipe, --recipe") from None
    if name not in recipes:
        raise UserError(f"a model folder needs --recipe, one of {', '.join(recipes)}; got {name!r}")
    return recipes[name]


def load(kind: Any, folder: Path | str, hint: str = "", **options: Any) -> Any:
    """``kind.from_pretrained`` of a folder, or of a name on the hub; `UserError`, which ends in `hint`, if that fails.
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever transformers' readers stumble on
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        reason = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
        raise UserError(f"cannot load {folder}: {reason}{hint}") from None


def checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config; `UserError` if it is timm's, and would have a network or weights fetched or read from elsewhere."""
    if config.model_type == "timm_wrapper":
        if not re.fullmatch(r"[\w.]+", config.architecture):
            raise UserError(f"config.json names the architecture {config.architecture!r}; expected one of timm's own")
        if names := [key for key in config.model_args or {} if key.startswith(("pretrained", "checkpoint", "cache"))]:
            raise UserError(f"config.json has {', '.join(names)} in model_args: weights come from the folder alone")
    return config
