"""Trains CtP, a baseline or a recognizer: ``python -m papers.ctp.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/ctp/ (see common/run/folder.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import loader
from papers.ctp import data, evaluate, figures
from papers.ctp.model import tracking_losses
from papers.ctp.official import export, load_backbone
from papers.ctp.recipes import Recipe


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    if world.amp is torch.bfloat16 and world.device.type == "cpu":
        raise run.UserError(
            "--precision bf16 on a CPU: the weight gradients of torch's 3-D convolutions are wrong there; leave it fp32"
        )
    videos = evaluate.open_split(recipe, options.data, "train", options.missing)
    val = evaluate.open_split(recipe, options.data, "val", None if recipe.method == "recognize" else options.missing)
    if recipe.method == "recognize" and options.val_classes == "all":
        evaluate.expect_all_classes(val)
    about = evaluate.describe(recipe, options.data, videos, val)
    passed_over = evaluate.passed_over(training=videos, validation=val)
    if recipe.downstream:
        evaluate.downstream(recipe, init="")  # is there one?
    clips = data.training_clips(videos, recipe)
    steps_per_epoch = loader.steps_per_epoch(len(clips), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    run.seed_all(options.seed)
    model = evaluate.build(recipe, len(videos.classes))
    if recipe.init:
        load_backbone(model.backbone, recipe.init)
    model.to(world.device, memory_format=torch.channels_last_3d)
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    flops = run.multiply_adds(model, *evaluate.inputs(recipe))
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)

    folder = run.open_run("ctp", name, recipe, options, world)
    kind = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[recipe.optimizer]
    optimizer = kind(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = scheduler(optimizer, recipe, steps_per_epoch)
    start, state = run.restore(folder, options, optimizer, classes=videos.classes, model=model)
    if options.compile:
        model.compile()
    # Where they are not synchronized, running statistics are each process's own, and averaged when used or kept.
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch,
        eval_every=recipe.eval_every or steps_per_epoch, start=start, wall_s=state.get("wall_s", 0.0),
    )
    batches = loader.train_loader(
        clips, loader.identity, recipe.batch, clock.end, seed=options.seed, start=start, rank=world.rank,
        world=world.size, workers=options.workers, report=folder / "unreadable.txt",
    )
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"{recipe.method} {recipe.backbone}: {params:,} parameters, {flops / 1e9:,.2f} G multiply-adds per sample\n"
        f"{about} of {len(val.classes)} classes\n{passed_over}"
        f"{clock.about(world, chunks, 'videos')}, learning rate {recipe.lr:.3g}\nrun folder {folder}"
    )
    scores = partial(evaluate.trained, model, val, recipe, world, workers=options.workers)
    if clock.eval_due:  # a kill may have come between checkpoint and evaluation
        log.scores(start, scores)

    model.train()
    for step, (sample, labels) in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        sample, labels = evaluate.to(world.device, sample), labels.to(world.device, non_blocking=True)

        if recipe.method == "moco":
            model.update_keys()
        losses: dict[str, Tensor] = {}
        for weight, *part, y in run.micro_batches(network, chunks, *sample.values(), labels):
            with world.autocast():
                terms = losses_of(recipe, network, dict(zip(sample, part)), y)
            (sum(terms.values()) * weight).backward()
            for key, term in terms.items():
                losses[key] = losses.get(key, 0) + term.detach() * weight
        loss = sum(losses.values())
        norm = run.clip_gradients(model.parameters(), recipe.clip_norm, step=step, loss=loss, folder=folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if recipe.method == "moco":
            model.enqueue()
        clock.stop()

        values = {}
        if clock.log_due:
            shown = {"loss": loss} | (losses if len(losses) > 1 else {})
            values = {key: world.mean(value) for key, value in shown.items()}
            values |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "samples_per_s": clock.rate}
        log.step(step, values)
        if world.size > 1 and (clock.save_due or clock.eval_due):
            distribute_bn(model, world.size, reduce=True)
        if world.is_main and clock.save_due:
            state = {"optimizer": optimizer.state_dict(), "wall_s": clock.wall_s, "classes": videos.classes}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        if clock.eval_due:
            log.scores(step, scores)
            model.train()
    if clock.stopped:
        log.close(clock.farewell(folder))
        return folder

    found = log.scores(steps, scores)
    log.close()
    world.wait()  # the checkpoint is whole before anyone starts from it
    if recipe.downstream:
        for label, init in (("", folder), ("random ", "")):
            home = folder / "downstream" / (label.strip() or "ctp")
            worth = evaluate.transfer_scores(init, home, recipe, options, world, train)
            found |= {f"{label}{key}": value for key, value in worth.items()}
    if world.is_main:
        run.finish(
            folder, "ctp", name, options, data=about, metrics=evaluate.metrics(found, recipe), params=params,
            flops=flops, wall_s=clock.wall_s, throughput=clock.rate, table=passed_over,
            then={"model": lambda: export(model.backbone, recipe.backbone, folder / "model"),
                  "pictures": lambda: figures.draw(folder, model, val, recipe)},
        )
    return folder


def losses_of(recipe: Recipe, network: nn.Module, sample: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The terms that are added up: two of tracking, or the cross-entropy of whatever is to be told apart."""
    if recipe.method == "ctp":
        paths = sample["trajectories"]
        predictions = network(sample["clip"], paths[:, :, 0])
        return tracking_losses(predictions, paths, targets=evaluate.targets(recipe))
    logits = network(sample["clip"])
    return {"cross_entropy": F.cross_entropy(logits.float(), sample.get("label", labels))}


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Scheduler:
    """timm's, to be asked with the number of steps taken so far: a warm-up, then decays at `milestones` or a cosine.

    The warm-up is part of the epochs, as in the authors' runs.
    """
    warmup = {"warmup_t": recipe.warmup_steps, "warmup_lr_init": recipe.lr / 10, "t_in_epochs": False}
    if not recipe.milestones:
        return CosineLRScheduler(optimizer, t_initial=recipe.epochs * steps_per_epoch, **warmup)
    decays = [epoch * steps_per_epoch + 1 for epoch in recipe.milestones]  # timm's begin one step before `decay_t`
    return MultiStepLRScheduler(optimizer, decay_t=decays, decay_rate=0.1, warmup_prefix=False, **warmup)


if __name__ == "__main__":
    run.through_the_door(__package__)
