"""Trains an image classifier for others to start from: DeiT's recipe, in a run folder.

For papers that need one and are not about it; a paper about a backbone has a trainer of its own. A recipe here is any
object with the fields that metrics/classification.py names and ``model_args, epochs, batch, base_lr, min_lr,
warmup_epochs, weight_decay, clip_norm, crop_scale, flip, policy, erase, mixup, cutmix, label_smoothing``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import images, loader
from common.metrics import classification
from common.run import drawing


def train(
    paper: str, name: str, recipe: Any, options: run.Options, world: run.World,
    build: Callable[[Any, int], torch.nn.Module], *, warmup_lr: float,
) -> Path:
    """Trains, evaluates and reports the timm model ``build(recipe, number of classes)``; returns the run's folder.

    `warmup_lr` is the learning rate of the first step. The run's ``model/`` is timm's to load (run.export_timm).
    """
    root = classification.data_folder(recipe, options.data)
    data, val = images.open_images(root, "train"), images.open_images(root, "val")
    size, steps_per_epoch = recipe.input_size_px, loader.steps_per_epoch(len(data), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    mixup = None
    if recipe.mixup or recipe.cutmix:
        if (share := recipe.batch // world.size) % 2:
            raise run.UserError(f"mixup pairs images: each process needs an even share of the batch, not {share}")
        mixup = Mixup(
            recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=len(data.classes)
        )

    run.seed_all(options.seed)
    model = build(recipe, len(data.classes)).to(world.device, memory_format=torch.channels_last)
    params = sum(p.numel() for p in model.parameters())
    flops = run.multiply_adds(model, torch.zeros(1, 3, size, size))
    lr = recipe.base_lr * recipe.batch / 512
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=recipe.weight_decay)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=recipe.min_lr, warmup_t=int(recipe.warmup_epochs * steps_per_epoch),
        warmup_lr_init=warmup_lr, t_in_epochs=False,
    )

    folder = run.open_run(paper, name, recipe, options, world)
    start, wall_s = 0, 0.0
    if options.resume and (checkpoint := run.load_checkpoint(folder)):
        start, weights, state = checkpoint
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(state["optimizer"])
        wall_s = state["wall_s"]
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model

    transform = images.train_transform(
        size, crop_scale=recipe.crop_scale, flip=recipe.flip, policy=recipe.policy, erase=recipe.erase
    )
    batches = loader.train_loader(
        data, transform, recipe.batch, min(steps, options.stop_at or steps), seed=options.seed, start=start,
        rank=world.rank, world=world.size, workers=options.workers, report=folder / "unreadable.txt",
    )
    about = classification.describe(recipe, options.data, data, val)
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.model} as a classifier: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per image\n"
        f"{about}, of {len(data.classes)} classes, from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} images"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, peak learning rate {lr:.3g}, steps {start} to {steps}\n"
        f"run folder {folder}"
    )

    model.train()
    seen, began, tick = 0, wall_s, time.perf_counter()
    for step, (pixels, labels) in enumerate(batches, start + 1):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        pixels = pixels.to(world.device, non_blocking=True, memory_format=torch.channels_last)
        targets = labels.to(world.device, non_blocking=True)
        if mixup:
            pixels, targets = mixup(pixels, targets)

        loss = torch.zeros((), device=world.device)
        parts = list(zip(pixels.chunk(chunks), targets.chunk(chunks)))
        for i, (x, y) in enumerate(parts, 1):
            if world.size > 1:
                network.require_backward_grad_sync = i == len(parts)
            with world.autocast():
                logits = network(x)
            # mixup has smoothed its targets already
            part = F.cross_entropy(logits.float(), y, label_smoothing=0.0 if mixup else recipe.label_smoothing)
            part = part * len(x) / len(pixels)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf).item()
        if not math.isfinite(norm):  # the same on all ranks, and before the weights are touched
            raise run.UserError(
                f"the gradient is not finite at step {step} (loss {loss.item():.4g}); the last good checkpoint is in "
                f"{folder}. Lower --base-lr, or set --clip-norm"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            values = {
                "loss": world.mean(loss), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm,
                "images_per_s": seen / (wall_s - began),
            }
        if step % steps_per_epoch == 0 or step == steps:
            scores = classification.accuracy(model, val, recipe, world, workers=options.workers)
            values |= {f"val/{key}": value for key, value in scores.items()}
            model.train()
        log.step(step, values)
        due = step % (options.checkpoint_every or steps_per_epoch) == 0
        if world.is_main and (due or step in (steps, options.stop_at)):
            state = {"optimizer": optimizer.state_dict(), "wall_s": wall_s, "classes": data.classes}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        tick = time.perf_counter()
    log.close()
    if options.stop_at and options.stop_at < steps:
        log.say(f"stopped at step {options.stop_at} of {steps}; go on with --resume {folder}")
        return folder

    scores = classification.accuracy(model, val, recipe, world, workers=options.workers)
    if world.is_main:
        run.export_timm(
            model, folder / "model", side=size, crop=recipe.eval_crop, classes=data.classes,
            model_args=recipe.model_args,
        )
        drawing.curves(folder, [["loss", "val/loss"], ["val/top1"], ["lr"]])
        samples = [val[i] for i in drawing.evenly_spaced(len(val), 24)]
        transform = images.eval_transform(size, recipe.eval_crop)
        drawing.predictions(folder / "predictions.png", model, samples, val.classes, transform)
        run.write_results(folder, {
            "paper": paper, "recipe": name, "data": about,
            "metrics": classification.metrics(scores, recipe, comparable=False), "params": params, "flops": flops,
            "wall_s": wall_s, "peak_mem_bytes": run.peak_memory_bytes(),
            "throughput": seen / (wall_s - began) if seen else None, "seed": options.seed,
        })
    return folder
