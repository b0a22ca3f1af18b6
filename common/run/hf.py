"""transformers' Trainer in a run folder, for the papers that train language models.

A paper's ``train.py`` says what is trained and how: model, batches, and what it prescribes of `arguments`. It overrides
`Trainer` where its loss or its optimizer is its own. Here is what joins it to a run folder: seeds, clock, log,
stop, resumption, and DeepSpeed. Checkpoints are transformers' own, ``checkpoints/checkpoint-N/``, with two changes: of
the weights they hold those that are trained, as safetensors, and one without `COMPLETE_MARKER`, written last, does not
count.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from common import run
from common.run import UserError, leaving

COMPLETE_MARKER = "whole.json"


def quiet() -> None:
    """transformers' warnings and progress bars would tear the run's own progress line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class _Arguments(transformers.TrainingArguments):
    """transformers' own, of one process on one device."""

    @property
    def device(self) -> torch.device:
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device  # torch.load knows no "cpu:1"

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)  # or a process that sees several would wrap the model in DataParallel


def arguments(
    folder: Path, options: run.Options, world: run.World, *, batch: int, steps: int, chunks: int = 1, **prescribed: Any
) -> transformers.TrainingArguments:
    """What the paper prescribes, in transformers' words, and how a run folder wants the rest.

    `batch` is the global batch, which every process takes in so many `chunks`. Logging, saving and evaluation are
    `Progress`'s to decide.
    """
    return _Arguments(
        output_dir=str(folder / "checkpoints"), max_steps=steps, gradient_accumulation_steps=chunks,
        per_device_train_batch_size=math.ceil(batch / world.size / chunks), bf16=world.amp is not None,
        use_cpu=world.device.type == "cpu", seed=options.seed, torch_compile=options.compile,
        dataloader_num_workers=options.workers, remove_unused_columns=False, logging_steps=options.log_every,
        logging_nan_inf_filter=False, save_strategy="no", eval_strategy="no", report_to="none",
        disable_tqdm=True, **prescribed,
    )


def deepspeed_config(paper: Path, name: str) -> str | None:
    """File of the DeepSpeed configuration `name` in the folder of a paper; None without a name."""
    if not name:
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
        from torch.utils.cpp_extension import get_default_build_root  # which deepspeed has imported
    except ImportError:
        message = f"this recipe needs deepspeed (make setup PAPER={paper.name}); to do without: --deepspeed ''"
        raise UserError(message) from None
    free_stale_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
    os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher there is one process: DeepSpeed would look for MPI
    run.join_group()
    deepspeed.init_distributed()  # joins our group; else ZeRO-3 takes itself for alone while weights are loaded
    return str(paper / "scripts" / f"{name}.json")


def free_stale_locks(extensions: Path, minutes: float = 15) -> None:
    """Removes torch's locks on extensions that DeepSpeed compiles, if they are older than any compilation takes: one
    that a killed process has left lets every later start wait for ever."""
    for lock in extensions.glob("*/*/lock"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - lock.stat().st_mtime > 60 * minutes:
                lock.unlink()
                print(f"{lock} was left by a process that was killed, and is removed", file=sys.stderr)


class Progress(transformers.TrainerCallback):
    """Clock, log, checkpoints and stop of a run, and the seed of every step; where a resumed run goes on."""

    def __init__(
        self, folder: Path, options: run.Options, world: run.World, *, batch: int, steps: int, per_epoch: int,
        eval_every: int = 0,
    ):
        """`eval_every`: steps between losses on the Trainer's `eval_dataset`; 0: never."""
        self.options, self.world = options, world
        self.checkpoint = world.agree(_newest_checkpoint(folder) if options.resume and world.is_main else None)
        start, wall_s = 0, 0.0
        if self.checkpoint:
            run.expect_everywhere(self.checkpoint)
            start = int(self.checkpoint.name.split("-")[1])
            wall_s = run.read_json(self.checkpoint / COMPLETE_MARKER)["wall_s"]
        self.clock = run.Clock(
            options, steps=steps, batch=batch, per_epoch=per_epoch, eval_every=eval_every, start=start, wall_s=wall_s
        )
        self.log = run.Log(folder, world, steps=steps, start=start, wandb=options.wandb)

    def owes_scores(self) -> bool:
        """Whether an evaluation is due after this step that was not made: also by a run that ended before it."""
        clock = self.clock
        if not clock.eval_every or not clock.eval_due:
            return False
        rows = run.read_log(self.log.folder) if self.world.is_main else []
        return self.world.agree(not any("val/loss" in row for row in rows if row["step"] == clock.step))

    def on_train_begin(self, args, state, control, **_):
        leaving.training(True)
        self.clock.go()

    def on_train_end(self, args, state, control, **_):
        leaving.training(False)

    def on_step_begin(self, args, state, control, **_):
        run.seed_all(self.options.seed, state.global_step + 1, self.world.rank)

    def on_step_end(self, args, state, control, **_):
        clock = self.clock
        clock.step = state.global_step
        clock.stop()
        clock.go()
        last = clock.left or clock.step in (clock.steps, self.options.stop_at)
        control.should_log |= last
        control.should_save |= clock.save_due
        control.should_training_stop |= last
        self.log.step(clock.step)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            values = {"loss": logs["loss"], "lr": logs["learning_rate"], "samples_per_s": self.clock.rate}
            more = {key: float(value) for key, value in logs.items() if key not in ("loss", "learning_rate", "epoch")}
            self.log.step(self.clock.step, values | more)
        elif "eval_loss" in logs:
            self.log.step(self.clock.step, {"val/loss": logs["eval_loss"]})

    def on_evaluate(self, args, state, control, **_):
        self.clock.go()  # evaluation and checkpoints are not training

    def on_save(self, args, state, control, **_):
        self.clock.go()


def _checkpoints(home: Path) -> list[Path]:
    """The oldest first. Whatever else lies beside them, such as somebody's copy, is not ours."""
    found = home.iterdir() if home.is_dir() else ()
    found = [p for p in found if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; a damaged one is named and passed over."""
    for path in reversed(_checkpoints(folder / "checkpoints")):
        try:
            float(run.read_json(path / COMPLETE_MARKER)["wall_s"])
            step = transformers.TrainerState.load_from_json(str(path / "trainer_state.json")).global_step
            if path.name != f"checkpoint-{step}":
                raise ValueError(f"it is of step {step}")
            with safe_open(path / "model.safetensors", "pt"):
                pass
            if not any(path.glob("global_step*")):  # DeepSpeed's optimizer
                for name in ("optimizer.pt", "scheduler.pt"):
                    zipfile.ZipFile(path / name).close()
            return path
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SafetensorError,
            zipfile.BadZipFile,
        ) as error:
            print(f"passing over {path}: {error}", file=sys.stderr)
    return None


class Trainer(transformers.Trainer):
    """transformers' Trainer, fed in an order that follows from the seed, whose checkpoints hold what is trained."""

    def __init__(self, batches: DataLoader, progress: Progress, **kwargs: Any):
        super().__init__(**kwargs)
        self.batches, self.progress = batches, progress
        if self.args.torch_compile:  # at their first call, within the compiled code, they would break its graph
            for module in self.model.modules():
                if isinstance(module, transformers.PreTrainedModel):
                    maybe_install_capturing_hooks(module)
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(progress)

    def run_steps(self) -> bool:
        """Trains from the newest checkpoint on; whether the last step was reached, and not --stop-at before it."""
        checkpoint, clock, log = self.progress.checkpoint, self.progress.clock, self.progress.log
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.progress.owes_scores():  # where only they were left to do
            self.evaluate()
        log.close(clock.farewell(Path(self.args.output_dir).parent) if clock.stopped else "")
        return not clock.stopped

    def get_train_dataloader(self) -> DataLoader:
        return self.batches  # shared out between the ranks already

    def _prepare_input(self, data: Any) -> Any:
        """As transformers', but the host does not wait for the copy."""
        if not isinstance(data, torch.Tensor) or self.is_deepspeed_enabled:
            return super()._prepare_input(data)
        return data.to(self.args.device, non_blocking=True)

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> torch.Tensor | int | None:
        """Of one process a number: a tensor would have to be brought to the device."""
        count = super()._get_num_items_in_batch(batches, torch.device("cpu") if self.args.world_size == 1 else device)
        return int(count) if isinstance(count, torch.Tensor) and count.is_cpu else count

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == self.progress.clock.start and self.progress.owes_scores():
            self.evaluate()
            run.seed_all(self.args.seed, self.state.global_step + 1, self.progress.world.rank)  # as if nothing had been
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the last good checkpoint is in "
                f"{self.args.output_dir}. Lower the learning rate or --clip-norm"
            )
        return loss

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole, on the main process; ZeRO-3 gathers what it has scattered."""
        if self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.deepspeed)
        return self.model.state_dict()

    def _trained(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        weights = self.model.state_dict() if state_dict is None else state_dict
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        run.save_weights(Path(output_dir) / "model.safetensors", {name: weights[name] for name in self._trained()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = run.load_weights(Path(resume_from_checkpoint) / "model.safetensors")
        if differ := weights.keys() ^ set(self._trained()):
            raise UserError(
                f"{resume_from_checkpoint} holds other weights than this recipe trains, such as {min(differ)}: start "
                "afresh, without --resume"
            )
        self.model.load_state_dict(weights, strict=False)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)  # asked to evaluate, it would do so before it saves
        if self.progress.owes_scores():
            self.evaluate()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        home, world = Path(self.args.output_dir), self.progress.world
        folder = home / f"checkpoint-{self.state.global_step}"
        if world.is_main and folder.exists():  # left by the interrupted run that this one resumed
            shutil.rmtree(folder)
        world.wait()
        super()._save_checkpoint(model, trial)
        world.wait()  # every rank has written its part
        if world.is_main:
            run.write_json(folder / COMPLETE_MARKER, {"wall_s": self.progress.clock.wall_s})
            for old in _checkpoints(home)[:-2]:
                shutil.rmtree(old)

    def _save_rng_state(self, output_dir: str) -> None:
        """All randomness of a step follows from its number."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """See `_save_rng_state`."""


def shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of a parameter that is whole, or that ZeRO-3 has scattered."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Elements of the parameters, whole."""
    return sum(shape(parameter).numel() for parameter in parameters)


def rates(peaks: list[float], schedule: str, warmup_steps: int, steps: int, step: int) -> list[float]:
    """Learning rates with which the Trainer takes step number `step`, of 1 to `steps`."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD(groups)
    found = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    return [peak * at(step - 1) for peak, at in zip(peaks, found.lr_lambdas)]
