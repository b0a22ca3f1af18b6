"""Trains CtP, a baseline or a recogniser: ``python -m papers.ctp.train tiny``.

The same line works under torchrun. A run leaves its folder under runs/ctp/ (see common/run.py). Comparisons, and what
a trained backbone is judged by, are in compare.py.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from common import run
from common.data import loader
from common.data.video import open_videos
from papers.ctp import cases, data, evaluate, figures
from papers.ctp.official import export, load_backbone
from papers.ctp.recipes import RECIPES, Recipe


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.ctp.train")
    world = run.start_world(options)
    if recipe.contenders:
        from papers.ctp import compare

        folder = compare.compare(name, recipe, options, world)
    else:
        folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


def train(name: str, recipe: Recipe, options: run.Options, world: run.World, draw: bool = True) -> Path:
    """Trains, evaluates and reports one run, with pictures if `draw`; returns its folder."""
    root = evaluate.data_folder(recipe, options.data)
    videos, val = (open_videos(root, split, fold=recipe.fold) for split in ("train", "val"))
    steps_per_epoch = loader.steps_per_epoch(len(videos), recipe.batch)
    steps = recipe.epochs * steps_per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    run.seed_all(options.seed)
    model = evaluate.build(recipe, len(videos.classes))
    if recipe.init:
        load_backbone(model.backbone, recipe.init)
    model.to(world.device, memory_format=torch.channels_last_3d)
    if world.size > 1 and world.device.type == "cuda" and recipe.method != "moco":  # MoCo shuffles instead
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    flops = run.multiply_adds(model, *cases.inputs(recipe))

    folder = run.open_run("ctp", name, recipe, options, world)
    kind = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[recipe.optimizer]
    optimizer = kind(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = scheduler(optimizer, recipe, steps_per_epoch)

    start, best, wall_s = 0, {}, 0.0
    if options.resume and (checkpoint := run.load_checkpoint(folder)):
        start, weights, state = checkpoint
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(state["optimizer"])
        best, wall_s = state["best"], state["wall_s"]
    if options.compile:
        model.compile()
    # Where they are not synchronised, running statistics are each process's own, and averaged when used or kept.
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model

    batches = loader.train_loader(
        data.training_clips(videos, recipe), evaluate.as_it_is, recipe.batch, min(steps, options.stop_at or steps),
        seed=options.seed, start=start, rank=world.rank, world=world.size, workers=options.workers,
        report=folder / "unreadable.txt",
    )
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.method} {recipe.backbone}: {params:,} parameters, {flops / 1e9:,.2f} G multiply-adds per sample\n"
        f"{len(videos):,} training and {len(val):,} validation videos of {len(val.classes)} classes from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} videos"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, learning rate {recipe.lr:.3g}, steps {start} to {steps}\n"
        f"run folder {folder}"
    )

    model.train()
    seen, began, tick = 0, wall_s, time.perf_counter()
    for step, (sample, labels) in enumerate(batches, start + 1):
        run.seed_all(options.seed, step, world.rank)  # all randomness of a step follows from its number
        schedule.step_update(step - 1)
        sample, labels = evaluate.to(world.device, sample), labels.to(world.device, non_blocking=True)

        if recipe.method == "moco":
            model.update_keys()
        terms: dict[str, torch.Tensor] = {}
        share = -(-len(labels) // chunks)
        parts = [slice(i, i + share) for i in range(0, len(labels), share)]
        for part in parts:
            if world.size > 1:
                network.require_backward_grad_sync = part is parts[-1]
            with world.autocast():
                losses = evaluate.losses_of(recipe, network, {k: v[part] for k, v in sample.items()}, labels[part])
            weight = len(labels[part]) / len(labels)
            (sum(losses.values()) * weight).backward()
            for key, loss in losses.items():
                terms[key] = terms.get(key, 0) + loss.detach() * weight
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm).item()
        if not math.isfinite(norm):  # the same on all ranks, and before the weights are touched
            raise run.UserError(
                f"the gradient is not finite at step {step} (loss {sum(terms.values()).item():.4g}); the last good "
                f"checkpoint is in {folder}. Lower --lr"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if recipe.method == "moco":
            model.enqueue()

        seen, wall_s = seen + recipe.batch, wall_s + time.perf_counter() - tick
        values = {}
        if step % options.log_every == 0 or step == steps:
            values = {"loss": world.mean(sum(terms.values()))}
            values |= {key: world.mean(term) for key, term in terms.items() if len(terms) > 1}
            values |= {
                "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "videos_per_s": seen / (wall_s - began),
            }
        epoch, rest = divmod(step, steps_per_epoch)
        scored = (rest == 0 and epoch % recipe.eval_every == 0) or step == steps
        due = step % options.checkpoint_every == 0 if options.checkpoint_every else rest == 0
        due |= step in (steps, options.stop_at)
        if world.size > 1 and (scored or due):
            distribute_bn(model, world.size, reduce=True)
        if scored:
            scores = evaluate.trained(model, val, recipe, world, workers=options.workers)
            values |= {f"val/{key}": value for key, value in scores.items()}
            score = next(iter(scores.values()))
            if score > best.get("score", -1):
                best = {"score": score, "step": step}
                if world.is_main:
                    run.save_weights(folder / "best.safetensors", model.state_dict())
            model.train()
        log.step(step, values)
        if world.is_main and due:
            state = {"optimizer": optimizer.state_dict(), "best": best, "wall_s": wall_s, "classes": videos.classes}
            run.save_checkpoint(folder, step, {"model": model.state_dict()}, state)
        tick = time.perf_counter()
    log.close()
    if options.stop_at and options.stop_at < steps:
        log.say(f"stopped at step {options.stop_at} of {steps}; go on with --resume {folder}")
        return folder

    scores = evaluate.trained(model, val, recipe, world, workers=options.workers)
    if world.size > 1:
        torch.distributed.barrier()  # the checkpoint is whole before anyone starts from it
    if recipe.downstream:
        from papers.ctp import compare

        for label, init in (("", str(folder)), ("random ", "")):
            worth = compare.judge(folder / "downstream" / (label.strip() or "ctp"), init, recipe, options, world)
            scores |= {f"{label}{key}": value for key, value in worth.items()}
    if world.is_main:
        export(model.backbone, recipe.backbone, folder / "model")
        if draw:
            figures.draw(folder, model, val, recipe)
        run.write_results(folder, {
            "paper": "ctp", "recipe": name, "data": describe(recipe, options.data, len(videos), len(val)),
            "metrics": evaluate.metrics(scores, recipe), "params": params, "flops": flops, "wall_s": wall_s,
            "peak_mem_bytes": run.peak_memory_bytes(), "throughput": seen / (wall_s - began) if seen else None,
            "seed": options.seed,
        })
    return folder


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Scheduler:
    """timm's, to be asked with the number of steps taken so far: a warm-up, then decays at `decay_epochs` or a cosine.

    The warm-up is part of the epochs, as in the authors' runs.
    """
    warmup = {"warmup_t": recipe.warmup_steps, "warmup_lr_init": recipe.lr / 10, "t_in_epochs": False}
    if not recipe.decay_epochs:
        return CosineLRScheduler(optimizer, t_initial=recipe.epochs * steps_per_epoch, **warmup)
    decays = [epoch * steps_per_epoch + 1 for epoch in recipe.decay_epochs]  # timm's begin one step before `decay_t`
    return MultiStepLRScheduler(optimizer, decay_t=decays, decay_rate=0.1, warmup_prefix=False, **warmup)


def describe(recipe: Recipe, folder: Path | None, train: int, val: int) -> str:
    """What a result was measured on; data given in place of the built-in clips go by their folder's name."""
    name = folder.resolve().name if folder and recipe.dataset == "clips" else recipe.dataset
    return f"{name}: {train:,} training, {val:,} validation videos"


if __name__ == "__main__":
    run.main(main)
