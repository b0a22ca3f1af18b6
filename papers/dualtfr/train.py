"""Trains DualTFR: ``python -m papers.dualtfr.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/dualtfr/ (see common/run.py). The recipes
pretrain* train a branch as a classifier (pretrain.py), `ablation` trains many trackers (ablation.py).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common import run
from common.data import crops, loader, pairs
from common.metrics import trackers
from papers.dualtfr import figures, loss
from papers.dualtfr.data import transform
from papers.dualtfr.evaluate import PAPER, build, weights_of
from papers.dualtfr.recipes import RECIPES, Pretrain, Recipe
from papers.dualtfr.weights import load_branch


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.dualtfr.train")
    world = run.start_world(options)
    if isinstance(recipe, Pretrain):
        from papers.dualtfr import pretrain

        folder = pretrain.train(name, recipe, options, world)
    elif recipe.contenders:
        from papers.dualtfr import ablation

        folder = ablation.compare(name, recipe, options, world)
    else:
        folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


def train(name: str, recipe: Recipe, options: run.Options, world: run.World, report: bool = True) -> Path:
    """Trains, tracks the test sequences and reports one run, with baselines and pictures if `report`; returns its
    folder."""
    root = trackers.data_folder(recipe, options.data)
    steps_per_epoch = loader.steps_per_epoch(recipe.pairs_per_epoch, recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)

    run.seed_all(options.seed)
    model = build(recipe)
    fresh = load_branch(model.backbone, weights_of(recipe.weights)) if recipe.weights else None
    model.to(world.device)
    grid = recipe.search_px // model.backbone.reduction
    flops = run.multiply_adds(model, *(torch.zeros(1, 3, px, px) for px in (recipe.template_px, recipe.search_px)))
    optimizer = torch.optim.AdamW(
        [
            {"params": [*model.cabs.parameters(), *model.head.parameters()], "lr": recipe.lr},
            {"params": model.backbone.parameters(), "lr": recipe.lr * recipe.backbone_lr},
        ],
        weight_decay=recipe.weight_decay,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]

    folder = run.open_run("dualtfr", name, recipe, options, world)
    data = pairs.open_data(recipe, root, folder / "unreadable.txt" if world.is_main else None)
    start, wall_s = 0, 0.0
    if options.resume and (checkpoint := run.load_checkpoint(folder)):
        start, weights, state = checkpoint
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(state["optimizer"])
        wall_s = state["wall_s"]
    if options.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model

    samples = pairs.Pairs(
        data.train, transform(recipe), length=recipe.pairs_per_epoch, max_gap=recipe.max_gap,
        weights=trackers.shares(recipe), report=folder / "unreadable.txt",
    )
    batches = pairs.pairs_loader(
        samples, recipe.batch, min(steps, options.stop_at or steps), seed=options.seed, start=start,
        rank=world.rank, world=world.size, workers=options.workers,
    )
    params = sum(p.numel() for p in model.parameters())
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.model}: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per pair\n"
        f"{data.describe(recipe.dataset)}, from {root}\n"
        + (f"branch from {recipe.weights}; at random stay {fresh or 'none of its tensors'}\n" if recipe.weights else "")
        + f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} pairs"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, learning rates {peaks[0]:.3g} (CABs, head) and "
        f"{peaks[1]:.3g}, steps {start} to {steps}\nrun folder {folder}"
    )

    model.train()
    seen, began, tick = 0, wall_s, time.perf_counter()
    for step, batch in enumerate(batches, start + 1):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        factor = min(1, step / max(1, recipe.warmup_steps)) * (0.1 if step > recipe.drop_epoch * steps_per_epoch else 1)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        template, search, box = (
            batch[key].to(world.device, non_blocking=True) for key in ("template", "search", "search_box")
        )
        target = loss.positives(box, grid)
        # Of the global batch, so that its parts and processes add up to it.
        totals = loss.totals(target)
        if world.size > 1:
            dist.all_reduce(totals)

        terms = torch.zeros(4, device=world.device)
        parts = list(zip(*(x.chunk(chunks) for x in (template, search, box, target))))
        for i, (z, x, truth, positive) in enumerate(parts, 1):
            if world.size > 1:
                network.require_backward_grad_sync = i == len(parts)
            with world.autocast():
                prediction = network(crops.normalise(z), crops.normalise(x))
            part = loss.loss(prediction, truth, positive, totals)
            (loss.total(recipe, part) * world.size).backward()  # DDP averages the gradients
            terms += torch.stack(part).detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf).item()
        if not math.isfinite(norm):  # the same on all ranks, and before the weights are touched
            raise run.UserError(
                f"the gradient is not finite at step {step} (cls, l1, giou {terms[:3].tolist()}); the last good "
                f"checkpoint is in {folder}. Lower --lr, or set --clip-norm"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            values = named(recipe, [world.mean(term * world.size) for term in terms]) | {
                "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "pairs_per_s": seen / (wall_s - began),
            }
        epoch, rest = divmod(step, steps_per_epoch)
        if data.val and ((rest == 0 and epoch % recipe.eval_every == 0) or step == steps):
            scores = validate(model, data, recipe, grid, world, options.workers)
            values |= {f"val/{key}": value for key, value in scores.items()}
            model.train()
        log.step(step, values)
        due = step % options.checkpoint_every == 0 if options.checkpoint_every else rest == 0
        if world.is_main and (due or step in (steps, options.stop_at)):
            state = {"optimizer": optimizer.state_dict(), "wall_s": wall_s}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        tick = time.perf_counter()
    log.close()
    if options.stop_at and options.stop_at < steps:
        log.say(f"stopped at step {options.stop_at} of {steps}; go on with --resume {folder}")
        return folder

    if world.size > 1:
        dist.barrier()  # the checkpoint is whole before anyone reads it
    rows = trackers.compare(PAPER, folder, data.test, world, baselines=report, each=bool(recipe.held_out))
    rows = rows or [run.metric("loss", run.read_log(folder)[-1]["loss"], "")]
    if world.is_main:
        if data.val:
            rows.append(run.metric("pairs iou", 100 * run.read_log(folder)[-1]["val/iou"], "%"))
        if report:
            figures.draw(folder, model, data, recipe, world)
        run.write_results(folder, {
            "paper": "dualtfr", "recipe": name, "data": data.describe(recipe.dataset), "metrics": rows,
            "params": params, "flops": flops, "wall_s": wall_s, "peak_mem_bytes": run.peak_memory_bytes(),
            "throughput": seen / (wall_s - began) if seen else None, "seed": options.seed,
        })
    return folder


def named(recipe: Recipe, terms: list[float]) -> dict[str, float]:
    """The loss and its terms for the log."""
    terms = loss.Loss(*terms)
    return {"loss": loss.total(recipe, terms), **terms._asdict()}


@torch.inference_mode()
def validate(
    model: torch.nn.Module, data: pairs.Data, recipe: Recipe, grid: int, world: run.World, workers: int = 0
) -> dict[str, float]:
    """The loss and its terms over all validation pairs, which are the same every time."""
    samples = pairs.Pairs(
        data.val and {"val": data.val}, transform(recipe), length=recipe.val_pairs, max_gap=recipe.max_gap, limit=0
    )
    mine = range(world.rank, len(samples), world.size)
    batches = [[(i, i) for i in mine[at : at + 32]] for at in range(0, len(mine), 32)]
    sums, totals = (torch.zeros(n, device=world.device, dtype=torch.float64) for n in (4, 2))
    model.eval()
    for batch in loader.progress(
        DataLoader(samples, batch_sampler=batches, num_workers=workers), "validating", active=world.is_main
    ):
        z, x, box = (batch[key].to(world.device) for key in ("template", "search", "search_box"))
        target = loss.positives(box, grid)
        with world.autocast():
            prediction = model(crops.normalise(z), crops.normalise(x))
        sums += torch.stack(loss.loss(prediction, box, target, torch.ones(2, device=world.device))).double()
        totals += loss.totals(target)
    if world.size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(totals)
    tokens, weight = totals.tolist()
    return named(recipe, (sums / torch.tensor([weight, tokens, tokens, tokens]).to(sums)).tolist())


if __name__ == "__main__":
    run.main(main)
