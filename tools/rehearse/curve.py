"""The learning rate that a training showed beside the one that its paper tells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.run.cases import Curve


def turning_points(curve: Curve, per_epoch: int):
    """Of a training of so many steps, those to look at: the ends, and either side of every turn."""

    def choose(steps: int) -> list[int]:
        turns = [round(curve.warmup * (1 if curve.in_steps else per_epoch)), *(d * per_epoch for d in curve.drops)]
        looked = {1, steps // 2, steps, *turns, *(turn + 1 for turn in turns)}
        return sorted(step for step in looked if 1 <= step <= steps)

    return choose


def expected(curve: Curve, step: int, steps: int, per_epoch: int) -> float:
    """The paper's rate at a step, counted from 1."""
    warmup, done = curve.warmup * (1 if curve.in_steps else per_epoch), step - 1
    if done < warmup:
        return curve.start + (curve.peak - curve.start) * done / warmup
    if curve.kind == "steps":
        return curve.peak * 0.1 ** sum(done >= drop * per_epoch for drop in curve.drops)
    if curve.kind == "cosine":
        before = warmup if curve.after_warmup else 0
        return curve.end + (curve.peak - curve.end) * (1 + math.cos(math.pi * (done - before) / (steps - before))) / 2
    return curve.peak


def differs(curve: Curve, rates: dict[int, float], steps: int, per_epoch: int) -> str:
    """The first step where what was shown is not the paper's; empty if there is none.

    A hundredth of the peak is let pass: whether a cosine begins before its warm-up or after it.
    """
    if curve.epochs and round(steps / per_epoch) != curve.epochs:
        return f"{steps / per_epoch:.4g} epochs; the paper's are {curve.epochs}"
    for step, rate in sorted(rates.items()):
        wanted = expected(curve, step, steps, per_epoch)
        if abs(rate - wanted) > 0.02 * (wanted if curve.kind == "steps" else curve.peak):
            epoch = (step - 1) / per_epoch
            return f"learning rate {rate:.3g} at step {step:,} (epoch {epoch:.4g}); the paper's is {wanted:.3g}"
    return ""


def told(curve: Curve, rates: dict[int, float], per_epoch: int) -> str:
    """The rates at the turning points, for a reader."""
    marks: Sequence[tuple[int, float]] = sorted(rates.items())
    return ", ".join(f"{rate:.3g} at epoch {(step - 1) / per_epoch:.4g}" for step, rate in marks)
