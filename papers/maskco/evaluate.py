"""What a checkpoint can do: ``python -m papers.maskco.evaluate CHECKPOINT [--task probe] --data FOLDER``.

CHECKPOINT is a run folder, or a file with a backbone.

    trained   what it was trained for: to find its region (or view) among others, in pictures not seen; or classes
    probe     what its backbone is worth as it stands: a linear classifier on its features
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import Dataset

from common import run
from common.data import images, loader
from common.data.tiny.digits import digits
from common.metrics import classification
from common.run import UserError, World, shipped
from papers.maskco import data
from papers.maskco.export import load_backbone
from papers.maskco.model import LinearProbe, MaskCo, MoCoV2, build_backbone
from papers.maskco.recipes import BUILT_IN, RECIPES, Recipe

UNITS = {"contrast_loss": "nats", "loss": "nats"}


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The network of a recipe's method; only a linear classifier has the data's classes."""
    if recipe.method == "linear":
        return LinearProbe(recipe.backbone, recipe.output_stride, classes)
    shared = dict(
        output_stride=recipe.output_stride, features=recipe.features, queue=recipe.queue, momentum=recipe.momentum,
        temperature=recipe.temperature,
    )
    if recipe.method == "moco_v2":
        return MoCoV2(recipe.backbone, **shared)
    return MaskCo(
        recipe.backbone, mph=recipe.mph, mph_width=recipe.mph_width, mph_depth=recipe.mph_depth,
        mph_on_key=recipe.mph_on_key, roi_cells=recipe.roi_cells, roi_samples=recipe.roi_samples, mask=recipe.mask,
        **shared,
    )


def region_boxes(B: int, N: int, J: int, S: int) -> tuple[torch.Tensor, ...]:
    """Boxes of N regions in both views of S pixels and of J negatives, and which of these are present."""
    box = torch.tensor([S // 4, S // 4, S // 2, S // 2]).float().expand(B, N, 4)
    return box, box, box[:, :, None].expand(B, N, J, 4), torch.ones(B, N, J, dtype=torch.bool)


def inputs(recipe: Recipe) -> tuple[torch.Tensor, ...]:
    """Arguments of a recipe's network for one sample."""
    view = torch.zeros(1, 3, recipe.input_size_px, recipe.input_size_px)
    if recipe.method == "linear":
        return (view,)
    if recipe.method == "moco_v2":
        return view, view
    boxes = region_boxes(1, recipe.regions, recipe.same_image_negatives, recipe.input_size_px)
    return view, view, *boxes, *([view] if recipe.mask == "noise" else [])


def data_folder(recipe: Recipe, folder: Path | None) -> Path:
    """Where a recipe's data are: as given, or the built-in digits for a recipe meant for them."""
    return run.data_folder(recipe, folder, {"digits": digits})


def describe(recipe: Recipe, folder: Path | None, train: images.Images, val: images.Images) -> str:
    """What a result is measured on; data given where the recipe names no set of its own go by their folder's name."""
    name = folder.resolve().name if folder and recipe.dataset in ("digits", "pictures") else recipe.dataset
    judged = f", probed on {Path(recipe.probe).name}" if recipe.probe else ""
    return f"{name}: {len(train):,} training, {len(val):,} validation pictures{judged}"


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Scheduler:
    """timm's, to be asked with the number of steps taken so far."""
    if not recipe.milestones:
        return CosineLRScheduler(optimizer, t_initial=recipe.epochs * steps_per_epoch, t_in_epochs=False)
    decays = [epoch * steps_per_epoch + 1 for epoch in recipe.milestones]  # timm's begin one step before `decay_t`
    return MultiStepLRScheduler(optimizer, decay_t=decays, decay_rate=0.1, t_in_epochs=False)


# Scores ---------------------------------------------------------------------------------------------------


class Seeded(Dataset):
    """Views of each picture, always the same ones."""

    def __init__(self, pictures: images.Images, views: data.Views):
        self.pictures, self.views, self.name = pictures, views, pictures.name

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        picture, label = self.pictures[index]
        torch.default_generator.manual_seed(index)
        return self.views(picture), label


def to(device: torch.device, sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on the device, as the network's arguments."""
    return {key: value.to(device, non_blocking=True) for key, value in sample.items() if key != "fallback"}


def contrast(
    model: nn.Module, val: images.Images, recipe: Recipe, world: World, *, workers: int = 0
) -> dict[str, float]:
    """Of pictures not trained on: how often the positive is the best of all (top-1), the mean fraction of the negatives
    that are more similar than it (chance: 50 %), and the loss."""
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    samples = loader.Plain(Seeded(val, data.Views(recipe)), loader.identity)
    batches = loader.eval_loader(samples, 64, rank=world.rank, world=world.size, workers=workers)
    model.eval()
    with torch.inference_mode():
        for sample, *_ in loader.progress(batches, "evaluating", active=world.is_main):
            with world.autocast():
                logits, _ = model(**to(world.device, sample))
            positive, negatives = logits[:, :1], logits[:, 1:]
            above = (negatives >= positive).sum(1) / negatives.isfinite().sum(1)
            loss = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum")
            sums += torch.stack([(above == 0).sum(), above.sum(), loss, loss.new_tensor(len(logits))]).double()
    top1, above, loss, seen = run.add_up(sums).tolist()
    expected = len(val) * (recipe.regions if recipe.method == "maskco" else 1)
    if seen != expected:
        raise RuntimeError(f"contrast over {seen:.0f} regions or views, but the data hold {expected}")
    return {"contrast_top1": 100 * top1 / seen, "contrast_rank": 100 * above / seen, "contrast_loss": loss / seen}


def trained(
    model: nn.Module, val: images.Images, recipe: Recipe, world: World, *, workers: int = 0
) -> dict[str, float]:
    """Scores of what the recipe trains for, the most important first."""
    score = classification.accuracy if recipe.method == "linear" else contrast
    return score(model, val, recipe, world, workers=workers)


def features(
    backbone: nn.Module, pictures: images.Images, recipe: Recipe, world: World, *, workers: int = 0,
    tolerant: bool = False,
) -> tuple[np.ndarray, list[int]]:
    """(rows, C): the map averaged over the picture's center crop; and which picture each row is of: all of them, or
    with `tolerant`, for training pictures, those that can be read."""
    transform = images.eval_transform(recipe.input_size_px, recipe.eval_crop)
    samples = loader.Plain(pictures, transform, tolerant=tolerant)
    rows: list[np.ndarray | None] = []
    backbone.eval()
    with torch.inference_mode():
        batches = loader.eval_loader(samples, 64, rank=world.rank, world=world.size, workers=workers)
        for pixels, labels, _ in loader.progress(batches, "features", active=world.is_main):
            with world.autocast():
                maps = backbone(pixels.to(world.device))
            means = maps.float().mean((2, 3)).cpu().numpy()
            rows += [None if label == loader.LEFT_OUT else row for row, label in zip(means, labels)]
    rows = run.gather_objects(rows)
    readable = [i for i, row in enumerate(rows) if row is not None]
    if len(readable) < len(rows) and world.is_main:
        print(f"{len(rows) - len(readable)} of {len(rows)} pictures cannot be read, and are left out of the probe",
              file=sys.stderr)
    return np.stack([rows[i] for i in readable]), readable


def probe_data(recipe: Recipe, root: Path, world: World) -> tuple[images.Images, images.Images] | None:
    """Labelled pictures to judge a pre-trained backbone by: those of --probe, or in place of the built-in set."""
    if not (recipe.probe or recipe.dataset in BUILT_IN):
        return None  # what learns from ImageNet is judged by `imagenet_linear`
    try:
        return data.open_labelled(recipe.probe or root)
    except UserError as error:
        if recipe.probe:
            raise
        if world.is_main:
            print(f"no linear probe at the end: {error}")
        return None


def probe_scores(
    backbone: nn.Module, train: images.Images, val: images.Images, recipe: Recipe, world: World, *, workers: int = 0
) -> dict[str, float]:
    """A linear classifier on a backbone as it stands: accuracy in percent, or for pictures that show several
    categories mean average precision over those that occur in both splits. Nothing but on the main process."""
    x, seen = features(backbone, train, recipe, world, workers=workers, tolerant=True)
    x_val, _ = features(backbone, val, recipe, world, workers=workers)
    scores = classified(x, seen, x_val, train, val) if world.is_main else {}
    world.wait_long()  # a classifier for each category can take an hour
    return scores


def classified(
    x: np.ndarray, seen: list[int], x_val: np.ndarray, train: images.Images, val: images.Images
) -> dict[str, float]:
    """The score of linear classifiers on features (rows, C); `seen`: which training picture each row is of."""
    if not isinstance(train, data.Present):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, train.labels[seen])
        return {"probe_top1": 100 * classifier.score(x_val, val.labels)}
    precisions = []
    for shown, shown_val in zip(train.categories[seen].T, val.categories.T):
        if shown_val.any() and len(set(shown)) == 2:
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, shown)
            precisions.append(average_precision_score(shown_val, classifier.decision_function(x_val)))
    return {"probe_map": 100 * float(np.mean(precisions))}


def metrics(scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of results.json. None is comparable: no figure of the paper is at hand."""
    return [run.metric(key, value, UNITS.get(key, "%")) for key, value in scores.items()]


# Checkpoints ----------------------------------------------------------------------------------------------


def load_run(folder: Path) -> tuple[nn.Module, Recipe, list[str]]:
    """A run's newest model in eval mode, its recipe, and the names of its classes."""
    recipe, weights, state = run.load_run(folder, Recipe)
    model = run.built(
        lambda: build(recipe, len(state["classes"])), weights["model"],
        f"{folder} does not hold what its config.json says",
    )
    return model, recipe, state["classes"]


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, file with a backbone (.safetensors, .pth), or shipped[:NAME]."""
    task: Literal["trained", "probe"] = "trained"
    recipe: str | None = None
    """Recipe that names the backbone and the size of pictures; a run folder knows its own."""
    data: Path | None = None
    """Data folder with a training and a validation split."""
    out: Path | None = None
    """JSON file to write the scores to."""
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.maskco.evaluate", description=__doc__)
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    args.checkpoint = shipped.path_of("maskco", args.checkpoint)
    model, recipe, classes = None, RECIPES.get(args.recipe or ""), []
    if (args.checkpoint / "checkpoints").is_dir() or shipped.header(args.checkpoint):
        model, recipe, classes = load_run(args.checkpoint)
    elif not recipe:
        raise UserError(f"a file of weights needs --recipe, one of {', '.join(RECIPES)}; got {args.recipe!r}")
    elif args.task == "trained":
        raise UserError(f"{args.checkpoint} is no run folder: a backbone alone can only be probed, with --task probe")
    root = data_folder(recipe, args.data)
    if args.task == "probe":
        backbone = build_backbone(recipe.backbone, recipe.output_stride)
        load_backbone(backbone, args.checkpoint)
        train, val = data.open_labelled(root)
        scores = probe_scores(backbone.to(world.device), train, val, recipe, world, workers=args.workers)
    else:
        linear = recipe.method == "linear"
        val = images.open_images(root, "val") if linear else data.open_pictures(root, "val")
        if linear:
            val = classification.of_classes(args.checkpoint, classes, val)
        scores = trained(model.to(world.device), val, recipe, world, workers=args.workers)
    if world.is_main:
        rows = metrics(scores)
        for row in rows:
            print(f"{row['name']:>14} {row['value']:8.3f} {row['unit']}")
        print(f"{len(val)} pictures of {root.resolve().name}, {recipe.method} {recipe.backbone}, {args.checkpoint}")
        if args.out:
            about = {"checkpoint": str(args.checkpoint), "pictures": len(val), "metrics": rows}
            run.write_json(args.out, about | run.environment())


if __name__ == "__main__":
    run.main(main)
