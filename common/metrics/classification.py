"""Image classification, measured: accuracy exact over any number of processes, of a model, a run or a file of weights.

A paper's ``evaluate.py`` describes itself by a `Paper` and hands it to `main`, its ``demo.py`` to `demo`. A recipe here
is any object with the fields ``model, dataset, input_size_px, eval_crop, paper_top1, paper_source``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image

from common import run
from common.data import images, loader
from common.data.tiny.digits import digits
from common.run import UserError, World

IMAGENET = (1_281_167, 50_000)  # training and validation images
UNITS = {"loss": "nats", "gap": "points"}  # of scores; all others are percentages


class Accuracy:
    """Sums over the samples each rank has seen; `compute` adds the ranks up and divides once."""

    def __init__(self, device: torch.device | str = "cpu"):
        # float64 counts integers exactly up to 2**53
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """logits (N, classes), target (N) class indices."""
        logits = logits.float()
        right = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        right &= logits.isfinite().all(1, keepdim=True)  # topk ranks NaN first
        loss = F.cross_entropy(logits, target, reduction="sum")
        self.sums += torch.stack([right[:, 0].sum(), right.sum(), loss, loss.new_tensor(len(target))]).double()

    def compute(self, expected: int) -> dict[str, float]:
        """{'top1', 'top5'} in percent, 'loss' in nats. Raises if not exactly `expected` samples were seen."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        top1, top5, loss, seen = sums.tolist()
        if seen != expected:
            raise RuntimeError(f"accuracy over {seen:.0f} samples, but the data hold {expected}")
        return {"top1": 100 * top1 / seen, "top5": 100 * top5 / seen, "loss": loss / seen}


def accuracy(
    model: torch.nn.Module, data: images.Images, recipe: Any, world: World, *, workers: int = 0, batch: int = 128
) -> dict[str, float]:
    """Scores (see `Accuracy.compute`) over all of `data`, prepared as the recipe says, each image once."""
    scores = Accuracy(world.device)
    samples = loader.Plain(data, images.eval_transform(recipe.input_size_px, recipe.eval_crop))
    batches = loader.eval_loader(samples, batch, rank=world.rank, world=world.size, workers=workers)
    model.eval()
    with torch.inference_mode():
        for pixels, labels, _ in loader.progress(batches, "evaluating", active=world.is_main):
            pixels = pixels.to(world.device, memory_format=torch.channels_last)
            with world.autocast():
                logits = model(pixels)
            scores.update(logits, labels.to(world.device))
    return scores.compute(expected=len(data))


def data_folder(recipe: Any, data: Path | None) -> Path:
    """Where a recipe's data are: as given, or the built-in digits for a recipe meant for them."""
    if data:
        return data
    if recipe.dataset == "digits":
        return digits()
    raise UserError(f"this recipe is meant for {recipe.dataset}: give its folder with --data")


def describe(recipe: Any, folder: Path | None, train: images.Images, val: images.Images) -> str:
    """What a result was measured on; data given in place of the built-in digits go by their folder's name."""
    name = folder.resolve().name if folder and recipe.dataset == "digits" else recipe.dataset
    return f"{name}: {len(train):,} training, {len(val):,} validation images"


def metrics(scores: Mapping[str, float], recipe: Any, comparable: bool) -> list[dict[str, Any]]:
    """Rows of results.json; the first score is the one the paper reports."""
    rows = [run.metric(key, value, UNITS.get(key, "%")) for key, value in scores.items()]
    rows[0] |= {"paper_value": recipe.paper_top1, "paper_source": recipe.paper_source, "comparable": comparable}
    return rows


@dataclass(frozen=True)
class Paper:
    """A paper that classifies images."""

    name: str
    recipes: Mapping[str, Any]
    build: Callable[[Any, int], torch.nn.Module]
    """(recipe, number of classes) -> model"""
    convert: Callable[[Mapping[str, torch.Tensor], torch.nn.Module], Mapping[str, torch.Tensor]]
    """(state dict of a file, ours or the authors', and the model) -> state dict of the model"""

    def comparable(self, name: str, recipe: Any, train: images.Images, val: images.Images) -> bool:
        """Whether a training's result may stand beside the paper's: its recipe untouched, on all of ImageNet-1K."""
        return recipe.paper_top1 is not None and recipe == self.recipes.get(name) and (len(train), len(val)) == IMAGENET

    def load_run(self, folder: Path) -> tuple[torch.nn.Module, Any, list[str]]:
        """A run's newest model in eval mode, its recipe, and the names of its classes."""
        found = run.load_checkpoint(folder) if (folder / "config.json").is_file() else None
        if not found:
            raise UserError(f"{folder} is no run folder with a whole checkpoint")
        _, weights, state = found
        kind = type(next(iter(self.recipes.values())))
        recipe = kind(**json.loads((folder / "config.json").read_text())["recipe"])
        model = self.build(recipe, len(state["classes"]))
        model.load_state_dict(weights["model"])
        return model.eval(), recipe, state["classes"]

    def load_file(self, path: Path, recipe: Any, classes: int) -> torch.nn.Module:
        """The recipe's model in eval mode with the weights of a file, ours or the authors'."""
        model = self.build(recipe, classes)
        try:
            model.load_state_dict(self.convert(run.load_weights(path), model))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} does not fit {recipe.model} with {classes} classes: {reason}") from None
        return model.eval()


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, or file of weights (.safetensors, .pth)."""
    recipe: str | None = None
    """Recipe that names the model and the evaluation; a run folder knows its own."""
    data: Path | None = None
    """Data folder with a validation split."""
    out: Path | None = None
    """JSON file to write the scores to."""
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(paper: Paper) -> None:
    """The command line of ``papers.<name>.evaluate``."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.evaluate", description="Scores of a checkpoint.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    if not args.checkpoint.exists():
        raise UserError(f"no checkpoint at {args.checkpoint}")
    if args.checkpoint.is_dir():
        model, recipe, classes = paper.load_run(args.checkpoint)
        val = images.open_images(data_folder(recipe, args.data), "val")
        if val.classes != classes:
            raise UserError(f"{args.checkpoint} was trained on the classes {classes}, the data hold {val.classes}")
    else:
        if args.recipe not in paper.recipes:
            known = ", ".join(paper.recipes)
            raise UserError(f"a file of weights needs --recipe, one of {known}; got {args.recipe!r}")
        recipe = paper.recipes[args.recipe]
        val = images.open_images(data_folder(recipe, args.data), "val")
        model = paper.load_file(args.checkpoint, recipe, len(val.classes))
    model.to(world.device, memory_format=torch.channels_last)  # as it was trained
    scores = accuracy(model, val, recipe, world, workers=args.workers)
    if world.is_main:
        rows = metrics(scores, recipe, comparable=recipe.paper_top1 is not None and len(val) == IMAGENET[1])
        for row in rows:
            paper_value = f"   the paper: {row['paper_value']}" if row["paper_value"] else ""
            note = "" if row["comparable"] or not paper_value else " (not comparable: other data)"
            print(f"{row['name']:>6} {row['value']:8.3f} {row['unit']}{paper_value}{note}")
        print(f"{len(val)} images of {len(val.classes)} classes, {recipe.model}, {args.checkpoint}")
        if args.out:
            about = {"checkpoint": str(args.checkpoint), "images": len(val), "metrics": rows}
            run.write_json(args.out, about | run.environment())


@dataclass
class DemoArguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    """An image file; without one, a digit of the built-in set."""
    checkpoint: Path | None = None
    """Run folder; without one, the paper's newest finished run under runs/."""
    out: Path = Path("answer.png")


def demo(paper: Paper) -> None:
    """The command line of ``papers.<name>.demo``: prints and draws a picture's most likely classes."""
    from common.run import drawing

    args = tyro.cli(DemoArguments, prog=f"python -m papers.{paper.name}.demo", description="A picture, classified.")
    results = sorted(Path("runs", paper.name).glob("*/*/results.json"), key=lambda p: p.stat().st_mtime)
    finished = [p.parent for p in results if (p.parent / "checkpoints").is_dir()]  # comparisons have none of their own
    if not (args.checkpoint or finished):
        command = f"make reproduce PAPER={paper.name}"
        raise UserError(f"no finished run under runs/{paper.name}; make one with {command}, or give --checkpoint")
    checkpoint = args.checkpoint or finished[-1]
    picture = args.picture or min((digits() / "val" / "7").iterdir())
    try:
        image = Image.open(picture).convert("RGB")
    except OSError as error:
        raise UserError(f"{picture} is no picture: {error}") from None

    model, recipe, classes = paper.load_run(checkpoint)
    with torch.inference_mode():
        pixels = images.eval_transform(recipe.input_size_px, recipe.eval_crop)(image)
        chances, guesses = model(pixels[None])[0].softmax(0).topk(min(5, len(classes)))
    answer = {classes[guess]: chance for guess, chance in zip(guesses.tolist(), chances.tolist())}
    for name, chance in answer.items():
        print(f"{chance:7.2%}  {name}")
    drawing.answer(args.out, image, answer)
    print(f"{args.out} written; {recipe.model} from {checkpoint}")
