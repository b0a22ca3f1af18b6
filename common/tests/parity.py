"""Fixtures that hold our models to the authors' code.

A fixture records what the authors' network computed with weights that are a function of each tensor's name and
shape, on inputs that are a function of a probe's name; so a test can rebuild both, send the weights through
``load_official`` and compare. ``<name>.json`` describes, ``<name>.npz`` holds the expected arrays.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

RTOL = ATOL = 1e-4


def _normal(key: str, shape: Sequence[int]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape))


def probe(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 input that depends on its name and shape alone."""
    return torch.from_numpy(_normal("probe:" + name, shape).astype(np.float32).reshape(tuple(shape)))


def weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Value of the tensor called `name` in the authors' state dict. The last part of the name tells its kind."""
    tail, rank = name.rsplit(".", 1)[-1], len(shape)
    if tail == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    noise = _normal(name, shape)
    tables = ("relative_position", "rel_pos", "pos_embed", "position_embedding", "cls_token")
    if tail == "running_mean":
        value = 0.02 * noise
    elif tail == "running_var":
        value = 1 + 0.2 * np.abs(noise)
    elif "gamma" in tail or "layer_scale" in tail or tail in ("ls1", "ls2"):
        value = 0.2 + 0.05 * noise
    elif any(word in tail for word in tables) or tail.endswith(("_token", "bias")) or tail == "beta":
        value = 0.02 * noise
    elif rank < 2:  # scale of a norm, or a scalar
        value = 1 + 0.1 * noise
    else:
        value = noise / math.sqrt(max(1, math.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def check_stream() -> None:
    """Raises if this numpy draws other numbers than the fixtures were made with: then every comparison is noise."""
    drawn = 0.02 * _normal("selfcheck.weight", (2, 2)).ravel()
    if not np.allclose(drawn, [-0.00402199337, -0.0178006515, -0.0143371075, 0.0250640735], rtol=0, atol=1e-9):
        raise RuntimeError(f"numpy {np.__version__} draws another random stream than the fixtures were made with")


def names(folder: Path) -> list[str]:
    """Fixtures of whole models in a folder."""
    return sorted(p.name.removesuffix(".json") for p in folder.glob("*.json") if p.with_suffix("").name != "ops")


def load(folder: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(description, expected arrays) of a whole model."""
    return json.loads((folder / f"{name}.json").read_text()), _arrays(folder / f"{name}.npz")


def ops(folder: Path) -> dict[str, dict]:
    """Descriptions of the single operators and training steps in ``ops.json``, by name."""
    return {op["name"]: op for op in json.loads((folder / "ops.json").read_text())}


def op_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    return _arrays(folder / f"{name}.npz")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def state_dict(description: dict) -> dict[str, torch.Tensor]:
    """The authors' state dict a fixture was computed with."""
    aliases = description.get("aliases", {})
    return {name: weight(aliases.get(name, name), shape) for name, shape, *_ in description["tensors"]}


def inputs(description: dict) -> torch.Tensor:
    """The probe images of a whole-model fixture as one batch."""
    spec = description["input"]
    return torch.stack([probe(name, spec["probe_shape"]) for name in spec["probes"]])


def op_input(description: dict, key: str = "x") -> torch.Tensor:
    """An operator's input "x", or "gy", the gradient fed to its output."""
    name, shape = description[key]
    return probe(name, shape) * (description.get("x_scale", 1.0) if key == "x" else 1.0)


def summary(feature: torch.Tensor) -> np.ndarray:
    """Per sample: mean, population standard deviation, first 8 values, 8 evenly spread ones."""
    flat = feature.detach().double().contiguous().flatten(1)
    spread = torch.arange(8) * (flat.shape[1] - 1) // 7
    mean, std = flat.mean(1, keepdim=True), flat.std(1, correction=0, keepdim=True)
    return torch.cat([mean, std, flat[:, :8], flat[:, spread]], 1).numpy()


def assert_close(ours: torch.Tensor | np.ndarray, theirs: np.ndarray, what: str, atol: float = ATOL) -> None:
    """Equality to rtol 1e-4 and `atol`; the message gives the worst difference."""
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=atol, err_msg=what)
