"""Trains MaskCo, MoCo v2, or a linear classifier on what they learned: ``python -m papers.maskco.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/maskco/ (see common/run.py).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import images, loader
from papers.maskco import cases, data, evaluate, figures
from papers.maskco.export import export, load_backbone
from papers.maskco.recipes import BUILT_IN, RECIPES, Recipe


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.maskco.train")
    world = run.start_world(options)
    folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    linear = recipe.method == "linear"
    root = evaluate.data_folder(recipe, options.data)
    open_data = images.open_images if linear else data.open_pictures
    pictures, val = open_data(root, "train"), open_data(root, "val")
    probe = _probe_data(recipe, root, world)
    steps_per_epoch = loader.steps_per_epoch(len(pictures), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    if linear:
        transform = images.train_transform(recipe.input_size_px, crop_scale=recipe.crop_area, flip=recipe.flip)
    else:
        transform = data.Views(recipe)

    run.seed_all(options.seed)
    model = evaluate.build(recipe, len(pictures.classes))
    if recipe.init:
        load_backbone(model.backbone, recipe.init)
    model.to(world.device, memory_format=torch.channels_last)
    flops = run.multiply_adds(model, *cases.inputs(recipe))

    folder = run.open_run("maskco", name, recipe, options, world)
    learned = [p for p in model.parameters() if p.requires_grad]  # the keys' networks only follow
    optimizer = torch.optim.SGD(learned, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    schedule = scheduler(optimizer, recipe, steps_per_epoch)

    start, best, wall_s = 0, {}, 0.0
    if options.resume and (checkpoint := run.load_checkpoint(folder)):
        start, weights, state = checkpoint
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(state["optimizer"])
        best, wall_s = state["best"], state["wall_s"]
    if options.compile:
        model.compile()
    # Every process has its own running statistics, as in MoCo; they are averaged where they are used or kept.
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model

    batches = loader.train_loader(
        pictures, transform, recipe.batch, min(steps, options.stop_at or steps), seed=options.seed, start=start,
        rank=world.rank, world=world.size, workers=options.workers, report=folder / "unreadable.txt",
    )
    params = sum(p.numel() for p in learned)
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.method} {recipe.backbone}: {params:,} learned parameters, {flops / 1e6:,.0f} M multiply-adds\n"
        f"{len(pictures):,} training and {len(val):,} validation pictures from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} pictures"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, learning rate {recipe.lr:.3g}, steps {start} to {steps}\n"
        f"run folder {folder}"
    )

    model.train()
    seen, began, tick = 0, wall_s, time.perf_counter()
    fallbacks = 0.0
    for step, (sample, labels) in enumerate(batches, start + 1):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        if recipe.method == "maskco":
            fallbacks = sample["fallback"].mean()
        sample, labels = evaluate.to(world.device, sample), labels.to(world.device, non_blocking=True)

        if not linear:
            model.update_keys()
        loss, right, keys = torch.zeros((), device=world.device), torch.zeros((), device=world.device), []
        share = -(-len(labels) // chunks)
        parts = [slice(i, i + share) for i in range(0, len(labels), share)]
        for part in parts:
            if world.size > 1:
                network.require_backward_grad_sync = part is parts[-1]
            with world.autocast():
                output = network(**{key: value[part] for key, value in sample.items()})
            logits, target = output, labels[part]
            if not linear:
                logits, new = output
                keys.append(new)
                target = torch.zeros(len(logits), dtype=torch.long, device=world.device)  # the positive is column 0
            weight = len(labels[part]) / len(labels)
            partial = F.cross_entropy(logits.float(), target) * weight
            partial.backward()
            loss += partial.detach()
            right += (logits.argmax(1) == target).float().mean() * weight
        norm = torch.nn.utils.clip_grad_norm_(learned, math.inf).item()
        if not math.isfinite(norm):  # the same on all ranks, and before the weights are touched
            raise run.UserError(
                f"the gradient is not finite at step {step} (loss {loss.item():.4g}); the last good checkpoint is in "
                f"{folder}. Lower --lr"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not linear:
            model.enqueue(torch.cat(keys))  # after the loss: no picture is its own negative

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            values = {
                "loss": world.mean(loss), "top1": 100 * world.mean(right), "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm, "images_per_s": seen / (wall_s - began),
            }
            if recipe.method == "maskco":
                values["fallback"] = world.mean(torch.as_tensor(fallbacks, device=world.device))
        epoch, rest = divmod(step, steps_per_epoch)
        scored = (rest == 0 and epoch % recipe.eval_every == 0) or step == steps
        due = step % options.checkpoint_every == 0 if options.checkpoint_every else rest == 0
        due |= step in (steps, options.stop_at)
        if world.size > 1 and (scored or due):
            distribute_bn(model, world.size, reduce=True)
        if scored:
            scores = evaluate.trained(model, val, recipe, world, workers=options.workers)
            values |= {f"val/{key}": value for key, value in scores.items()}
            score = next(iter(scores.values()))
            if score > best.get("score", -1):
                best = {"score": score, "step": step}
                if world.is_main:
                    run.save_weights(folder / "best.safetensors", model.state_dict())
            model.train()
        log.step(step, values)
        if world.is_main and due:
            state = {"optimizer": optimizer.state_dict(), "best": best, "wall_s": wall_s, "classes": pictures.classes}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        tick = time.perf_counter()
    log.close()
    if options.stop_at and options.stop_at < steps:
        log.say(f"stopped at step {options.stop_at} of {steps}; go on with --resume {folder}")
        return folder

    scores = evaluate.trained(model, val, recipe, world, workers=options.workers)
    if world.is_main:
        export(model.backbone, recipe.backbone, folder / "model", recipe.input_size_px, recipe.eval_crop)
        figures.draw(folder, model, val, recipe)
    if probe:
        run.seed_all(options.seed)
        fresh = evaluate.build(recipe, len(pictures.classes)).backbone.to(world.device)
        judged = {
            f"{label}{key}": value for label, backbone in (("", model.backbone), ("random_", fresh))
            for key, value in evaluate.probe(backbone, *probe, recipe, world, workers=options.workers).items()
        }
        scores = judged | {key: value for key, value in scores.items() if key != "contrast_loss"}
    if world.is_main:
        run.write_results(folder, {
            "paper": "maskco", "recipe": name, "data": describe(recipe, options.data, len(pictures), len(val)),
            "metrics": evaluate.metrics(scores), "params": params, "flops": flops, "wall_s": wall_s,
            "peak_mem_bytes": run.peak_memory_bytes(), "throughput": seen / (wall_s - began) if seen else None,
            "seed": options.seed,
        })
    return folder


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Scheduler:
    """timm's, to be asked with the number of steps taken so far."""
    if not recipe.decay_epochs:
        return CosineLRScheduler(optimizer, t_initial=recipe.epochs * steps_per_epoch, t_in_epochs=False)
    decays = [epoch * steps_per_epoch + 1 for epoch in recipe.decay_epochs]  # timm's begin one step before `decay_t`
    return MultiStepLRScheduler(optimizer, decay_t=decays, decay_rate=0.1, t_in_epochs=False)


def _probe_data(recipe: Recipe, root: Path, world: run.World) -> tuple[images.Images, images.Images] | None:
    """Labelled pictures to judge a pre-trained backbone by: those of --probe, or in place of the built-in set."""
    if recipe.method == "linear" or not (recipe.probe or recipe.dataset in BUILT_IN):
        return None  # what learns from ImageNet is judged by `imagenet_linear`
    try:
        return data.open_labelled(recipe.probe or root)
    except run.UserError as error:
        if recipe.probe:
            raise
        if world.is_main:
            print(f"no linear probe at the end: {error}")
        return None


def describe(recipe: Recipe, folder: Path | None, train: int, val: int) -> str:
    """What a result was measured on; data given where the recipe names no set of its own go by their folder's name."""
    name = folder.resolve().name if folder and recipe.dataset in ("digits", "pictures") else recipe.dataset
    judged = f", probed on {Path(recipe.probe).name}" if recipe.probe else ""
    return f"{name}: {train:,} training, {val:,} validation pictures{judged}"


if __name__ == "__main__":
    run.main(main)
