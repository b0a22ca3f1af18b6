"""The log of a run, and the clock of its steps."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.run import leaving
from common.run.files import UserError, read_json, write_text
from common.run.options import Options
from common.run.world import World

LONG_H = 12  # more hours than this on a CPU are told


class Clock:
    """Which step it is, how long training took, and what is due.

    Only training is timed: from when a step's batch is asked for to `stop`. Evaluation, checkpoints and pictures, which
    come after `stop`, are not. `wall_s` is what a watch shows, `cpu_s` what this process computed, all its threads
    together: on a machine that others use too only the latter compares networks.
    """

    def __init__(
        self, options: Options, *, steps: int, batch: int, per_epoch: int, eval_every: int = 0, start: int = 0,
        wall_s: float = 0.0, cpu_s: float = 0.0,
    ):
        """`steps` of the whole training, `batch` samples each; `eval_every` in steps, 0: only at the end. A resumed
        run goes on after step `start`, which took `wall_s` and `cpu_s` seconds."""
        self.options, self.steps, self.batch, self.eval_every = options, steps, batch, eval_every
        self.save_every = options.checkpoint_every or per_epoch
        self.end = min(steps, options.stop_at or steps)
        self.step = self.start = start
        self.wall_s = self.before = wall_s
        self.cpu_s = cpu_s
        self.left = False
        """Whether a signal made this step the last."""

    def over(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(step, batch) for the steps that are left; `batches` begin with that of step ``start + 1``."""
        self.go()
        leaving.training(True)
        for step, batch in enumerate(batches, self.start + 1):
            self.step = step
            yield step, batch
            if self.left:
                break
            self.go()
        leaving.training(False)

    def go(self) -> None:
        """What comes now is training."""
        self.tick = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """The step's update is done."""
        self.wall_s += time.perf_counter() - self.tick[0]
        self.cpu_s += time.process_time() - self.tick[1]
        self.left = leaving.last_step(self.step)

    def about(self, world: World, chunks: int, what: str) -> str:
        """How the global batch is shared out, and the steps to come; `what` are samples called."""
        each = f"{world.size} process{'es' * (world.size > 1)} x {self.batch // world.size} {what}"
        parts = f" in {chunks} chunks" if chunks > 1 else ""
        return f"global batch {self.batch} = {each}{parts}, steps {self.start} to {self.steps}"

    @property
    def rate(self) -> float | None:
        """Samples per second since this process started."""
        done = self.step - self.start
        return done * self.batch / (self.wall_s - self.before) if done else None

    @property
    def log_due(self) -> bool:
        return self.step % self.options.log_every == 0 or self.step == self.steps

    @property
    def save_due(self) -> bool:
        return self.left or self.step % self.save_every == 0 or self.step in (self.steps, self.options.stop_at)

    @property
    def eval_due(self) -> bool:
        regular = self.eval_every and self.step % self.eval_every == 0
        return self.step > 0 and not self.left and bool(regular or self.step == self.steps)

    @property
    def stopped(self) -> bool:
        """Whether the training was left before its end, for --stop-at or a signal."""
        return self.left or self.step < self.steps

    def farewell(self, folder: Path) -> str:
        return f"stopped at step {self.step} of {self.steps} for {leaving.name()}; go on with --resume {folder}"


def clip_gradients(
    parameters: Iterable[Tensor], most: float, *, step: int, loss: Tensor, folder: Path, hint: str = "--lr"
) -> float:
    """Scales the gradients to a norm of at most `most` (0: as they are); returns the norm they had.

    One that is not finite ends the training, on all ranks and before the weights are touched. `loss`, one term or
    several, goes into that message, and `hint`, the option to lower.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, most or math.inf).item()
    if not math.isfinite(norm):
        raise UserError(
            f"the gradient is not finite at step {step} (loss {loss.tolist()}); the last good checkpoint is in "
            f"{folder}. Lower {hint}, or set --clip-norm"
        )
    return norm


class Log:
    """Progress line, ``log.jsonl`` and TensorBoard for one run; silent on every rank but the first."""

    def __init__(self, folder: Path, world: World, *, steps: int, start: int = 0, wandb: bool = False):
        self.folder, self.world, self.active = folder, world, world.is_main
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_log(folder) if row["step"] <= start]  # an interrupted run may have logged further
        write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.tensorboard = SummaryWriter(str(folder), purge_step=start + 1)
        self.wandb = _wandb_run(folder) if wandb else None
        # In a file or a pipe a line now and then is enough.
        interval = 0.5 if sys.stderr.isatty() else 15
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=interval)
        self.start, self.began, self.warned = start, time.monotonic(), False

    def step(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Advances the progress line to `step`, and records `values` if there are any."""
        if not self.active:
            return
        if values:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
            if self.wandb:
                self.wandb.log(dict(values), step=step)
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items() if "/" not in k}, refresh=False)
            self._warn(step)
        self.bar.update(step - self.bar.n)

    def _warn(self, step: int) -> None:
        """Once, where a CPU has taken on what is meant for GPUs."""
        done = step - self.start
        hours = (self.bar.total - step) * (time.monotonic() - self.began) / max(done, 1) / 3600
        if hours > LONG_H and done >= 3 and not self.warned and self.world.device.type == "cpu":
            self.warned = True
            self.say(f"at this rate {hours:,.0f} hours are left on this CPU: Ctrl-C leaves a checkpoint, and make list "
                     "shows what each recipe needs")

    def scores(self, step: int, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """What `evaluate` says of the weights after `step`, recorded as val/...; asked once only, also where the run
        is resumed: then the log knows. Called by all ranks."""
        known = [row for row in read_log(self.folder) if row["step"] == step] if self.active else []
        found = {key: value for row in known for key, value in row.items() if key.startswith("val/")}
        found = self.world.agree(found)
        if not found:
            found = {f"val/{key}": value for key, value in evaluate().items()}
            self.step(step, found)
        return {key.removeprefix("val/"): value for key, value in found.items()}

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress line."""
        if self.active:
            tqdm.write(text)

    def close(self, text: str = "") -> None:
        """Ends the progress line, with a last word."""
        if self.active:
            self.bar.close()
            self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()
        if text:
            self.say(text)


def expect_wandb() -> None:
    """`UserError` if the package is not there; the folder wandb/ of its records, where one stands, is not it."""
    try:
        from wandb import init  # noqa: F401
    except ImportError as error:
        raise UserError(f"--wandb needs the package wandb ({error}): pip install -c constraints.txt wandb") from None


def _wandb_run(folder: Path) -> Any:
    """The run at Weights & Biases of a run folder, also where that is resumed. What wandb keeps here goes to wandb/ in
    the working directory: there are links in it, which no run folder may hold."""
    import wandb

    config = read_json(folder / "config.json")
    try:
        return wandb.init(
            project=config["paper"], name=f"{config['recipe_name']} {folder.name}", resume="allow",
            id=re.sub(r"\W+", "-", f"{config['recipe_name']}-{folder.name}-{config['options']['seed']}"),
            config=config["options"] | config["recipe"],
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {' '.join(str(error).split())}") from None


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of ``log.jsonl``, one for each step that was logged; what is no row is dropped, such as a last
    line cut short by a kill. `UserError` where it is no text."""
    rows: dict[int, dict[str, float]] = {}
    path = folder / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as text: {error}") from None
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError, RecursionError, KeyError, TypeError):
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row)
    return list(rows.values())
