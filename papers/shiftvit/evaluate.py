"""Top-1 and top-5 of a checkpoint: ``python -m papers.shiftvit.evaluate CHECKPOINT --recipe NAME --data FOLDER``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors' as published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import tyro

from common import run
from common.data import images, tiny
from common.metrics import classification
from papers.shiftvit.official import convert
from papers.shiftvit.recipes import RECIPES, Recipe

IMAGENET = (1_281_167, 50_000)  # training and validation images


def data_folder(recipe: Recipe, data: Path | None) -> Path:
    """Where the recipe's data are: as given, or the built-in digits for a recipe meant for them."""
    if data:
        return data
    if recipe.dataset == "digits":
        return tiny.digits()
    raise run.UserError(f"this recipe is meant for {recipe.dataset}: give its folder with --data")


def accuracy(
    model: torch.nn.Module, val: images.Images, recipe: Recipe, world: run.World, workers: int = 0
) -> dict[str, float]:
    """{'top1', 'top5'} in percent and 'loss' in nats over all of `val`, prepared as the recipe says."""
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    return classification.accuracy(model, val, transform, world, workers=workers)


def is_papers(name: str, recipe: Recipe, train: images.Images, val: images.Images) -> bool:
    """Whether a result may stand beside the paper's: its recipe untouched, on all of ImageNet-1K."""
    return recipe.paper_top1 is not None and recipe == RECIPES.get(name) and (len(train), len(val)) == IMAGENET


def metrics(scores: dict[str, float], recipe: Recipe, comparable: bool) -> list[dict[str, Any]]:
    """Rows of results.json."""
    units = {"loss": "nats"}
    rows = [run.metric(key, value, units.get(key, "%"), comparable=False) for key, value in scores.items()]
    rows[0] |= {"paper_value": recipe.paper_top1, "paper_source": recipe.paper_source, "comparable": comparable}
    return rows


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


def load_run(folder: Path) -> tuple[torch.nn.Module, Recipe, list[str]]:
    """A run's newest model in eval mode, its recipe, and the names of its classes."""
    found = run.load_checkpoint(folder) if (folder / "config.json").is_file() else None
    if not found:
        raise run.UserError(f"{folder} is no run folder with a whole checkpoint")
    _, weights, state = found
    recipe = Recipe(**json.loads((folder / "config.json").read_text())["recipe"])
    model = timm.create_model(recipe.model, num_classes=len(state["classes"]), **recipe.model_args)
    model.load_state_dict(weights["model"])
    return model.eval(), recipe, state["classes"]


def load_file(path: Path, recipe: Recipe, classes: int) -> torch.nn.Module:
    """The recipe's model with the weights of a file, ours or the authors'."""
    model = timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)
    try:
        model.load_state_dict(convert(run.load_weights(path)))
    except RuntimeError as error:
        raise run.UserError(f"{path} does not fit {recipe.model} with {classes} classes: {error}") from None
    return model.eval()


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.shiftvit.evaluate", description=__doc__)
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    if args.checkpoint.is_dir():
        model, recipe, classes = load_run(args.checkpoint)
        val = images.open_images(data_folder(recipe, args.data), "val")
        if val.classes != classes:
            raise run.UserError(f"{args.checkpoint} was trained on the classes {classes}, the data hold {val.classes}")
    else:
        if args.recipe not in RECIPES:
            raise run.UserError(f"a file of weights needs --recipe, one of {', '.join(RECIPES)}; got {args.recipe!r}")
        recipe = RECIPES[args.recipe]
        val = images.open_images(data_folder(recipe, args.data), "val")
        model = load_file(args.checkpoint, recipe, len(val.classes))
    scores = accuracy(model.to(world.device), val, recipe, world, args.workers)
    if world.main:
        rows = metrics(scores, recipe, comparable=recipe.paper_top1 is not None and len(val) == IMAGENET[1])
        for row in rows:
            paper = f"   the paper: {row['paper_value']}" if row["paper_value"] else ""
            note = "" if row["comparable"] or not paper else " (not comparable: other data)"
            print(f"{row['name']:>6} {row['value']:8.3f} {row['unit']}{paper}{note}")
        print(f"{len(val)} images of {len(val.classes)} classes, {recipe.model}, {args.checkpoint}")
        if args.out:
            about = {"checkpoint": str(args.checkpoint), "images": len(val), "metrics": rows}
            run.write_json(args.out, about | run.environment())


if __name__ == "__main__":
    run.main(main)
