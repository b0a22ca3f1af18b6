"""Trains a detector to become a tracker: ``python -m papers.maml_tracker.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/maml_tracker/ (common/run/folder.py). The recipes
comparison* train many (compare.py).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import loader, pairs
from common.metrics import trackers
from papers.maml_tracker import figures
from papers.maml_tracker.data import support_set, target_set, training_batches
from papers.maml_tracker.evaluate import PAPER, build, validate
from papers.maml_tracker.maml import MAML, multi_step_weights
from papers.maml_tracker.recipes import Recipe


def train(name: str, recipe: Recipe, options: run.Options, world: run.World, report: bool = True) -> Path:
    """One run, from the data to results.json; returns its folder. With `report` the test sequences are tracked, beside
    the baselines, and pictures drawn."""
    if options.compile:
        raise run.UserError("torch.compile cannot differentiate twice: train without --compile; tracking has --speed")
    root = trackers.data_folder(recipe, options.data)
    data = pairs.open_data(recipe, root, options.missing)  # before any weights are sought
    steps_per_epoch = loader.steps_per_epoch(recipe.pairs_per_epoch, recipe.batch)
    detection_steps = recipe.detection_epochs * steps_per_epoch
    steps = detection_steps + recipe.epochs * steps_per_epoch
    chunks, per_rank = run.accumulation(recipe.batch, world, options.micro_batch), recipe.batch // world.size

    run.seed_all(options.seed)
    maml = build(recipe, imagenet=recipe.imagenet).to(world.device)
    if recipe.init:
        load_detector(maml, Path(recipe.init))
    maml.detector.backbone.requires_grad_(not recipe.frozen)
    params = sum(p.numel() for p in maml.parameters())
    flops = run.multiply_adds(maml.detector, torch.zeros(1, 3, recipe.crop_px, recipe.crop_px, device=world.device))
    optimizer = torch.optim.SGD(
        [{"params": [p for p in maml.detector.parameters() if p.requires_grad], "lr": recipe.lr},
         {"params": list(maml.rates.parameters()), "lr": recipe.rate_lr, "weight_decay": 0.0}],
        momentum=recipe.momentum, weight_decay=recipe.weight_decay,
    )

    folder = run.open_run("maml_tracker", name, recipe, options, world)
    if world.is_main:
        data.name_damaged(folder / "unreadable.txt")
    start, state = run.restore(folder, options, optimizer, model=maml)
    clock = run.Clock(
        options, steps=steps, batch=recipe.batch, per_epoch=steps_per_epoch, start=start,
        eval_every=recipe.eval_every or steps_per_epoch, wall_s=state.get("wall_s", 0.0),
    )
    batches = training_batches(data, recipe, options, world, start, clock.end, folder / "unreadable.txt")
    log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)
    log.say(
        f"{describe(recipe, maml)}, {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per crop\n"
        f"{data.describe(recipe.dataset)}, from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {per_rank} pairs"
        f"{f' in {chunks} chunks' if chunks > 1 else ''} (meta-training: one after another), learning rates "
        f"{recipe.lr:.3g} and {recipe.rate_lr:.3g} (of the rates), steps {start} to {steps}: detection to "
        f"{detection_steps}, then meta-training\nrun folder {folder}"
    )

    def evaluate() -> dict[str, float]:
        return {f"after_{j}": x for j, x in enumerate(validate(maml, data, recipe, world, options.workers))}

    if clock.eval_due:
        log.scores(start, evaluate)
    maml.train()
    network = None
    for step, batch in clock.over(batches):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        k = recipe.inner_steps if step > detection_steps else 0
        if network is None or step == detection_steps + 1:  # DDP asks once which parameters will have gradients
            maml.rates.requires_grad_(k > 0 and recipe.rate_lr > 0)
            if k:
                maml.detector.backbone.requires_grad_(False)
            network = DistributedDataParallel(maml) if world.size > 1 else maml
        epoch = (step - 1 - detection_steps) / steps_per_epoch  # of meta-training
        for group, peak in zip(optimizer.param_groups, (recipe.lr, recipe.rate_lr)):
            group["lr"] = peak * 0.1 ** sum(epoch >= milestone for milestone in recipe.milestones)
        gamma = multi_step_weights(recipe.multi_step, k, max(epoch, 0) / max(recipe.epochs, 1))

        # In meta-training every video has parameters of its own, and its graph goes before the next one's comes.
        size = 1 if k else math.ceil(per_rank / chunks)
        loss = torch.zeros(k + 1, device=world.device)  # on target images, after 0 to k gradient steps
        for first in range(0, per_rank, size):
            support = support_set(batch, first, world.device) if k else None
            target = target_set(batch, slice(first, first + size), world.device)
            if world.size > 1:
                network.require_backward_grad_sync = first + size >= per_rank
            with world.autocast():
                part = network(support, target, gamma) * len(target.x) / per_rank
            sum(weight * each for weight, each in zip(gamma.tolist(), part)).backward()
            loss += part.detach()
        norm = run.clip_gradients(
            maml.parameters(), recipe.clip_norm, step=step, loss=loss, folder=folder, hint="--rate or --lr"
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        maml.clamp_rates()
        clock.stop()

        log.step(step, {
            **outer_objective(loss, gamma, world), "rate": maml.mean_rate(), "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": norm, "samples_per_s": clock.rate,
        } if clock.log_due else None)
        if world.is_main and step == detection_steps:
            run.save_weights(folder / "detection.safetensors", maml.state_dict())
        if world.is_main and clock.save_due:
            state = {"optimizer": optimizer.state_dict(), "wall_s": clock.wall_s}
            run.save_checkpoint(folder, step, {"model": maml.state_dict()}, state)
        if clock.eval_due:
            log.scores(step, evaluate)
            maml.train()
    log.close(clock.farewell(folder) if clock.stopped else "")
    if clock.stopped:
        return folder

    world.wait()  # the checkpoint is whole before anyone reads it
    rows = trackers.compare(PAPER, folder, data.test, world, each=bool(recipe.held_out)) if report else []
    if world.is_main:
        losses = [row["loss"] for row in run.read_log(folder) if "loss" in row]
        run.finish(
            folder, "maml_tracker", name, options, data=data.describe(recipe.dataset),
            metrics=rows or [run.metric("loss", losses[-1], "")], params=params, flops=flops, wall_s=clock.wall_s,
            throughput=clock.rate,
            then={"pictures": lambda: figures.draw(folder, maml, data, recipe, world)} if report else {},
        )
    return folder


def outer_objective(loss: torch.Tensor, gamma: torch.Tensor, world: run.World) -> dict[str, float]:
    """The outer objective, and what it is the weighted sum of: the losses after 0 to k steps, over all processes."""
    means = [world.mean(each) for each in loss]
    steps = {f"after_{j}": mean for j, mean in enumerate(means)} if len(means) > 1 else {}
    return {"loss": sum(weight * mean for weight, mean in zip(gamma.tolist(), means)), **steps}


def describe(recipe: Recipe, maml: MAML) -> str:
    """What is adapted in every video, in words."""
    adapted = sum(p.numel() for p in maml.theta_0().values())
    rates = len(list(maml.rates.parameters()))
    return f"{recipe.head} on {recipe.backbone}: {adapted:,} parameters adapted online at {rates} tensors of rates"


def load_detector(maml: MAML, path: Path) -> None:
    """The detector of a file of weights; its rates, if it has some, are left where they are."""
    weights = {
        name.removeprefix("detector."): tensor
        for name, tensor in run.load_weights(path).items() if name.startswith("detector.")
    }
    run.fit(maml.detector, weights, f"{path} does not fit the recipe's detector")


if __name__ == "__main__":
    run.through_the_door(__package__)
