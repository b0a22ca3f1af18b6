"""Trains SPACH, or another timm model under the same recipe: ``python -m papers.spach.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/spach/ (see common/run.py). The battles train
many networks: see battle.py.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import run
from common.data import images, loader
from common.metrics import classification
from papers.spach import figures
from papers.spach.evaluate import PAPER, build
from papers.spach.recipes import RECIPES, Recipe


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.spach.train")
    world = run.start_world(options)
    if recipe.contenders:
        from papers.spach import battle

        folder = battle.fight(name, recipe, options, world)
    else:
        folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


def train(name: str, recipe: Recipe, options: run.Options, world: run.World, draw: bool = True) -> Path:
    """Trains, evaluates and reports one run, with pictures if `draw`; returns its folder."""
    root = classification.data_folder(recipe, options.data)
    data, val = images.open_images(root, "train"), images.open_images(root, "val")
    size, classes = recipe.input_size_px, len(data.classes)
    steps_per_epoch = loader.steps_per_epoch(len(data), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    mixup = None
    if recipe.mixup or recipe.cutmix:
        if (share := recipe.batch // world.size) % 2:
            raise run.UserError(f"mixup pairs images: each process needs an even share of the batch, not {share}")
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
    run.seed_all(options.seed)
    model = build(recipe, classes)
    model.to(world.device, memory_format=torch.channels_last)
    flops = run.multiply_adds(model, torch.zeros(1, 3, size, size))

    folder = run.open_run("spach", name, recipe, options, world)
    lr = recipe.base_lr * recipe.batch / 512
    # Biases and 1-D parameters are exempt from decay; the layer scales gamma are 3-D, and decay as the authors' do.
    optimizer = create_optimizer_v2(
        model, "adamw", lr=lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay, betas=(0.9, 0.999)
    )
    # Per update, not per epoch as the authors' trainer does (one epoch late): the curve is the same, without stairs.
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=recipe.min_lr, warmup_t=int(recipe.warmup_epochs * steps_per_epoch),
        warmup_lr_init=recipe.warmup_lr, t_in_epochs=False,
    )
    ema = None
    if recipe.ema_decay:  # torch's: timm's ModelEmaV3 moves a mixer that blocks share once for every block
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)

    start, best, wall_s = 0, {"top1": -1.0}, 0.0
    if options.resume and (checkpoint := run.load_checkpoint(folder)):
        start, weights, state = checkpoint
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(state["optimizer"])
        best, wall_s = state["best"], state["wall_s"]
        if ema:
            ema.module.load_state_dict(weights["ema"])
            ema.n_averaged.fill_(start)
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model

    transform = images.train_transform(
        size, crop_scale=recipe.crop_scale, flip=recipe.flip, policy=recipe.policy, erase=recipe.erase
    )
    batches = loader.train_loader(
        data, transform, recipe.batch, min(steps, options.stop_at or steps), seed=options.seed, start=start,
        rank=world.rank, world=world.size, repeats=recipe.repeats, workers=options.workers,
        report=folder / "unreadable.txt",
    )
    params = sum(p.numel() for p in model.parameters())
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.model}: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per image\n"
        f"{len(data):,} training and {len(val):,} validation images of {classes} classes from {root}\n"
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
        if ema:
            ema.update_parameters(model)

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            values = {
                "loss": world.mean(loss), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm,
                "images_per_s": seen / (wall_s - began),
            }
        epoch, rest = divmod(step, steps_per_epoch)
        scored = (rest == 0 and epoch % recipe.eval_every == 0) or step == steps
        due = step % options.checkpoint_every == 0 if options.checkpoint_every else rest == 0
        due |= step in (steps, options.stop_at)
        if world.size > 1 and (scored or due):  # BatchNorm in the conv4 stem: running statistics are each process's own
            for each in [model, *([ema.module] if ema else [])]:
                distribute_bn(each, world.size, reduce=True)
        if scored:
            scores = classification.accuracy(model, val, recipe, world, workers=options.workers)
            values |= {f"val/{key}": value for key, value in scores.items()}
            if scores["top1"] > best["top1"]:
                best = {**scores, "step": step}
                if world.is_main:
                    run.save_weights(folder / "best.safetensors", model.state_dict())
            model.train()
        log.step(step, values)
        if world.is_main and due:
            weights = {"model": model.state_dict()} | ({"ema": ema.module.state_dict()} if ema else {})
            state = {"optimizer": optimizer.state_dict(), "best": best, "wall_s": wall_s, "classes": data.classes}
            run.save_checkpoint(folder, step, weights, state)
        tick = time.perf_counter()
    log.close()
    if options.stop_at and options.stop_at < steps:
        log.say(f"stopped at step {options.stop_at} of {steps}; go on with --resume {folder}")
        return folder

    scores = classification.accuracy(model, val, recipe, world, workers=options.workers)
    scores |= {"best_top1": best["top1"]}
    if ema:
        averaged = classification.accuracy(ema.module, val, recipe, world, workers=options.workers)
        scores["ema_top1"] = averaged["top1"]
    if recipe.train_accuracy:
        trained = classification.accuracy(model, data, recipe, world, workers=options.workers)
        scores |= {"train_top1": trained["top1"], "gap": trained["top1"] - scores["top1"]}
    if world.is_main:
        run.export_timm(
            model, folder / "model", side=size, crop=recipe.eval_crop, classes=data.classes,
            model_args={"img_size": size, **recipe.model_args},
        )
        if draw:
            figures.draw(folder, model, val, recipe)
        run.write_results(folder, {
            "paper": "spach", "recipe": name,
            "data": classification.describe(recipe, options.data, data, val),
            "metrics": classification.metrics(scores, recipe, PAPER.comparable(name, recipe, data, val)),
            "params": params, "flops": flops, "wall_s": wall_s, "peak_mem_bytes": run.peak_memory_bytes(),
            "throughput": seen / (wall_s - began) if seen else None, "seed": options.seed,
        })
    return folder


if __name__ == "__main__":
    run.main(main)
