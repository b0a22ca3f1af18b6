"""Trains MaskCo or MoCo v2: ``python -m papers.maskco.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/maskco/ (see common/run/folder.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import loader
from papers.maskco import data, evaluate, figures
from papers.maskco.export import export, load_backbone
from papers.maskco.recipes import Recipe


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    root = evaluate.data_folder(recipe, options.data)
    pictures, val = (data.open_pictures(root, split) for split in ("train", "val"))
    labelled = evaluate.probe_data(recipe, root, world)
    about = evaluate.describe(recipe, options.data, pictures, val)
    steps_per_epoch = loader.steps_per_epoch(len(pictures), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    views = data.Views(recipe)

    run.seed_all(options.seed)
    model = evaluate.build(recipe, len(pictures.classes))
    if recipe.init:
        load_backbone(model.backbone, recipe.init)
    model.to(world.device, memory_format=torch.channels_last)
    flops = run.multiply_adds(model, *evaluate.inputs(recipe))
    learned = [p for p in model.parameters() if p.requires_grad]  # the keys' networks only follow
    params = sum(p.numel() for p in learned)
    optimizer = torch.optim.SGD(learned, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    schedule = evaluate.scheduler(optimizer, recipe, steps_per_epoch)

    folder = run.open_run("maskco", name, recipe, options, world)
    start, state = run.restore(folder, options, optimizer, classes=pictures.classes, model=model)
    if options.compile:
        model.compile()
    # Every process has its own running statistics, as in MoCo; they are averaged where they are used or kept.
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch,
        eval_every=recipe.eval_every or steps_per_epoch, start=start, wall_s=state.get("wall_s", 0.0),
    )
    batches = loader.train_loader(
        pictures, views, recipe.batch, clock.end, seed=options.seed, start=start, rank=world.rank, world=world.size,
        workers=options.workers, report=folder / "unreadable.txt",
    )
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"{recipe.method} {recipe.backbone}: {params:,} learned parameters, {flops / 1e6:,.0f} M multiply-adds\n"
        f"{about}\n{clock.about(world, chunks, 'pictures')}, learning rate {recipe.lr:.3g}\nrun folder {folder}"
    )
    contrast = partial(evaluate.contrast, model, val, recipe, world, workers=options.workers)
    if clock.eval_due:  # a kill may have come between checkpoint and evaluation
        log.scores(start, contrast)

    fallbacks = state.get("fallbacks", torch.zeros((), dtype=torch.float64)) * world.is_main
    model.train()
    for step, (sample, _) in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        fallbacks += sample["fallback"].sum() if "fallback" in sample else 0
        sample = evaluate.to(world.device, sample)

        model.update_keys()
        loss, right, keys = torch.zeros((), device=world.device), torch.zeros((), device=world.device), []
        for weight, *part in run.micro_batches(network, chunks, *sample.values()):
            with world.autocast():
                logits, new = network(**dict(zip(sample, part)))
            keys.append(new)
            target = torch.zeros(len(logits), dtype=torch.long, device=world.device)  # the positive is column 0
            partial_loss = F.cross_entropy(logits.float(), target) * weight
            partial_loss.backward()
            loss += partial_loss.detach()
            right += (logits.argmax(1) == target).float().mean() * weight
        norm = run.clip_gradients(learned, recipe.clip_norm, step=step, loss=loss, folder=folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.enqueue(torch.cat(keys))  # after the loss: no picture is its own negative
        clock.stop()

        values = {}
        if clock.log_due:
            values = {"loss": world.mean(loss), "top1": 100 * world.mean(right), "lr": optimizer.param_groups[0]["lr"],
                      "grad_norm": norm, "samples_per_s": clock.rate}
            if recipe.method == "maskco":  # so far, of all processes
                values["fallbacks"] = run.add_up(fallbacks.to(world.device, copy=True)).item()
        log.step(step, values)
        if world.size > 1 and (clock.save_due or clock.eval_due):
            distribute_bn(model, world.size, reduce=True)
        if clock.save_due:  # the first process counts for all of them
            fallbacks = run.add_up(fallbacks.to(world.device)).cpu() * world.is_main
        if world.is_main and clock.save_due:
            state = {"optimizer": optimizer.state_dict(), "wall_s": clock.wall_s, "classes": pictures.classes,
                     "fallbacks": fallbacks}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        if clock.eval_due:
            log.scores(step, contrast)
            model.train()
    if clock.stopped:
        log.close(clock.farewell(folder))
        return folder

    scores = log.scores(steps, contrast)
    log.close()
    if world.is_main:  # before the probe, which may fail
        export(model.backbone, recipe.backbone, folder / "model", recipe.input_size_px, recipe.eval_crop)
    if labelled:
        run.seed_all(options.seed)
        untrained = evaluate.build(recipe, len(pictures.classes)).backbone.to(world.device)
        judged = evaluate.probe_scores(model.backbone, *labelled, recipe, world, workers=options.workers)
        found = evaluate.probe_scores(untrained, *labelled, recipe, world, workers=options.workers)
        judged |= {f"random_{key}": value for key, value in found.items()}
        scores = judged | {key: value for key, value in scores.items() if key != "contrast_loss"}
    if world.is_main:
        run.finish(
            folder, "maskco", name, options, data=about, metrics=evaluate.metrics(scores), params=params, flops=flops,
            wall_s=clock.wall_s, throughput=clock.rate,
            then={"pictures": lambda: figures.draw(folder, model, val, recipe)},
        )
    return folder


if __name__ == "__main__":
    run.through_the_door(__package__)
