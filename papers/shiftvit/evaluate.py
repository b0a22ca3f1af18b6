"""Top-1 and top-5 of a checkpoint: ``python -m papers.shiftvit.evaluate CHECKPOINT --recipe NAME --data FOLDER``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors' as published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro

from common import run
from common.data import images, loader, tiny
from common.metrics.classification import Accuracy
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
    model: torch.nn.Module, data: images.Images, recipe: Recipe, world: run.World, workers: int = 0, batch: int = 128
) -> dict[str, float]:
    """{'top1', 'top5'} in percent and 'loss' in nats over all of `data`, each image counted once over all ranks."""
    scores = Accuracy(world.device)
    samples = loader.Plain(data, images.eval_transform(recipe.input_size_px, recipe.eval_crop))
    batches = loader.eval_loader(samples, batch, rank=world.rank, world=world.size, workers=workers)
    model.eval()
    with torch.inference_mode():
        for pixels, labels, _ in loader.progress(batches, "evaluating", active=world.main):
            pixels = pixels.to(world.device, memory_format=torch.channels_last)
            with world.autocast():
                logits = model(pixels)
            scores.update(logits, labels.to(world.device))
    return scores.compute(expected=len(data))


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
    device: str = "auto"


def load(checkpoint: Path, recipe_name: str | None, classes: int) -> tuple[torch.nn.Module, Recipe]:
    """The model of a run folder or of a file of weights, in eval mode, and its recipe."""
    if (checkpoint / "config.json").is_file():
        recipe = Recipe(**json.loads((checkpoint / "config.json").read_text())["recipe"])
        found = run.load_checkpoint(checkpoint)
        if not found:
            raise run.UserError(f"{checkpoint} holds no whole checkpoint yet")
        weights = found[1]["model"]
    else:
        if recipe_name not in RECIPES:
            raise run.UserError(f"a file of weights needs --recipe, one of {', '.join(RECIPES)}; got {recipe_name!r}")
        recipe, weights = RECIPES[recipe_name], convert(run.load_weights(checkpoint))
    model = timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise run.UserError(f"{checkpoint} does not fit {recipe.model} with {classes} classes: {error}") from None
    return model.eval(), recipe


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.shiftvit.evaluate", description=__doc__)
    world = run.start_world(run.Options(device=args.device))
    recipe = RECIPES.get(args.recipe) or Recipe(about="", model="")
    if (args.checkpoint / "config.json").is_file():
        recipe = Recipe(**json.loads((args.checkpoint / "config.json").read_text())["recipe"])
    val = images.open_images(data_folder(recipe, args.data), "val")
    model, recipe = load(args.checkpoint, args.recipe, len(val.classes))
    scores = accuracy(model.to(world.device), val, recipe, world, args.workers)
    if world.main:
        rows = metrics(scores, recipe, comparable=recipe.paper_top1 is not None and len(val) == IMAGENET[1])
        for row in rows:
            paper = f"   paper {row['paper_value']} ({row['paper_source']})" if row["paper_value"] else ""
            print(f"{row['name']:>6} {row['value']:8.3f} {row['unit']}{paper}")
        print(f"{len(val)} images of {len(val.classes)} classes, {recipe.model}, {args.checkpoint}")
        if args.out:
            run.write_json(args.out, {"checkpoint": str(args.checkpoint), "images": len(val), "metrics": rows,
                                      **run.environment()})


if __name__ == "__main__":
    run.main(main)
