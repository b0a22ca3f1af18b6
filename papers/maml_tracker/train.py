"""Trains a detector to become a tracker: ``python -m papers.maml_tracker.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/maml_tracker/ (see common/run.py). The recipes
comparison* train many (comparison.py).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import loader, pairs
from common.metrics import trackers
from papers.maml_tracker import figures
from papers.maml_tracker.data import VideoSets, sets, targets
from papers.maml_tracker.evaluate import PAPER
from papers.maml_tracker.maml import MAML, multi_step_weights
from papers.maml_tracker.model import build
from papers.maml_tracker.recipes import RECIPES, Recipe


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.maml_tracker.train")
    world = run.start_world(options)
    if recipe.contenders:
        from papers.maml_tracker import comparison

        folder = comparison.compare(name, recipe, options, world)
    else:
        folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


def train(name: str, recipe: Recipe, options: run.Options, world: run.World, report: bool = True) -> Path:
    """One run, from the data to results.json; returns its folder. With `report` the test sequences are tracked, beside
    the baselines, and pictures drawn."""
    if options.compile:
        raise run.UserError("torch.compile cannot differentiate twice: train without --compile; tracking has --speed")
    root = trackers.data_folder(recipe, options.data)
    steps_per_epoch = loader.steps_per_epoch(recipe.pairs_per_epoch, recipe.batch)
    detection_steps = recipe.detection_epochs * steps_per_epoch
    steps = detection_steps + recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)

    run.seed_all(options.seed)
    maml = build(recipe, imagenet=recipe.imagenet).to(world.device)
    if recipe.start:
        load_detector(maml, Path(recipe.start))
    flops = run.multiply_adds(maml.detector, torch.zeros(1, 3, recipe.crop_px, recipe.crop_px, device=world.device))
    optimizer = torch.optim.SGD(
        [{"params": [p for p in maml.detector.parameters() if p.requires_grad], "lr": recipe.lr},
         {"params": list(maml.rates.parameters()), "lr": recipe.rate_lr, "weight_decay": 0.0}],
        momentum=recipe.momentum, weight_decay=recipe.weight_decay,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]

    folder = run.open_run("maml_tracker", name, recipe, options, world)
    data = pairs.open_data(recipe, root, folder / "unreadable.txt" if world.is_main else None)
    start, wall_s = 0, 0.0
    if options.resume and (checkpoint := run.load_checkpoint(folder)):
        start, weights, state = checkpoint
        maml.load_state_dict(weights["model"])
        optimizer.load_state_dict(state["optimizer"])
        wall_s = state["wall_s"]

    samples = pairs.Pairs(
        data.train, VideoSets(recipe), length=recipe.pairs_per_epoch, max_gap=recipe.max_gap,
        negatives=recipe.negatives, weights=trackers.shares(recipe), report=folder / "unreadable.txt",
    )
    batches = pairs.pairs_loader(
        samples, recipe.batch, min(steps, options.stop_at or steps), seed=options.seed, start=start,
        rank=world.rank, world=world.size, workers=options.workers,
    )
    params = sum(p.numel() for p in maml.parameters())
    adapted = sum(p.numel() for p in maml.theta_0().values())
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.head} on {recipe.backbone}: {params:,} parameters, {adapted:,} of them adapted online at "
        f"{len(list(maml.rates.parameters()))} tensors of rates, {flops / 1e6:,.0f} M multiply-adds per crop\n"
        f"{data.describe(recipe.dataset)}, from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} pairs"
        f"{f' in {chunks} chunks' if chunks > 1 else ''} (meta-training: one after another), learning rates "
        f"{peaks[0]:.3g} and {peaks[1]:.3g} (of the rates), steps {start} to {steps}: detection to {detection_steps}, "
        f"then meta-training\nrun folder {folder}"
    )

    maml.train()
    network, stage = None, None
    seen, began, tick = 0, wall_s, time.perf_counter()
    for step, batch in enumerate(batches, start + 1):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        k = recipe.inner_steps if step > detection_steps else 0
        if stage != (k > 0):
            stage = k > 0
            maml.rates.requires_grad_(stage and recipe.rate_lr > 0)
            network = DistributedDataParallel(maml) if world.size > 1 else maml
        passed = (step - 1 - detection_steps) / steps_per_epoch
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * 0.1 ** sum(passed >= epoch for epoch in recipe.drop_epochs)
        gamma = multi_step_weights(recipe.multi_step, k, max(passed, 0) / max(recipe.epochs, 1))
        share = recipe.batch // world.size
        if k:  # every video has parameters of its own, and its graph goes before the next one's comes
            parts = (sets(batch, row, world.device) for row in range(share))
            count = share
        else:
            rows = [slice(part[0], part[-1] + 1) for part in torch.arange(share).chunk(chunks)]
            parts = ((None, targets(batch, part, world.device)) for part in rows)
            count = len(rows)

        losses = torch.zeros(k + 1, device=world.device)
        for i, (support, target) in enumerate(parts, 1):
            if world.size > 1:
                network.require_backward_grad_sync = i == count
            with world.autocast():
                part = network(support, target, gamma) * len(target.x) / share
            (part * gamma.to(part)).sum().backward()
            losses += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(maml.parameters(), recipe.clip_norm or math.inf).item()
        if not math.isfinite(norm):  # the same on all ranks, and before the weights are touched
            raise run.UserError(
                f"the gradient is not finite at step {step} (losses after 0 to {k} gradient steps {losses.tolist()}); "
                f"the last good checkpoint is in {folder}. Lower --rate or --lr, or set --clip-norm"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        maml.clamp_rates()

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            mean = [world.mean(loss) for loss in losses]
            values = {
                "loss": sum(w * loss for w, loss in zip(gamma.tolist(), mean)),
                **({f"after_{j}": loss for j, loss in enumerate(mean)} if k else {}),
                "rate": torch.cat([rate.detach().flatten() for rate in maml.rates.values()]).mean().item(),
                "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "pairs_per_s": seen / (wall_s - began),
            }
        rest = step % steps_per_epoch
        if data.test and recipe.val_pairs and (rest == 0 or step == steps):
            curve = validate(maml, data, recipe, world, options.workers)
            values |= {f"val/after_{j}": loss for j, loss in enumerate(curve)}
            maml.train()
        log.step(step, values)
        if world.is_main and step == detection_steps:
            run.save_weights(folder / "detection.safetensors", maml.state_dict())
        due = step % options.checkpoint_every == 0 if options.checkpoint_every else rest == 0
        if world.is_main and (due or step in (steps, options.stop_at)):
            state = {"optimizer": optimizer.state_dict(), "wall_s": wall_s}
            run.save_checkpoint(folder, step, {"model": maml.state_dict()}, state)
        tick = time.perf_counter()
    log.close()
    if options.stop_at and options.stop_at < steps:
        log.say(f"stopped at step {options.stop_at} of {steps}; go on with --resume {folder}")
        return folder

    if world.size > 1:
        dist.barrier()  # the checkpoint is whole before anyone reads it
    rows = trackers.compare(PAPER, folder, data.test, world, each=bool(recipe.held_out)) if report else []
    rows = rows or [run.metric("loss", run.read_log(folder)[-1]["loss"], "")]
    if world.is_main:
        if report:
            figures.draw(folder, maml, data, recipe, world)
        run.write_results(folder, {
            "paper": "maml_tracker", "recipe": name, "data": data.describe(recipe.dataset), "metrics": rows,
            "params": params, "flops": flops, "wall_s": wall_s, "peak_mem_bytes": run.peak_memory_bytes(),
            "throughput": seen / (wall_s - began) if seen else None, "seed": options.seed,
        })
    return folder


def load_detector(maml: MAML, path: Path) -> None:
    """The detector of a file of weights; its rates, if it has some, are left where they are."""
    weights = {
        name.removeprefix("detector."): tensor
        for name, tensor in run.load_weights(path).items() if name.startswith("detector.")
    }
    try:
        maml.detector.load_state_dict(weights)
    except RuntimeError as error:
        raise run.UserError(f"{path} does not fit the recipe's detector: {' '.join(str(error).split())}") from None


def validate(
    maml: MAML, data: pairs.Data, recipe: Recipe, world: run.World, workers: int = 0, steps: int | None = None
) -> list[float]:
    """Mean losses on the target images of all validation pairs after 0..k gradient steps on their support sets. The
    pairs are the same every time; in all of them the target is there."""
    maml.eval()
    samples = pairs.Pairs(
        {"test": data.test}, VideoSets(recipe), length=recipe.val_pairs, max_gap=recipe.max_gap, limit=0
    )
    mine = range(world.rank, len(samples), world.size)
    batches = torch.utils.data.DataLoader(samples, batch_sampler=[[(i, i)] for i in mine], num_workers=workers)
    gamma = torch.ones((recipe.first_steps if steps is None else steps) + 1)
    total = torch.zeros(len(gamma), device=world.device, dtype=torch.float64)
    for batch in loader.progress(batches, "validating", active=world.is_main):
        with torch.no_grad(), world.autocast():
            total += maml(*sets(batch, 0, world.device), gamma)
    if world.size > 1:
        dist.all_reduce(total)
    return (total / len(samples)).tolist()


if __name__ == "__main__":
    run.main(main)
