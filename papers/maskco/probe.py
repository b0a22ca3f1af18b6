"""A linear classifier on a frozen backbone, MoCo's protocol: ``python -m papers.maskco imagenet_linear --init RUN``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import images, loader
from common.metrics import classification
from papers.maskco import evaluate, figures
from papers.maskco.export import export, load_backbone
from papers.maskco.recipes import Recipe


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one classifier; returns the run's folder."""
    root = evaluate.data_folder(recipe, options.data)
    pictures, val = images.open_both(root, subset=options.val_classes == "subset")
    about = evaluate.describe(recipe, options.data, pictures, val)
    steps_per_epoch = loader.steps_per_epoch(len(pictures), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    transform = images.train_transform(recipe.input_size_px, crop_scale=recipe.crop_scale, flip=recipe.flip)

    run.seed_all(options.seed)
    model = evaluate.build(recipe, len(pictures.classes))
    if recipe.init:
        load_backbone(model.backbone, recipe.init)
    model.to(world.device, memory_format=torch.channels_last)
    flops = run.multiply_adds(model, *evaluate.inputs(recipe))
    learned = list(model.fc.parameters())
    params = sum(p.numel() for p in learned)
    optimizer = torch.optim.SGD(learned, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    schedule = evaluate.scheduler(optimizer, recipe, steps_per_epoch)

    folder = run.open_run("maskco", name, recipe, options, world)
    start, state = run.restore(folder, options, optimizer, classes=pictures.classes, model=model)
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch,
        eval_every=recipe.eval_every or steps_per_epoch, start=start, wall_s=state.get("wall_s", 0.0),
    )
    batches = loader.train_loader(
        pictures, transform, recipe.batch, clock.end, seed=options.seed, start=start, rank=world.rank, world=world.size,
        workers=options.workers, report=folder / "unreadable.txt",
    )
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"linear {recipe.backbone}: {params:,} learned parameters, {flops / 1e6:,.0f} M multiply-adds\n"
        f"{about} of {len(pictures.classes)} classes\n"
        f"{clock.about(world, chunks, 'pictures')}, learning rate {recipe.lr:.3g}\nrun folder {folder}"
    )
    accuracy = partial(classification.accuracy, model, val, recipe, world, workers=options.workers)
    if clock.eval_due:  # a kill may have come between checkpoint and evaluation
        log.scores(start, accuracy)

    model.train()
    for step, (pixels, labels) in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        pixels, labels = (x.to(world.device, non_blocking=True) for x in (pixels, labels))

        loss, right = torch.zeros((), device=world.device), torch.zeros((), device=world.device)
        for weight, x, y in run.micro_batches(network, chunks, pixels, labels):
            with world.autocast():
                logits = network(x)
            partial_loss = F.cross_entropy(logits.float(), y) * weight
            partial_loss.backward()
            loss += partial_loss.detach()
            right += (logits.argmax(1) == y).float().mean() * weight
        norm = run.clip_gradients(learned, recipe.clip_norm, step=step, loss=loss, folder=folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop()

        values = {}
        if clock.log_due:
            values = {"loss": world.mean(loss), "top1": 100 * world.mean(right), "lr": optimizer.param_groups[0]["lr"],
                      "grad_norm": norm, "samples_per_s": clock.rate}
        log.step(step, values)
        if world.is_main and clock.save_due:
            state = {"optimizer": optimizer.state_dict(), "wall_s": clock.wall_s, "classes": pictures.classes}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        if clock.eval_due:
            log.scores(step, accuracy)
            model.train()
    if clock.stopped:
        log.close(clock.farewell(folder))
        return folder

    scores = log.scores(steps, accuracy)
    log.close()
    if world.is_main:
        run.finish(
            folder, "maskco", name, options, data=about, metrics=evaluate.metrics(scores), params=params, flops=flops,
            wall_s=clock.wall_s, throughput=clock.rate,
            then={"model": lambda: export(model.backbone, recipe.backbone, folder / "model", recipe.input_size_px,
                                          recipe.eval_crop),
                  "pictures": lambda: figures.draw(folder, model, val, recipe)},
        )
    return folder
