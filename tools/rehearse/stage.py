"""The stage on which a paper's own ``train`` plays its first step, and shows its whole schedule.

Nothing of the trainer is written again here. It is called as the door calls it, with a process group and a device that
are pretended, with data of a few files, and with an epoch as long as the real one; its run folder, its log and its
checkpoints go nowhere. Step 1 runs whole; of the other steps that are looked at only what comes before and after
forward and backward, which is enough to set the learning rate.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, default_collate

from common import run
from common.data import loader, pairs
from common.run.cases import Rehearsal
from tools.rehearse.pretend import Live, Pretend, fault, pretended_device


@dataclass
class Shown:
    """What a recipe's training has shown."""

    fault: str = ""
    """Why it does not run; empty: it does."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of one GPU, by what they hold."""
    rates: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """Of the optimizer's groups, (learning rate, weight decay), at each step looked at."""
    samples: Dataset | None = None
    """The training samples as the trainer addresses them, by (index, seed)."""
    steps: int = 0
    batch: int = 0
    """Samples that one GPU takes at once."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


class _Clock(run.Clock):
    """Only the steps that are looked at; nothing is due at them."""

    save_due = eval_due = log_due = False
    stopped, rate = True, math.nan
    looked_at: Callable[[int], Sequence[int]]
    shown: Shown
    at: dict[str, int]
    marks: dict[str, int]
    live: Live

    def over(self, batches):
        self.shown.steps = self.steps
        batch = next(iter(batches))
        for step in self.looked_at(self.steps):
            self.marks.setdefault("model", self.live.now)
            self.live.peak = self.live.now
            self.step = self.at["step"] = step
            yield step, batch

    def stop(self) -> None:
        pass

    def farewell(self, folder: Path) -> str:
        return ""


class _Log:
    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def __getattr__(self, _name: str) -> Callable[..., dict]:
        return lambda *_args, **_kwargs: {}


def rehearse_step(
    name: str, work: Rehearsal, data: Path, looked_at: Callable[[int], Sequence[int]], *, samples: int = 0,
    classes: int = 0, micro_batch: int = 0, precision: str = "bf16",
) -> Shown:
    """Plays the first step of a recipe's training on `data`, which stand for `samples` of a real epoch (0: as many as
    there are), and the learning rates of the steps that `looked_at` chooses of all."""
    shown, marks = Shown(), {}
    world = Pretend(0, work.gpus, torch.device("cuda", 0), torch.bfloat16 if precision == "bf16" else None)
    options = run.Options(data=data, micro_batch=micro_batch or work.micro_batch, workers=0, precision=precision)
    with tempfile.TemporaryDirectory() as folder, pretended_device() as live, contextlib.ExitStack() as stack:
        _set(stack, shown, live, marks, looked_at, samples, work, Path(folder))
        try:
            work.train(name, work.recipe, options, world)
        except Exception as error:
            shown.fault = fault(error)
    if not shown.fault:
        shown.memory = {
            "weights and averages": marks["model"], "optimizer states": marks["states"],
            "DDP buckets": marks["gradients"] if work.gpus > 1 else 0,
            "gradients and activations": marks["backward"] - marks["model"],
        }
    return shown


def rehearse_parts(work: Rehearsal, looked_at: Callable[[int], Sequence[int]]) -> Shown:
    """As `rehearse_step` where the loop is transformers' Trainer's: forward, loss, backward and AdamW on what it is
    handed, with DeepSpeed's division of the states between the GPUs."""
    parts = work.parts()
    shown, share = Shown(steps=parts.steps, batch=work.micro_batch), work.gpus if parts.zero else 1
    shown.rates = {step: [(rate, 0.0) for rate in parts.rates(step)] for step in looked_at(parts.steps)}
    with pretended_device() as live:
        live.begin()
        try:
            model = parts.model.to_empty(device="cuda")
            weights = live.now
            batch = {name: torch.empty_like(rows, device="cuda") for name, rows in parts.batch.items()}
            with torch.autocast("cuda", torch.bfloat16):
                parts.loss(model, batch).backward()
            trained = [p for p in model.parameters() if p.grad is not None]
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained)
            peak, before = live.peak, live.now
            master = torch.zeros(sum(p.numel() for p in trained) // share, device="cuda").requires_grad_()
            master.grad = torch.zeros_like(master)
            torch.optim.AdamW([master]).step()
            states = live.now - before
        except Exception as error:
            shown.fault = fault(error)
            return shown
    shown.memory = {
        "weights": weights // (share if parts.zero == 3 else 1), "gradients": gradients // share,
        "optimizer states": states, "activations": peak - weights - gradients,
    }
    return shown


def _set(
    stack: contextlib.ExitStack, shown: Shown, live: Live, marks: dict[str, int], looked_at, samples: int,
    work: Rehearsal, folder: Path,
) -> None:
    at: dict[str, int] = {}
    own = {"looked_at": staticmethod(looked_at), "shown": shown, "at": at, "marks": marks, "live": live}
    clock = type("Clock", (_Clock,), own)
    trainer = work.train.__globals__
    whole = {"step": True}

    def batches(samples_of: Dataset, world: int, batch: int) -> Iterator[Any]:
        shown.samples, shown.batch = samples_of, batch // world
        one = default_collate([samples_of[i, i] for i in range(2)])
        yield tree_map_only(Tensor, lambda x: x[:1].expand(batch // world, *x.shape[1:]), one)

    def train_loader(data, transform, batch, steps, *, world=1, report=None, **_):
        return batches(loader.Augmented(data, transform, report=report), world, batch)

    def pairs_loader(found, batch, steps, *, world=1, **_):
        return batches(found, world, batch)

    def micro_batches(network, chunks, *batch):
        if whole["step"]:
            yield from run.world.micro_batches(network, chunks, *batch)

    def clip_gradients(parameters, most, **_):
        parameters = [p for p in parameters if p.grad is not None]
        marks["backward"] = max(marks.get("backward", 0), live.peak - marks.get("states", 0))
        marks.setdefault("gradients", sum(p.numel() * p.element_size() for p in parameters))
        if parameters:
            torch.nn.utils.clip_grad_norm_(parameters, most or math.inf)
        return math.nan

    def before(optimizer, *_):
        shown.rates[at["step"]] = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        marks.setdefault("before", live.now)

    def after(optimizer, *_):
        marks.setdefault("states", live.now - marks["before"])
        whole["step"] = work.whole_steps

    for where, what, new in (
        (run, "open_run", lambda *_a: folder), (run, "restore", lambda *_a, **_k: (0, {})), (run, "Log", _Log),
        (run, "multiply_adds", lambda *_a: 0), (run, "Clock", clock), (run, "clip_gradients", clip_gradients),
        (run, "micro_batches", micro_batches), (loader, "train_loader", train_loader),
        (pairs, "pairs_loader", pairs_loader),
        (loader, "steps_per_epoch", lambda found, batch: (samples or found) // batch),
    ):
        stack.enter_context(patch.object(where, what, new))
    if "DistributedDataParallel" in trainer:
        stack.enter_context(patch.dict(trainer, DistributedDataParallel=lambda model, **_: model))
    for hook in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
        stack.callback(hook.remove)
