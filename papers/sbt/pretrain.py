"""Trains the single-image path as a classifier to start trackers from: ``python -m papers.sbt.train pretrain_tiny``.

All four stages train, by DeiT's recipe; ``--init RUN`` of a tracking recipe then takes the first three
(official.load_backbone). The run's model/ is timm's to load: ``timm.create_model("local-dir:RUN/model",
pretrained=True)``. ``python -m papers.sbt.pretrain CHECKPOINT --data FOLDER`` gives the accuracy of a run or a file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import images, loader
from common.metrics import classification
from common.run.timm import export_timm
from papers.sbt.figures import draw_classifier
from papers.sbt.model import VARIANTS
from papers.sbt.recipes import RECIPES, Pretrain


def build(recipe: Pretrain, classes: int) -> torch.nn.Module:
    """The recipe's classifier, at random."""
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    return timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)


PAPER = classification.Paper(
    "sbt", {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Pretrain)}, build,
    lambda weights, _model: weights,
)


def train(name: str, recipe: Pretrain, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one classifier; returns its folder."""
    root = classification.data_folder(recipe, options.data)
    data, val = images.open_both(root, subset=options.val_classes == "subset")
    classes, size_px = len(data.classes), recipe.input_size_px
    steps_per_epoch = loader.steps_per_epoch(len(data), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks, per_rank = run.accumulation(recipe.batch, world, options.micro_batch), recipe.batch // world.size
    mixup = images.make_mixup(
        recipe.mixup, recipe.cutmix, smoothing=recipe.label_smoothing, classes=classes, per_rank=per_rank
    )
    smoothing = 0.0 if mixup else recipe.label_smoothing  # mixup smooths its targets itself

    run.seed_all(options.seed)
    model = build(recipe, classes)
    PAPER.start_from(recipe.init, model)
    model.to(world.device, memory_format=torch.channels_last)
    params = sum(p.numel() for p in model.parameters())
    flops = run.multiply_adds(model, torch.empty(1, 3, size_px, size_px, device="meta"))
    lr = recipe.lr * recipe.batch / 512  # DeiT's rule
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=recipe.weight_decay)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=recipe.min_lr, warmup_t=int(recipe.warmup_epochs * steps_per_epoch),
        warmup_lr_init=recipe.warmup_lr, t_in_epochs=False,
    )

    folder = run.open_run("sbt", name, recipe, options, world)
    start, state = run.restore(folder, options, optimizer, classes=data.classes, model=model)
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch, eval_every=steps_per_epoch, start=start,
        wall_s=state.get("wall_s", 0.0),
    )
    transform = images.train_transform(
        size_px, crop_scale=recipe.crop_scale, flip=recipe.flip, policy=recipe.policy, erase=recipe.erase
    )
    batches = loader.train_loader(
        data, transform, recipe.batch, clock.end, seed=options.seed, start=start, rank=world.rank, world=world.size,
        workers=options.workers, report=folder / "unreadable.txt",
    )
    about = classification.describe(recipe, options.data, data, val)
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"{recipe.model} as a classifier: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per image\n"
        f"{about}, of {classes} classes, from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {per_rank} images"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, peak learning rate {lr:.3g}, steps {start} to {steps}\n"
        f"run folder {folder}"
    )

    evaluate = partial(classification.accuracy, model, val, recipe, world, workers=options.workers)
    if clock.eval_due:  # a run killed before its evaluation owes it
        log.scores(start, evaluate)
    model.train()
    for step, (pixels, targets) in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        pixels = pixels.to(world.device, non_blocking=True, memory_format=torch.channels_last)
        targets = targets.to(world.device, non_blocking=True)
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
        clock.stop()

        rates = {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "samples_per_s": clock.rate}
        log.step(step, {"loss": world.mean(loss), **rates} if clock.log_due else None)
        if world.is_main and clock.save_due:
            state = {"optimizer": optimizer.state_dict(), "wall_s": clock.wall_s, "classes": data.classes}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        if clock.eval_due:
            log.scores(step, evaluate)
            model.train()
    if clock.stopped:
        log.close(clock.farewell(folder))
        return folder

    scores = log.scores(steps, evaluate)
    log.close()
    if world.is_main:
        args, crop = recipe.model_args, recipe.eval_crop
        run.finish(
            folder, "sbt", name, options, data=about, params=params, flops=flops, wall_s=clock.wall_s,
            metrics=classification.metrics(scores, recipe, comparable=False), throughput=clock.rate, then={
                "model": lambda: export_timm(
                    model, folder / "model", side=size_px, crop=crop, classes=data.classes, model_args=args
                ),
                "pictures": lambda: draw_classifier(folder, model, val, recipe),
            },
        )
    return folder


if __name__ == "__main__":
    run.main(lambda: classification.main(PAPER))
