"""What a checkpoint can do: ``python -m papers.ctp.evaluate CHECKPOINT [--task features] --data FOLDER``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors'.

    trained    what it was trained for: tracking in games nobody has seen, or classes of the test videos
    features   what its backbone is worth as it stands: nearest neighbours, and a linear classifier
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from common import run
from common.data import loader
from common.data.text import printable
from common.data.tiny.clips import clips
from common.data.video import Clips, Videos, open_videos
from common.metrics.classification import Accuracy
from common.metrics.retrieval import recall_at
from common.run import UserError, World, shipped
from papers.ctp import baselines, data
from papers.ctp.model import (
    Backbone,
    CtP,
    Recognizer,
    Targets,
    checkpoint_filter_fn,
    decode,
    iou,
    pool,
    tracking_losses,
)
from papers.ctp.official import load_backbone
from papers.ctp.recipes import RECIPES, Recipe

UNITS = {
    "loss": "nats", "iou": "IoU", "iou_hidden": "IoU", "iou_still": "IoU", "centre": "px / 0.8", "size": "log / 0.04",
}


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The network of a recipe's method; only a recogniser has the data's classes."""
    kind, width = recipe.backbone, recipe.width
    match recipe.method:
        case "ctp":
            return CtP(kind, recipe.frames, width, recipe.head_std)
        case "vcop":
            return baselines.VCOP(kind, width, recipe.dropout, recipe.order_clips)
        case "moco":
            return baselines.MoCo(kind, width, queue=recipe.queue)
        case "speed":
            return Recognizer(kind, len(baselines.SPEEDS), width, recipe.dropout)
        case "rotation":
            return Recognizer(kind, len(baselines.ANGLES), width, recipe.dropout)
        case "recognize":
            return Recognizer(kind, classes, width, recipe.dropout)


def inputs(recipe: Recipe) -> tuple[Tensor, ...]:
    """Arguments of a recipe's network for one sample."""
    clip = torch.zeros(1, 3, recipe.frames, recipe.size_px, recipe.size_px)
    if recipe.method == "ctp":
        return clip, torch.zeros(1, recipe.patches, 4)
    clips = {"vcop": recipe.order_clips, "moco": 2}.get(recipe.method)
    return (clip[:, None].expand(1, clips, *clip.shape[1:]) if clips else clip,)


def targets(recipe: Recipe) -> Targets:
    return Targets(recipe.target_mean, recipe.target_std)


def open_split(recipe: Recipe, folder: Path | None, split: str, missing: float | None = None) -> Videos:
    """Videos of a split: of the folder given, or of the built-in clips for a recipe meant for them."""
    return open_videos(run.data_folder(recipe, folder, {"clips": clips}), split, fold=recipe.fold, missing=missing)


def expect_all_classes(val: Videos) -> None:
    """`UserError` names classes that no validation video has."""
    seen = set(val.labels.tolist())
    if missing := [printable(name) for i, name in enumerate(val.classes) if i not in seen]:
        raise UserError(
            f"validation has no video of {', '.join(missing[:5])}{' ...' if missing[5:] else ''}, which training has; "
            "add some, or take --val-classes subset"
        )


def describe(recipe: Recipe, folder: Path | None, videos: Videos, val: Videos) -> str:
    """What a result is measured on; data given in place of the built-in clips go by their folder's name."""
    name = folder.resolve().name if folder and recipe.dataset == "clips" else recipe.dataset
    return f"{name}: {len(videos):,} training, {len(val):,} validation videos"


def passed_over(**splits: Videos) -> str:
    """What stands in the data folder and is not among the videos, a line for each split; empty if nothing is."""
    return "".join(f"- passed over in {split}: {notes}\n" for split, its in splits.items() if (notes := its.notes()))


def _batches(samples: Clips, what: str, world: World, workers: int, batch: int):
    loaded = loader.eval_loader(
        loader.Plain(samples, loader.identity), batch, rank=world.rank, world=world.size, workers=workers
    )
    return loader.progress(loaded, what, active=world.is_main)


def to(device: torch.device, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in sample.items()}


# Scores ---------------------------------------------------------------------------------------------------


def trained(model: nn.Module, val: Videos, recipe: Recipe, world: World, *, workers: int = 0) -> dict[str, float]:
    """Scores of what the recipe trains for, the most important first."""
    score = {"ctp": tracking, "recognize": recognition}.get(recipe.method, discrimination)
    model.eval()
    with torch.inference_mode():
        return score(model, val, recipe, world, workers)


def tracking(model: nn.Module, val: Videos, recipe: Recipe, world: World, workers: int = 0) -> dict[str, float]:
    """One game for each held-out video, always the same ones.

    Mean IoU of predicted boxes over all frames but the first, over those of them where the patch is hidden, and what
    boxes that never move would score; and the two terms of the loss.
    """
    sums = torch.zeros(8, dtype=torch.float64, device=world.device)
    for sample, *_ in _batches(data.training_clips(val, recipe, seed=1), "tracking", world, workers, 16):
        sample = to(world.device, sample)
        paths, query = sample["trajectories"], sample["trajectories"][:, :, 0]
        with world.autocast():
            predictions = model(sample["clip"], query)
        overlap = iou(decode(predictions.float(), query, targets(recipe)), paths)[..., 1:]
        still = iou(query[:, :, None].expand_as(paths), paths)[..., 1:]
        hidden = ~sample["visible"][..., 1:]
        losses = tracking_losses(predictions, paths, targets=targets(recipe))
        n = len(paths)
        sums += torch.stack([
            overlap.sum(), overlap.new_tensor(overlap.numel()), (overlap * hidden).sum(), hidden.sum(),
            still.sum(), losses["centre"] * n, losses["size"] * n, overlap.new_tensor(n),
        ]).double()
    overlap, frames, overlap_hidden, hidden, still, center, size, seen = run.add_up(sums).tolist()
    if seen != len(val):
        raise RuntimeError(f"tracking over {seen:.0f} videos, but the data hold {len(val)}")
    found = {"iou": overlap / frames}
    if hidden:
        found["iou_hidden"] = overlap_hidden / hidden
    return found | {"iou_still": still / frames, "centre": center / seen, "size": size / seen}


def discrimination(model: nn.Module, val: Videos, recipe: Recipe, world: World, workers: int = 0) -> dict[str, float]:
    """Accuracy of a baseline's own task, one sample for each held-out video, always the same ones."""
    scores = Accuracy(world.device)
    for sample, _, _ in _batches(data.training_clips(val, recipe, seed=1), recipe.method, world, workers, 16):
        sample = to(world.device, sample)
        with world.autocast():
            scores.update(model(sample["clip"]), sample["label"])
    found = scores.compute(expected=len(val))
    return {"top1": found["top1"], "loss": found["loss"]}


def recognition(model: nn.Module, val: Videos, recipe: Recipe, world: World, workers: int = 0) -> dict[str, float]:
    """The test protocol: the mean of the *logits* of a video's clips. Top-1, top-5, mean class accuracy."""
    scores, hits = Accuracy(world.device), torch.zeros(2, len(val.classes), dtype=torch.float64, device=world.device)
    for clips_BN, labels, _ in _batches(data.testing_clips(val, recipe), "evaluating", world, workers, 4):
        with world.autocast():
            logits = model(clips_BN.to(world.device)).float().mean(1)
        labels = labels.to(world.device)
        scores.update(logits, labels)
        right = logits.argmax(1) == labels
        hits += torch.stack([labels[right].bincount(minlength=hits.shape[1]), labels.bincount(minlength=hits.shape[1])])
    found = scores.compute(expected=len(val))
    by_class = mean_class(*run.add_up(hits))
    return {"top1": found["top1"], "top5": found["top5"], "mean_class": by_class, "loss": found["loss"]}


def mean_class(right: Tensor, seen: Tensor) -> float:
    """Mean over the classes that occur of the percentage of their videos that were right."""
    return 100 * (right[seen > 0] / seen[seen > 0]).mean().item()


# What a backbone is worth -----------------------------------------------------------------------------------


def features(backbone: Backbone, videos: Videos, recipe: Recipe, world: World, *, workers: int = 0) -> np.ndarray:
    """(videos, C): what the backbone makes of each video's test clips, averaged."""
    backbone.to(world.device, memory_format=torch.channels_last_3d).eval()
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for clips_BN, *_ in _batches(data.testing_clips(videos, recipe), "features", world, workers, 4):
            with world.autocast():
                maps = backbone(clips_BN.to(world.device).flatten(0, 1))
            rows.extend(pool(maps.float()).unflatten(0, clips_BN.shape[:2]).mean(1).cpu().numpy())
    return np.stack(run.gather_objects(rows))


def frozen_scores(init: str | Path, recipe: Recipe, options: run.Options, world: World) -> dict[str, float]:
    """Of the backbone of `init`, "" for a random one, as it stands, on a recipe's test clips: accuracy of a linear
    classifier on its features, and whether a test video's nearest training videos (cosine) hold one of its class."""
    train, val = (open_split(recipe, options.data, split) for split in ("train", "val"))
    run.seed_all(options.seed)
    backbone = Backbone(recipe.backbone, width=recipe.width)
    if init:
        load_backbone(backbone, init)
    x, x_val = (features(backbone, videos, recipe, world, workers=options.workers) for videos in (train, val))
    y, y_val = np.asarray(train.labels), np.asarray(val.labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, y)
    nearest, gallery = (F.normalize(torch.from_numpy(a).double(), dim=1) for a in (x_val, x))
    relevant = torch.from_numpy(y_val[:, None] == y)
    recalls = recall_at(nearest @ gallery.T, relevant, (1, 5, 10, 20, 50))
    return {"probe_top1": 100 * probe.score(x_val, y_val), **recalls}


def downstream(recipe: Recipe, init: str | Path) -> Recipe:
    """The recipe that fine-tunes a backbone of this recipe's."""
    if recipe.downstream not in RECIPES:
        raise UserError(f"no recipe --downstream {recipe.downstream!r}; there are {', '.join(RECIPES)}")
    return replace(RECIPES[recipe.downstream], backbone=recipe.backbone, width=recipe.width, init=str(init))


def transfer_scores(
    init: str | Path, home: Path, recipe: Recipe, options: run.Options, world: World, train: run.Train
) -> dict[str, float]:
    """Scores of the backbone of `init`, or of a random one: as it stands, and fine-tuned."""
    tuned = tuned_top1(init, home, recipe, options, world, train)
    return frozen_scores(init, downstream(recipe, init), options, world) | {"finetune_top1": tuned}


def tuned_top1(
    init: str | Path, home: Path, recipe: Recipe, options: run.Options, world: World, train: run.Train
) -> float:
    """Accuracy after fine-tuning the backbone of `init`, or a random one, by `recipe.downstream` in a run that `train`
    makes under `home`, or made before a kill."""
    own = replace(options, out=home, resume="auto", stop_at=0, seeds=())
    done = world.agree([p.parent for p in (home / "ctp" / recipe.downstream).glob("*/results.json")
                        if run.finished(p.parent)])
    folder = done[0] if done else train(recipe.downstream, downstream(recipe, init), own, world)
    world.wait()  # its results are whole
    return run.read_scores(folder)["top1"]


def metrics(scores: Mapping[str, float], recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of results.json; the first score is the one the paper reports. Nothing here was trained as the paper's."""
    rows = [run.metric(key, value, UNITS.get(key, "%")) for key, value in scores.items()]
    rows[0] |= {"paper_value": recipe.paper_top1, "paper_source": recipe.paper_source}
    return rows


# Checkpoints ----------------------------------------------------------------------------------------------


def load_run(folder: Path) -> tuple[nn.Module, Recipe, list[str]]:
    """A run's newest model in eval mode, its recipe, and the names of its classes."""
    recipe, weights, state = run.load_run(folder, Recipe)
    model = run.built(
        lambda: build(recipe, len(state["classes"])), weights["model"],
        f"{folder} does not hold what its config.json says",
    )
    return model, recipe, state["classes"]


def load_file(path: Path, recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's model in eval mode with the weights of a file, ours or the authors'."""
    model = build(recipe, classes)
    weights = checkpoint_filter_fn(run.load_weights(path), model)
    run.fit(model, weights, f"{path} does not fit {recipe.method} {recipe.backbone}")
    return model.eval()


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, file of weights (.safetensors, .pth), or shipped[:NAME]."""
    recipe: str | None = None
    """Recipe that names the model and the clips; a run folder knows its own. With --task features, the recipe whose
    test clips are taken: by default the run's downstream recipe, or its own."""
    task: Literal["trained", "features"] = "trained"
    """See above."""
    data: Path | None = None
    """Data folder."""
    out: Path | None = None
    """JSON file to write the scores to."""
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.ctp.evaluate", description=__doc__)
    options = run.Options(data=args.data, device=args.device, precision=args.precision, workers=args.workers)
    world = run.start_world(options)
    args.checkpoint = shipped.path_of("ctp", args.checkpoint)
    if args.recipe not in {None, *RECIPES}:
        raise UserError(f"no recipe {args.recipe!r}; there are {', '.join(RECIPES)}")
    if not (args.recipe or shipped.is_run(args.checkpoint)):
        raise UserError(f"a file of weights needs --recipe, one of {', '.join(RECIPES)}")
    recipe, model = RECIPES.get(args.recipe), None
    if args.task == "features":
        if not recipe:
            _, trained_by, _ = load_run(args.checkpoint)
            recipe = downstream(trained_by, args.checkpoint) if trained_by.downstream else trained_by
    elif shipped.is_run(args.checkpoint):
        model, recipe, classes = load_run(args.checkpoint)
    val = open_split(recipe, args.data, "val")
    if args.task == "features":
        scores = frozen_scores(args.checkpoint, recipe, options, world)
    else:
        if model and recipe.method == "recognize" and classes != val.classes:
            differ = sorted({*classes} ^ {*val.classes}) or "their order"
            raise UserError(f"{args.checkpoint} was trained on other classes than the data's: {differ}")
        model = model or load_file(args.checkpoint, recipe, len(val.classes))
        scores = trained(model.to(world.device), val, recipe, world, workers=args.workers)
    if world.is_main:
        for row in metrics(scores, recipe):
            print(f"{row['name']:>12} {row['value']:8.3f} {row['unit']}")
        where = args.data or recipe.dataset
        print(f"{len(val)} videos of {where}, {recipe.method} {recipe.backbone}, {args.checkpoint}")
        if args.out:
            about = {"checkpoint": str(args.checkpoint), "videos": len(val), "metrics": metrics(scores, recipe)}
            run.write_json(args.out, about | run.environment())


if __name__ == "__main__":
    run.main(main)
