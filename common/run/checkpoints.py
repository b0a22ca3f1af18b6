"""Weights and checkpoints, in and out. Tensors are safetensors, the rest is JSON: nothing is ever unpickled."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from common.run import recorded, shipped
from common.run.files import UserError, read_json, write_json, written_whole
from common.run.options import Options
from common.run.world import gather_objects

Recipe = TypeVar("Recipe")
Network = TypeVar("Network", bound=torch.nn.Module)


def save_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a state dict as safetensors, whole or not at all; tensors that share memory are stored one by one."""
    with written_whole(path) as part:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, part)


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a state dict from safetensors, or from a torch file without ever unpickling code.

    A training checkpoint's ``model`` (or ``state_dict``) entry is taken, and a DDP ``module.`` prefix removed.
    Raises `UserError` for a file that is missing, truncated, no checkpoint, or would need to run code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        start = file.read(64)
    for mark, what in ((b"version https://git-lfs", "a pointer of Git LFS; git lfs pull brings the file"),
                       (b"<", "a web page: the download failed")):
        if start.lstrip().startswith(mark):
            raise UserError(f"{path} is no checkpoint but {what}")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            # DeiT's trainer, and many after it, saved its arguments too; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"reading it could run {found[1]}" if found else "it is no file of tensors"
        raise UserError(f"{path} is refused: {what}") from None
    except Exception as error:  # damaged files raise whatever torch's readers stumble on
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(f"{path} is truncated or not a checkpoint: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{path} holds no state dict: expected names mapped to tensors")
    return {k.removeprefix("module."): v for k, v in weights.items()}


def save_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], keep: int = 2
) -> None:
    """Writes ``checkpoints/step_NNNNNNNN`` whole or not at all, then removes all but the `keep` newest.

    `weights` are named state dicts, one safetensors file each; `state` is any nesting of dicts, lists, tensors
    and JSON scalars, such as an optimizer's ``state_dict()``.
    """
    home = folder / "checkpoints" / f"step_{step:08d}"
    part = home.with_name(f".{home.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in weights.items():
        save_weights(part / f"{name}.safetensors", tensors)
    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(dict(state), tensors, "")
    save_weights(part / "state.safetensors", tensors)
    write_json(part / "state.json", packed)
    if home.exists():  # left by the interrupted run that this one resumed
        shutil.rmtree(home)
    os.replace(part, home)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)


def steps(folder: Path) -> list[Path]:
    """A run's checkpoints, the oldest first. Whatever else lies beside them, such as somebody's copy, is not ours."""
    home = folder / "checkpoints"
    found = home.iterdir() if home.is_dir() else ()
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name) and p.is_dir() and not p.is_symlink())


def load_checkpoint(folder: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """(step, weights, state) of a run's newest whole checkpoint, or None; a damaged one is named and passed over."""
    for home in reversed(steps(folder)):
        try:
            files = {p.stem: load_weights(p) for p in home.glob("*.safetensors")}
            state = _unpack(read_json(home / "state.json"), files.pop("state"))
            if not files or not isinstance(state, dict):
                raise ValueError("no weights or no state in it")
            float(state.get("wall_s", 0.0))
        except (UserError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            print(f"passing over {home}: {error}", file=sys.stderr)
            continue
        return int(home.name.removeprefix("step_")), files, state
    return None


def restore(
    folder: Path, options: Options, optimizer: torch.optim.Optimizer | None = None, *,
    classes: Sequence[str] = (), **modules: torch.nn.Module | None,
) -> tuple[int, dict[str, Any]]:
    """(step, state) of the checkpoint a resumed run goes on from, loaded into `modules` and `optimizer`; (0, {}) for a
    run that starts. Of a module that is None nothing is asked. `UserError` if the run has learned other `classes`."""
    found = load_checkpoint(folder) if options.resume else None
    steps = gather_objects([found[0] if found else 0])
    if len(set(steps)) > 1:
        raise UserError(f"the processes see other checkpoints in {folder}, of the steps {steps}: is it the same disk?")
    if not found:
        return 0, {}
    step, weights, state = found
    learned = state.get("classes", [])
    learned = learned if isinstance(learned, list) else []
    if classes and learned != list(classes):
        lacking, new = (
            [repr(name) for name in ours if name not in theirs][:5]
            for ours, theirs in ((learned, classes), (classes, learned))
        )
        differ = f"it learned {', '.join(lacking) or 'no other'}, the data have {', '.join(new) or 'none besides'}"
        raise UserError(
            f"cannot resume {folder} with the classes of these data: {differ if lacking or new else 'another order'}; "
            "give the folder it was started with as --data"
        )
    try:
        for name, module in modules.items():
            if module is not None:
                module.load_state_dict(weights[name])
        if optimizer:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        raise UserError(f"the checkpoint of step {step} in {folder} does not fit this recipe: {reason}") from None
    return step, state


def load_run(
    checkpoint: Path, recipe_type: type[Recipe]
) -> tuple[Recipe, dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(recipe, weights, state) of a run folder's newest whole checkpoint, or of a file as they are shipped;
    state["classes"] are names, or none."""
    try:
        if checkpoint.is_file():
            said = shipped.header(checkpoint)
            if said is None:
                raise UserError(f"{checkpoint} does not say what network it holds; give --recipe")
            fields, weights, state = said["recipe"], {"model": load_weights(checkpoint)}, {"classes": said["classes"]}
        else:
            found = load_checkpoint(checkpoint) if (checkpoint / "config.json").is_file() else None
            if not found:
                raise UserError(f"{checkpoint} is no run folder with a whole checkpoint")
            fields, (_, weights, state) = read_json(checkpoint / "config.json")["recipe"], found
        shown = [len(weights["model"]), *(side for tensor in weights["model"].values() for side in tensor.shape)]
        recipe = recorded.recipe(recipe_type, fields, largest=max(recorded.LARGEST, *shown))
        if not all(isinstance(name, str) for name in state.setdefault("classes", [])):
            raise ValueError("the names of its classes are no texts")
        return recipe, weights, state
    except (OSError, ValueError, KeyError, TypeError) as error:
        part = "header" if checkpoint.is_file() else "config.json"
        raise UserError(
            f"{checkpoint} is no run of this version: its {part} does not fit ({error}); use the revision it was made "
            "with"
        ) from None


def fit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Loads a state dict strictly; one that does not fit is a `UserError` that begins with `what` and names the first
    differences."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:600]}") from None


def built(build: Callable[[], Network], weights: Mapping[str, torch.Tensor], what: str) -> Network:
    """The network that `build` makes, with these weights, in eval mode. If they are not those of its tensors, by name
    and shape, it is a `UserError` that begins with `what`, and no memory was taken for them."""
    with torch.device("meta"):
        network = build()
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differ = [
        f"{name} {list(found[name]) if name in found else 'missing'}, "
        f"expected {list(expected[name]) if name in expected else 'nothing of that name'}"
        for name in {**expected, **found} if found.get(name) != expected.get(name)
    ]
    if differ:
        raise UserError(f"{what}: {'; '.join(differ[:5])}" + (f" and {len(differ) - 5} more" if differ[5:] else ""))
    network = build()
    network.load_state_dict(weights)
    return network.eval()


def _pack(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """JSON skeleton of a nested state; tensors go to `tensors` and leave their name behind."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[k, _pack(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
    return value


def _unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "list":
        return [_unpack(v, tensors) for v in value]
    return {k: _unpack(v, tensors) for k, v in value}
