"""Trains SPACH, or any timm model under the same recipe: ``python -m papers.spach tiny``.

The same line works under torchrun. A run leaves its folder under runs/spach/ (see common/run/folder.py).
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import images, loader
from common.metrics import classification
from common.run.timm import average_statistics, export_timm, optimizer_and_schedule
from papers.spach import figures
from papers.spach.evaluate import PAPER, build
from papers.spach.recipes import Recipe


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    root = classification.data_folder(recipe, options.data)
    data, val = images.open_both(root, subset=options.val_classes == "subset")
    size, classes = recipe.input_size_px, len(data.classes)
    steps_per_epoch = loader.steps_per_epoch(len(data), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    mixup = images.make_mixup(
        recipe.mixup, recipe.cutmix, smoothing=recipe.label_smoothing, classes=classes,
        per_rank=recipe.batch // world.size,
    )
    smoothing = 0.0 if mixup else recipe.label_smoothing

    run.seed_all(options.seed)
    model = build(recipe, classes)
    PAPER.start_from(recipe.init, model)
    model.to(world.device, memory_format=torch.channels_last)
    params = sum(p.numel() for p in model.parameters())
    flops = run.multiply_adds(model, torch.zeros(1, 3, size, size))
    # Biases and 1-D parameters are exempt from decay; the layer scales gamma are 3-D, and decay as the authors' do.
    optimizer, schedule = optimizer_and_schedule(model, recipe, steps, steps_per_epoch)
    ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay else None

    folder = run.open_run("spach", name, recipe, options, world)
    start, state = run.restore(folder, options, optimizer, classes=data.classes, model=model, ema=ema)
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model

    transform = images.train_transform(
        size, crop_scale=recipe.crop_scale, flip=recipe.flip, policy=recipe.policy, erase=recipe.erase
    )
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch, start=start,
        eval_every=recipe.eval_every or steps_per_epoch, wall_s=state.get("wall_s", 0.0), cpu_s=state.get("cpu_s", 0.0),
    )
    batches = loader.train_loader(
        data, transform, recipe.batch, clock.end, seed=options.seed, start=start, rank=world.rank, world=world.size,
        repeats=recipe.repeats, workers=options.workers, report=folder / "unreadable.txt",
    )
    accuracy = partial(classification.accuracy, recipe=recipe, world=world, workers=options.workers)
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"{recipe.model}: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per image\n"
        f"{len(data):,} training and {len(val):,} validation images of {classes} classes from {root}\n"
        f"{clock.about(world, chunks, 'images')}, peak lr {optimizer.defaults['lr']:.3g}\nrun folder {folder}"
    )
    if clock.eval_due:  # a kill may have come between checkpoint and evaluation
        log.scores(start, lambda: accuracy(model, val))

    model.train()
    for step, (pixels, labels) in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        pixels = pixels.to(world.device, non_blocking=True, memory_format=torch.channels_last)
        targets = labels.to(world.device, non_blocking=True)
        if mixup:
            pixels, targets = mixup(pixels, targets)

        loss = torch.zeros((), device=world.device)
        for weight, x, y in run.micro_batches(network, chunks, pixels, targets):
            with world.autocast():
                logits = network(x)
            part = weight * F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
            part.backward()
            loss += part.detach()
        norm = run.clip_gradients(model.parameters(), recipe.clip_norm, step=step, loss=loss, folder=folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            move_average(ema, model, recipe.ema_decay if step > 1 else 0.0)
        clock.stop()

        if clock.log_due:
            values = {"loss": world.mean(loss), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            log.step(step, values | {"samples_per_s": clock.rate, "cpu_s": clock.cpu_s})
        else:
            log.step(step)
        if clock.save_due or clock.eval_due:
            average_statistics(world, model, ema)
        if world.is_main and clock.save_due:
            weights = {"model": model.state_dict()} | ({"ema": ema.state_dict()} if ema else {})
            state = {"optimizer": optimizer.state_dict(), "classes": data.classes}
            state |= {"wall_s": clock.wall_s, "cpu_s": clock.cpu_s}
            run.save_checkpoint(folder, step, weights, state)
        if clock.eval_due:
            log.scores(step, lambda: accuracy(model, val))
            model.train()
    if clock.stopped:
        log.close(clock.farewell(folder))
        return folder

    scores = log.scores(steps, lambda: accuracy(model, val))
    log.close()
    scores["best_top1"] = max(row.get("val/top1", 0) for row in run.read_log(folder)) if world.is_main else 0.0
    if ema:
        scores["ema_top1"] = accuracy(ema, val)["top1"]
    if recipe.train_accuracy:
        scores["train_top1"] = accuracy(model, data, tolerant=True)["top1"]
        scores["gap"] = scores["train_top1"] - scores["top1"]
    if world.is_main:
        metrics = classification.metrics(scores, recipe, PAPER.comparable(name, recipe, data, val))
        export = partial(
            export_timm, model, folder / "model", side=size, crop=recipe.eval_crop, classes=data.classes,
            model_args={"img_size": size, **recipe.model_args},
        )
        run.finish(
            folder, "spach", name, options, data=classification.describe(recipe, options.data, data, val),
            metrics=metrics, params=params, flops=flops, wall_s=clock.wall_s, throughput=clock.rate,
            then={"model": export, "pictures": lambda: figures.draw(folder, model, val, recipe)},
        )
    return folder


@torch.no_grad()
def move_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Weights and buffers. timm's ModelEmaV3 moves a mixer that blocks share once for every block; torch's
    AveragedModel sends a counter to the device at every step, and the host waits."""
    ours, its = (list(chain(m.parameters(), m.buffers())) for m in (average, model))
    real = [k for k, tensor in enumerate(ours) if tensor.is_floating_point()]
    torch._foreach_lerp_([ours[k] for k in real], [its[k] for k in real], 1 - decay)
    for k in set(range(len(ours))) - set(real):
        ours[k].copy_(its[k])


if __name__ == "__main__":
    run.through_the_door(__package__)
