"""What a paper that classifies images tells, and the command line of its evaluate.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from common import run
from common.data import images
from common.data.text import printable
from common.metrics import evaluation
from common.metrics.classification.accuracy import UNITS, accuracy, data_folder, metrics
from common.metrics.classification.probe import probe
from common.metrics.classification.test_sets import Among, TestSet, open_test_set, synsets
from common.run import UserError, shipped

IMAGENET = (1_281_167, 50_000)  # training and validation images


@dataclass(frozen=True)
class Paper:
    """A paper that classifies images."""

    name: str
    recipes: Mapping[str, Any]
    build: Callable[[Any, int], torch.nn.Module]
    """(recipe, number of classes) -> model"""
    convert_weights: evaluation.ConvertWeights

    def comparable(self, name: str, recipe: Any, train: images.Images, val: images.Images) -> bool:
        """Whether a training's result may stand beside the paper's: its recipe untouched, on all of ImageNet-1K."""
        untouched = evaluation.is_untouched(name, recipe, self.recipes)
        return recipe.paper_top1 is not None and untouched and (len(train), len(val)) == IMAGENET

    def comparable_checkpoint(self, checkpoint: Path, model: torch.nn.Module, recipe: Any, val: images.Images) -> bool:
        """The same of an evaluation: of a run whose own results say so, or of the authors' file, on all of
        ImageNet-1K's validation images."""
        if checkpoint.is_dir():
            try:
                published = run.read_json(checkpoint / "results.json")["metrics"][0]["comparable"] is True
            except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
                published = False
        else:
            published = recipe.paper_top1 is not None and evaluation.is_authors_file(checkpoint, model)
        return published and len(val) == IMAGENET[1]

    def load_run(self, folder: Path) -> tuple[torch.nn.Module, Any, list[str]]:
        """A run's newest model in eval mode, its recipe, and the names of its classes."""
        recipe, weights, state = run.load_run(folder, type(next(iter(self.recipes.values()))))
        model = run.built(
            lambda: self.build(recipe, len(state["classes"])), weights["model"],
            f"{folder} does not hold what its config.json says",
        )
        return model, recipe, state["classes"]

    def start_from(self, init: str | None, model: torch.nn.Module) -> None:
        """Gives a model that is to be fine-tuned the weights of a run folder, a file, or shipped[:NAME]. Its classifier
        stays as it is where the classes are others; all else must fit, or it is a `UserError`. None: nothing."""
        if not init:
            return
        path = shipped.path_of(self.name, Path(init))
        if shipped.is_run(path):
            weights = run.load_run(path, type(next(iter(self.recipes.values()))))[1]["model"]
        else:
            weights = self.convert_weights(run.load_weights(path), model)
        own = model.state_dict()
        last = {id(tensor) for tensor in model.get_classifier().state_dict(keep_vars=True).values()}
        kept = {
            name: own[name] for name, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) in last and (name not in weights or weights[name].shape != tensor.shape)
        }
        run.fit(model, {**weights, **kept}, f"--init {init} does not fit this model")
        if not int(os.environ.get("RANK") or 0):
            print(f"starts from {path}" + (f"; at random stay {', '.join(kept)}" if kept else ""))

    def load_file(self, path: Path, recipe: Any, classes: int) -> torch.nn.Module:
        """The recipe's model in eval mode with the weights of a file, ours or the authors'."""
        model = self.build(recipe, classes)
        evaluation.load_file(path, model, self.convert_weights, f"{recipe.model} with {classes} classes")
        return model.eval()


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, file of weights (.safetensors, .pth), or shipped[:NAME]."""
    recipe: str | None = None
    """Recipe that names the model and the evaluation; a run folder and shipped weights know their own."""
    data: Path | None = None
    """Data folder with a validation split."""
    test_set: TestSet | None = None
    """--data is this other test set for ImageNet-1K's classes, as it is published."""
    probe: bool = False
    """Score a linear classifier fitted to the network's features of --data's training images, whose classes may be any;
    beside it, one on the features of the network before any training."""
    out: Path | None = None
    """JSON file to write the scores to."""
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(paper: Paper) -> None:
    """The command line of ``papers.<name>.evaluate``."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.evaluate", description="Scores of a checkpoint.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    args.checkpoint = shipped.path_of(paper.name, args.checkpoint)
    model, recipe, val = opened(paper, args)
    model.to(world.device, memory_format=torch.channels_last)  # as it was trained
    if args.probe:
        train = images.open_images(data_folder(recipe, args.data), "train")
        run.seed_all(0)
        untrained = paper.build(recipe, len(train.classes)).to(world.device, memory_format=torch.channels_last)
        networks = {"probe_top1": model, "untrained_probe_top1": untrained}
        val = images.same_classes(train.classes, val)
        scores = probe(networks, train, val, recipe, world, workers=args.workers)
    else:
        scores = accuracy(model, val, recipe, world, workers=args.workers)
    if world.is_main:
        if args.probe or args.test_set:  # the paper says nothing of these
            rows = [run.metric(key, value, UNITS.get(key, "%")) for key, value in scores.items()]
        else:
            rows = metrics(scores, recipe, paper.comparable_checkpoint(args.checkpoint, model, recipe, val))
        evaluation.print_rows(rows)
        what = f", a linear classifier on its features of {len(train)} training images" if args.probe else ""
        print(f"{len(val)} images of {len(val.classes)} classes, {recipe.model}, {args.checkpoint}{what}")
        if args.out:
            about = {"checkpoint": str(args.checkpoint), "images": len(val), "metrics": rows}
            run.write_json(args.out, about | run.environment())


def opened(paper: Paper, args: Arguments) -> tuple[torch.nn.Module, Any, images.Images]:
    """The network, its recipe, and the images to score it on."""
    if args.probe and args.test_set:
        raise UserError("--probe and --test-set exclude one another")
    if args.checkpoint.is_dir() or (not args.recipe and shipped.is_run(args.checkpoint)):
        model, recipe, classes = paper.load_run(args.checkpoint)
    else:
        if args.recipe not in paper.recipes:
            known = ", ".join(paper.recipes)
            raise UserError(f"a file of weights needs --recipe, one of {known}; got {args.recipe!r}")
        model, recipe, classes = None, paper.recipes[args.recipe], None
    if args.test_set:
        val = open_test_set(args.test_set, args.data)
        if classes and classes != synsets():
            raise UserError(f"{args.test_set} tests networks of ImageNet-1K's classes; {args.checkpoint} has others")
    else:
        val = images.open_images(data_folder(recipe, args.data), "val")
        if classes and not args.probe:
            val = of_classes(args.checkpoint, classes, val)
    if model is None:
        model = paper.load_file(args.checkpoint, recipe, 1000 if args.test_set else len(val.classes))
    return (Among(model, args.test_set).eval() if args.test_set else model), recipe, val


def of_classes(checkpoint: Path, trained: Sequence[str], val: images.Images) -> images.Images:
    """`val` numbered by the classes of a run, some of which it may lack: then that is said. `UserError` names classes
    that the run has not learned."""
    missing, unknown = sorted({*trained} - {*val.classes}), sorted({*val.classes} - {*trained})
    if unknown:
        raise UserError(
            f"{checkpoint} was trained on the classes of another folder ({len(trained)} there, {len(val.classes)} "
            f"here): the data lack {_some(missing)}, and have besides {_some(unknown)}; give that folder with --data"
        )
    if missing:
        print(f"the data lack {_some(missing)}, of the {len(trained)} classes of the run", file=sys.stderr)
    return images.same_classes(trained, val, subset=True)


def _some(names: Sequence[str]) -> str:
    return (", ".join(map(printable, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
