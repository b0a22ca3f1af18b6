"""Trains SBT, or a correlation tracker on its features: ``python -m papers.sbt.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/sbt/ (see common/run.py). The recipes pretrain*
train the single-image path (pretrain.py), ablation* many networks (ablation.py).
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
from papers.sbt import figures, loss
from papers.sbt.evaluate import PAPER, build
from papers.sbt.official import load_backbone, pretrained_weights
from papers.sbt.recipes import RECIPES, Pretrain, Recipe


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.sbt.train")
    world = run.start_world(options)
    if isinstance(recipe, Pretrain):
        from papers.sbt import pretrain

        folder = pretrain.train(name, recipe, options, world)
    elif recipe.contenders:
        from papers.sbt import ablation

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
    weights = pretrained_weights(recipe.weights, recipe.model) if recipe.weights else None
    fresh = load_backbone(model.backbone, weights) if weights else []
    model.to(world.device, memory_format=torch.channels_last)
    crop_pair = [torch.zeros(1, 3, side, side) for side in (recipe.template_px, recipe.search_px)]
    flops = run.multiply_adds(model, *crop_pair)
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    heads = list(model.head.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": heads, "lr": recipe.lr}, {"params": backbone, "lr": recipe.lr * recipe.backbone_lr}],
        weight_decay=recipe.weight_decay,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]

    folder = run.open_run("sbt", name, recipe, options, world)
    data = pairs.open_data(recipe, root, folder / "unreadable.txt" if world.is_main else None)
    transform = pairs.PairTransform(
        recipe.template_px, recipe.search_px, recipe.template_factor, recipe.search_factor, recipe.centre_jitter,
        recipe.scale_jitter, recipe.grey, recipe.flip, recipe.brightness, recipe.published,
    )
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
        data.train, transform, length=recipe.pairs_per_epoch, max_gap=recipe.max_gap,
        weights=trackers.shares(recipe), report=folder / "unreadable.txt",
    )
    batches = pairs.pairs_loader(
        samples, recipe.batch, min(steps, options.stop_at or steps), seed=options.seed, start=start,
        rank=world.rank, world=world.size, workers=options.workers,
    )
    params = sum(p.numel() for p in model.parameters())
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.model}, head {recipe.head}: {params:,} parameters, {flops / 1e6:,.0f} M multiply-adds per pair\n"
        f"{data.describe(recipe.dataset)}, from {root}\n"
        + (f"backbone from {recipe.weights}; at random stay {fresh or 'none of its tensors'}\n" if weights else "")
        + f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} pairs"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, learning rates {peaks[0]:.3g} (heads) and {peaks[1]:.3g}, "
        f"steps {start} to {steps}\nrun folder {folder}"
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
        positives = loss.assign(box, model.grid, recipe.published)
        # Of the global batch, so that its parts and processes add up to it.
        totals = torch.stack([positives.sum(), loss.weight_sum(positives)])
        if world.size > 1:
            dist.all_reduce(totals)
        count, weight_sum = totals[0].clamp(min=1), totals[1]

        terms = torch.zeros(4, device=world.device)
        parts = list(zip(*(x.chunk(chunks) for x in (template, search, box, positives))))
        for i, (z, x, truth, positive) in enumerate(parts, 1):
            if world.size > 1:
                network.require_backward_grad_sync = i == len(parts)
            with world.autocast():
                prediction = network(crops.normalise(z), crops.normalise(x))
            part = loss.terms(prediction, truth, positive, count, weight_sum)
            (loss.total(part) * world.size).backward()  # DDP averages the gradients
            terms += torch.stack(part).detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf).item()
        if not math.isfinite(norm):  # the same on all ranks, and before the weights are touched
            raise run.UserError(
                f"the gradient is not finite at step {step} (ce, l1, giou {terms[:3].tolist()}); the last good "
                f"checkpoint is in {folder}. Lower --lr, or set --clip-norm"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            ce, l1, giou, iou = (world.mean(term * world.size) for term in terms)
            values = {
                "loss": loss.CE * ce + loss.L1 * l1 + loss.GIOU * giou, "ce": ce, "l1": l1, "giou": giou, "iou": iou,
                "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "pairs_per_s": seen / (wall_s - began),
            }
        epoch, rest = divmod(step, steps_per_epoch)
        if data.val and ((rest == 0 and epoch % recipe.eval_every == 0) or step == steps):
            held_back = pairs.Pairs(
                {"val": data.val}, transform, length=recipe.val_pairs, max_gap=recipe.max_gap, limit=0
            )
            scores = validate(model, held_back, recipe, world, options.workers)
            values |= {f"val/{key}": value for key, value in scores.items()}
            model.train()
        log.step(step, values)
        due = step % options.checkpoint_every == 0 if options.checkpoint_every else rest == 0
        if world.is_main and (due or step in (steps, options.stop_at)):
            # What evaluate may call comparable: the paper's recipe, untouched.
            state = {"optimizer": optimizer.state_dict(), "wall_s": wall_s, "comparable": recipe == RECIPES.get(name)}
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
        if report:
            figures.draw(folder, model, data, recipe, world)
        run.write_results(folder, {
            "paper": "sbt", "recipe": name, "data": data.describe(recipe.dataset), "metrics": rows,
            "params": params, "flops": flops, "wall_s": wall_s, "peak_mem_bytes": run.peak_memory_bytes(),
            "throughput": seen / (wall_s - began) if seen else None, "seed": options.seed,
        })
    return folder


@torch.inference_mode()
def validate(
    model: torch.nn.Module, samples: pairs.Pairs, recipe: Recipe, world: run.World, workers: int = 0
) -> dict[str, float]:
    """Loss terms over all validation pairs, which are the same every time."""
    mine = range(world.rank, len(samples), world.size)
    batches = [[(i, i) for i in mine[at : at + 32]] for at in range(0, len(mine), 32)]
    sums = torch.zeros(6, device=world.device, dtype=torch.float64)
    model.eval()
    for batch in loader.progress(
        DataLoader(samples, batch_sampler=batches, num_workers=workers), "validating", active=world.is_main
    ):
        z, x, box = (batch[key].to(world.device) for key in ("template", "search", "search_box"))
        positives = loss.assign(box, model.grid, recipe.published)
        with world.autocast():
            prediction = model(crops.normalise(z), crops.normalise(x))
        terms = loss.terms(prediction, box, positives, 1.0, 1.0)
        sums += torch.stack([*terms, positives.sum(), loss.weight_sum(positives)]).double()
    if world.size > 1:
        dist.all_reduce(sums)
    ce, l1, giou, iou, count, weight_sum = sums.tolist()
    scores = {"ce": ce / weight_sum} | {key: value / count for key, value in (("l1", l1), ("giou", giou), ("iou", iou))}
    return {"loss": loss.CE * scores["ce"] + loss.L1 * scores["l1"] + loss.GIOU * scores["giou"]} | scores


if __name__ == "__main__":
    run.main(main)
