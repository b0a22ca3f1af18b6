"""What a checkpoint can do: ``python -m papers.ctp.evaluate CHECKPOINT [--task features] --data FOLDER``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors'.

    trained    what it was trained for: tracking in games nobody has seen, or classes of the test videos
    features   what its backbone is worth as it stands: nearest neighbours, and a linear classifier
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from common import run
from common.data import loader
from common.data.tiny.clips import clips
from common.data.video import Clips, Videos, open_videos
from common.metrics.classification import Accuracy
from common.metrics.retrieval import recall_at
from common.run import UserError, World
from papers.ctp import baselines, data
from papers.ctp.model import Backbone, CtP, Recognizer, decode, iou, pool, tracking_losses
from papers.ctp.official import load_backbone, rename
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
            return baselines.VCOP(kind, width, recipe.dropout)
        case "moco":
            return baselines.MoCo(kind, width, queue=recipe.queue)
        case "speed":
            return Recognizer(kind, len(baselines.SPEEDS), width, recipe.dropout)
        case "rotation":
            return Recognizer(kind, len(baselines.ANGLES), width, recipe.dropout)
        case "recognize":
            return Recognizer(kind, classes, width, recipe.dropout)


def losses_of(recipe: Recipe, network: nn.Module, sample: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The terms that are added up: two of tracking, or the cross-entropy of whatever is to be told apart."""
    if recipe.method == "ctp":
        paths = sample["trajectories"]
        return tracking_losses(network(sample["clip"], paths[:, :, 0]), paths)
    logits = network(sample["clip"])
    return {"cross_entropy": F.cross_entropy(logits.float(), sample.get("label", labels))}


def data_folder(recipe: Recipe, folder: Path | None) -> Path:
    """Where a recipe's data are: as given, or the built-in clips for a recipe meant for them."""
    if folder:
        return folder
    if recipe.dataset == "clips":
        return clips()
    raise UserError(f"this recipe is meant for {recipe.dataset}: give its folder with --data")


def as_it_is(sample: Any) -> Any:
    return sample


def _batches(samples: Clips, what: str, world: World, workers: int, batch: int):
    loaded = loader.eval_loader(
        loader.Plain(samples, as_it_is), batch, rank=world.rank, world=world.size, workers=workers
    )
    return loader.progress(loaded, what, active=world.is_main)


def _sum(sums: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def to(device: torch.device, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in sample.items()}


# Scores ---------------------------------------------------------------------------------------------------


def trained(model: nn.Module, val: Videos, recipe: Recipe, world: World, *, workers: int = 0) -> dict[str, float]:
    """Scores of what the recipe trains for, the most important first."""
    score = {"ctp": tracking, "recognize": recognition}.get(recipe.method, telling_apart)
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
        overlap = iou(decode(predictions.float(), query), paths)[..., 1:]
        still = iou(query[:, :, None].expand_as(paths), paths)[..., 1:]
        hidden = ~sample["visible"][..., 1:]
        losses = tracking_losses(predictions, paths)
        n = len(paths)
        sums += torch.stack([
            overlap.sum(), overlap.new_tensor(overlap.numel()), (overlap * hidden).sum(), hidden.sum(),
            still.sum(), losses["centre"] * n, losses["size"] * n, overlap.new_tensor(n),
        ]).double()
    overlap, frames, overlap_hidden, hidden, still, centre, size, seen = _sum(sums).tolist()
    if seen != len(val):
        raise RuntimeError(f"tracking over {seen:.0f} videos, but the data hold {len(val)}")
    return {"iou": overlap / frames} | ({"iou_hidden": overlap_hidden / hidden} if hidden else {}) | {
        "iou_still": still / frames, "centre": centre / seen, "size": size / seen
    }


def telling_apart(model: nn.Module, val: Videos, recipe: Recipe, world: World, workers: int = 0) -> dict[str, float]:
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
    return {"top1": found["top1"], "top5": found["top5"], "mean_class": mean_class(*_sum(hits)), "loss": found["loss"]}


def mean_class(right: Tensor, seen: Tensor) -> float:
    """Mean over the classes that occur of the percentage of their videos that were right."""
    return 100 * (right[seen > 0] / seen[seen > 0]).mean().item()


def features(
    backbone: Backbone, videos: Videos, recipe: Recipe, world: World, *, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(videos, C): what the backbone, used with the strides of classification, makes of each video's test clips,
    averaged; and the labels."""
    classifier = Backbone(recipe.backbone, width=recipe.width)
    classifier.load_state_dict(backbone.state_dict())
    classifier.to(world.device, memory_format=torch.channels_last_3d).eval()
    rows: list[tuple[int, np.ndarray, int]] = []
    with torch.inference_mode():
        for clips_BN, labels, indices in _batches(data.testing_clips(videos, recipe), "features", world, workers, 4):
            with world.autocast():
                maps = classifier(clips_BN.to(world.device).flatten(0, 1))
            pooled = pool(maps.float()).unflatten(0, clips_BN.shape[:2]).mean(1)
            rows += zip(indices.tolist(), pooled.cpu().numpy(), labels.tolist())
    if dist.is_initialized():
        every = [None] * world.size
        dist.all_gather_object(every, rows)
        rows = [row for rank in every for row in rank]
    rows.sort(key=lambda row: row[0])
    return np.stack([row[1] for row in rows]), np.array([row[2] for row in rows])


def frozen(
    backbone: Backbone, train: Videos, val: Videos, recipe: Recipe, world: World, *, workers: int = 0
) -> dict[str, float]:
    """Of a backbone as it stands: accuracy of a linear classifier on its features, and whether a test video's nearest
    training videos (cosine) hold one of its class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_val, y_val) = (
        features(backbone, videos, recipe, world, workers=workers) for videos in (train, val)
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, y)
    nearest, gallery = (F.normalize(torch.from_numpy(a).double(), dim=1) for a in (x_val, x))
    relevant = torch.from_numpy(y_val)[:, None] == torch.from_numpy(y)
    return {"probe_top1": 100 * probe.score(x_val, y_val), **recall_at(nearest @ gallery.T, relevant)}


def metrics(scores: Mapping[str, float], recipe: Recipe, comparable: bool = False) -> list[dict[str, Any]]:
    """Rows of results.json; the first score is the one the paper reports."""
    rows = [run.metric(key, value, UNITS.get(key, "%")) for key, value in scores.items()]
    rows[0] |= {"paper_value": recipe.paper_top1, "paper_source": recipe.paper_source, "comparable": comparable}
    return rows


# Checkpoints ----------------------------------------------------------------------------------------------


def load_run(folder: Path) -> tuple[nn.Module, Recipe, list[str]]:
    """A run's newest model in eval mode, its recipe, and the names of its classes."""
    found = run.load_checkpoint(folder) if (folder / "config.json").is_file() else None
    if not found:
        raise UserError(f"{folder} is no run folder with a whole checkpoint")
    _, weights, state = found
    fields = json.loads((folder / "config.json").read_text())["recipe"]
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    model = build(recipe, len(state["classes"]))
    model.load_state_dict(weights["model"])
    return model.eval(), recipe, state["classes"]


def load_file(path: Path, recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's model in eval mode with the weights of a file, ours or the authors'."""
    model = build(recipe, classes)
    try:
        model.load_state_dict({rename(name): tensor for name, tensor in run.load_weights(path).items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit {recipe.method} {recipe.backbone}: {reason}") from None
    return model.eval()


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, or file of weights (.safetensors, .pth)."""
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
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    if not args.checkpoint.exists():
        raise UserError(f"no checkpoint at {args.checkpoint}")
    if args.recipe not in {None, *RECIPES}:
        raise UserError(f"no recipe {args.recipe!r}; there are {', '.join(RECIPES)}")
    if args.checkpoint.is_file() and not args.recipe:
        raise UserError(f"a file of weights needs --recipe, one of {', '.join(RECIPES)}")
    recipe = RECIPES.get(args.recipe)
    if args.task == "features":
        if not recipe:
            _, trained_by, _ = load_run(args.checkpoint)
            recipe = RECIPES.get(trained_by.downstream, trained_by)
        root = data_folder(recipe, args.data)
        backbone = Backbone(recipe.backbone, width=recipe.width)
        load_backbone(backbone, args.checkpoint)
        train, val = (open_videos(root, split, fold=recipe.fold) for split in ("train", "val"))
        scores = frozen(backbone, train, val, recipe, world, workers=args.workers)
    else:
        model, classes = None, None
        if args.checkpoint.is_dir():
            model, recipe, classes = load_run(args.checkpoint)
        root = data_folder(recipe, args.data)
        val = open_videos(root, "val", fold=recipe.fold)
        if recipe.method == "recognize" and classes not in (None, val.classes):
            raise UserError(f"{args.checkpoint} was trained on the classes {classes}, the data hold {val.classes}")
        model = model or load_file(args.checkpoint, recipe, len(val.classes))
        scores = trained(model.to(world.device), val, recipe, world, workers=args.workers)
    if world.is_main:
        for row in metrics(scores, recipe):
            print(f"{row['name']:>12} {row['value']:8.3f} {row['unit']}")
        print(f"{len(val)} videos of {root.resolve().name}, {recipe.method} {recipe.backbone}, {args.checkpoint}")
        if args.out:
            about = {"checkpoint": str(args.checkpoint), "videos": len(val), "metrics": metrics(scores, recipe)}
            run.write_json(args.out, about | run.environment())


if __name__ == "__main__":
    run.main(main)
