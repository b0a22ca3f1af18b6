"""A tracker of template and search image as two ONNX graphs: a paper's ``export.py`` is
``run.main(lambda: export.main(PAPER))``.

::

    template.onnx    template (1, 3, T, T) uint8 RGB -> z           once a sequence
    search.onnx      z, search (1, 3, S, S) uint8 RGB -> score (1, N), box (1, N, 4)      every frame
    tracker.json     how crops are cut (T, S and their sides in those of the target), the window's share

Boxes are cx, cy, w, h as fractions of the search crop; which token counts, and all else about a frame, is the tracker's
(papers/*/tracker.py). Both graphs are held to PyTorch before they are kept, and timed on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import run
from common.data import crops
from common.metrics.trackers.paper import Paper
from common.run import UserError

TOLERANCE = 1e-3
"""Between a score or a fraction of the crop here and there, at most."""


class Template(nn.Module):
    """(1, 3, T, T) uint8 -> what a sequence needs of its template."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, template: torch.Tensor) -> torch.Tensor:
        return self.network.encode(crops.normalize(template))


class Search(nn.Module):
    """That, and (1, 3, S, S) uint8 -> scores (1, N), boxes (1, N, 4)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: torch.Tensor, search: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, boxes = self.network.predict(z, crops.normalize(search))
        return logits.softmax(-1)[..., 0], boxes


def export(network: nn.Module, recipe: object, folder: Path) -> dict[str, dict[str, float]]:
    """Writes the two graphs of a network in eval mode that has `encode` and `predict`, and checks them.

    Returns for "template" and "search" {"difference": largest, "torch_ms", "onnx_ms": median of one thread}.
    `UserError` where a package is missing or a graph computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"an export needs two more packages ({error}): pip install onnxruntime onnxscript") from None
    folder.mkdir(parents=True, exist_ok=True)
    template, search = (_pixels(side) for side in (recipe.template_px, recipe.search_px))
    with torch.no_grad():
        z = network.encode(crops.normalize(template))
    parts = {
        "template": (Template(network), {"template": template}, ["z"]),
        "search": (Search(network), {"z": z, "search": search}, ["score", "box"]),
    }
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, found = 1, {}
    for name, (module, inputs, outputs) in parts.items():
        path = folder / f"{name}.onnx"
        with sdpa_kernel(SDPBackend.MATH):  # others lay their result out in memory in another way than their ONNX form
            program = torch.onnx.export(
                module.eval(), tuple(inputs.values()), dynamo=True, verbose=False, external_data=False,
                input_names=list(inputs), output_names=outputs,
            )
        with run.written_whole(path) as part:
            program.save(part)
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        given = {key: value.numpy() for key, value in inputs.items()}
        with torch.no_grad():
            wanted = module(*inputs.values())
        wanted = [wanted] if torch.is_tensor(wanted) else list(wanted)
        got = session.run(outputs, given)
        off = max(float(np.abs(a.numpy() - b).max()) for a, b in zip(wanted, got))
        scale = max(1.0, max(float(a.abs().max()) for a in wanted))
        if not off <= TOLERANCE * scale:
            path.unlink()
            raise UserError(f"{name}.onnx is {off:.2g} off what PyTorch computes, and not kept")
        found[name] = {
            "difference": off, "torch_ms": _median_ms(torch.no_grad()(module), *inputs.values()),
            "onnx_ms": _median_ms(session.run, outputs, given),
        }
    keys = ("template_px", "search_px", "template_factor", "search_factor", "window")
    run.write_json(folder / "tracker.json", {key: getattr(recipe, key) for key in keys} | {"graphs": found})
    return found


def _pixels(side: int) -> torch.Tensor:
    return torch.randint(256, (1, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _median_ms(call: Callable, *arguments: object, times: int = 9) -> float:
    call(*arguments)
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call(*arguments)
        seconds.append(time.perf_counter() - began)
    return 1000 * float(np.median(seconds))


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, file of weights, or shipped[:NAME]."""
    recipe: str | None = None
    """Recipe of a file of weights."""
    out: Path = Path("onnx")
    """Folder of the graphs."""


def main(paper: Paper) -> None:
    """The command line of ``papers.<name>.export``."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.export", description="A tracker as ONNX graphs.")
    world = run.start_world(run.Options(device="cpu"))
    loaded = paper.load(args.checkpoint, args.recipe, world)
    for name, its in export(loaded.tracker.model, loaded.recipe, args.out).items():
        print(
            f"{args.out / name}.onnx: at most {its['difference']:.1g} off PyTorch; one thread: PyTorch "
            f"{its['torch_ms']:.1f} ms, onnxruntime {its['onnx_ms']:.1f} ms"
        )
