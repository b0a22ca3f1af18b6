"""Trains SBT, or a correlation tracker on its features: ``python -m papers.sbt.train tiny``, also under torchrun."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import crops, loader, pairs
from common.metrics import trackers
from papers.sbt import figures, loss
from papers.sbt.data import training_pairs, validation_pairs
from papers.sbt.evaluate import PAPER, build, crop_shapes, validate
from papers.sbt.official import init_weights, load_backbone
from papers.sbt.recipes import Recipe


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, tracks the test sequences and reports one run; returns its folder."""
    root = trackers.data_folder(recipe, options.data)
    # before any weights are sought
    data = pairs.open_data(recipe, root, missing=options.missing, coco_side_px=recipe.coco_side_px)
    world = world.in_full(recipe.float32)
    steps_per_epoch = loader.steps_per_epoch(recipe.pairs_per_epoch, recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)

    run.seed_all(options.seed)
    model = build(recipe)
    fresh = load_backbone(model.backbone, init_weights(recipe.init, recipe.model)) if recipe.init else None
    model.to(world.device, memory_format=torch.channels_last)
    grid = recipe.search_px // model.backbone.reduction
    params, flops = sum(p.numel() for p in model.parameters()), run.multiply_adds(model, *crop_shapes(recipe))
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    heads = list(model.head.parameters())
    peaks = [recipe.lr, recipe.lr * recipe.backbone_lr_scale]
    groups = [{"params": parameters, "lr": lr} for parameters, lr in zip((heads, backbone), peaks)]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    folder = run.open_run("sbt", name, recipe, options, world)
    if world.is_main:
        data.name_damaged(folder / "unreadable.txt")
    samples, val = training_pairs(recipe, data, folder / "unreadable.txt"), validation_pairs(recipe, data)
    start, state = run.restore(folder, options, optimizer, model=model)
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch,
        eval_every=recipe.eval_every or steps_per_epoch, start=start, wall_s=state.get("wall_s", 0.0),
    )
    batches = pairs.pairs_loader(
        samples, recipe.batch, clock.end, seed=options.seed, start=start, rank=world.rank, world=world.size,
        workers=options.workers,
    )
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"{recipe.model}, head {recipe.head}: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per pair\n"
        f"{data.describe(recipe.dataset)}, from {root}\n"
        + (f"backbone from {recipe.init}; at random stay {fresh or 'none of its tensors'}\n" if recipe.init else "")
        + f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} pairs"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, steps {start} to {steps}\n"
        f"learning rates {peaks[0]:.3g} (heads) and {peaks[1]:.3g}\nrun folder {folder}"
    )

    evaluate = partial(validate, model, val, recipe, world, options.workers)
    if clock.eval_due:  # a run killed before its evaluation owes it
        log.scores(start, evaluate)
    model.train()
    for step, batch in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        decay = 0.1 ** sum(step > epoch * steps_per_epoch for epoch in recipe.milestones)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * (min(1, step / max(1, recipe.warmup_steps)) * decay)
        template, search, box = (
            batch[key].to(world.device, non_blocking=True) for key in ("template", "search", "search_box")
        )
        positives = loss.assign(box, grid, recipe.authors_errors)
        totals = run.add_up(loss.totals(positives))  # of the global batch, so that its parts and processes add up to it

        terms = torch.zeros(4, device=world.device)
        for _, z, x, truth, positive in run.micro_batches(network, chunks, template, search, box, positives):
            with world.autocast():
                prediction = network(crops.normalize(z), crops.normalize(x))
            part = loss.terms(prediction, truth, positive, totals)
            (loss.total(part) * world.size).backward()  # DDP averages the gradients
            terms += torch.stack(part).detach()
        norm = run.clip_gradients(model.parameters(), recipe.clip_norm, step=step, loss=terms, folder=folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop()

        values = None
        if clock.log_due:
            means = loss.Terms(*(world.mean(term * world.size) for term in terms))
            rates = {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "samples_per_s": clock.rate}
            values = loss.named(means) | rates
        log.step(step, values)
        if world.is_main and clock.save_due:
            state = {"wall_s": clock.wall_s, "optimizer": optimizer.state_dict()}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        if clock.eval_due:
            log.scores(step, evaluate)
            model.train()
    if clock.stopped:
        log.close(clock.farewell(folder))
        return folder

    scores = log.scores(steps, evaluate)
    log.close()
    world.wait()  # the checkpoint is whole before anyone reads it
    rows = trackers.compare(PAPER, folder, data.test, world, each=bool(recipe.held_out))
    rows = rows or [run.metric("loss", run.read_log(folder)[-1]["loss"], "")]
    if scores:
        rows.append(run.metric("pairs iou", 100 * scores["iou"], "%"))
    if world.is_main:
        run.finish(
            folder, "sbt", name, options, data=data.describe(recipe.dataset), metrics=rows, params=params,
            flops=flops, wall_s=clock.wall_s, throughput=clock.rate,
            then={"pictures": lambda: figures.draw(folder, model, data, recipe, world)},
        )
    return folder


if __name__ == "__main__":
    run.through_the_door(__package__)
