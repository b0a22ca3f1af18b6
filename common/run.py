"""What every trainer needs around its loop: command line, processes, seeds, run folder, checkpoints, log, results.

One file of functions to call. Nothing here calls back into a paper, and nothing is inherited.

A run folder, ``runs/<paper>/<recipe>/<timestamp>/``, holds::

    config.json        recipe and options          environment.json   versions, revision, hardware, command
    log.jsonl          one line per logged step    events.out.*       the same for TensorBoard
    checkpoints/       step_NNNNNNNN/: weights in safetensors, trainer state beside; the two newest
    best.safetensors   weights of the best evaluation    model/     the final model, for others to load
    results.json       see results.schema.json     report.md, *.png   for people
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((Path(__file__).parent / "results.schema.json").read_text())
Recipe = TypeVar("Recipe")


class UserError(Exception):
    """A mistake in what was asked for. Its text says what was found, what was expected, and how to mend it."""


# Command line ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How to run a recipe: nothing here changes what the paper prescribes."""

    data: Path | None = None
    """Data folder. Without one, the recipe's small built-in set is written to the cache and used."""
    out: Path = Path("runs")
    """Where run folders are made."""
    resume: str | None = None
    """A run folder, or 'auto' for the newest unfinished run of this recipe (a fresh one if there is none)."""
    seed: int = 0
    """Seed of the initial weights, the data order, the augmentation and the dropout of every step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of the forward pass; 'auto' is bf16 on a GPU, fp32 on a CPU."""
    workers: int = 0
    """Data loading processes per rank; the data do not depend on it."""
    micro_batch: int = 0
    """Most samples a device takes at once; the global batch is reached by accumulation. 0: no limit."""
    compile: bool = False
    """Run the model through torch.compile."""
    deterministic: bool = False
    """Refuse operations that are not bit-reproducible (slower on a GPU)."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one per epoch. The two newest are kept."""
    log_every: int = 10
    """Steps between rows of the log."""
    stop_at: int = 0
    """Write a checkpoint and leave after this step, as if the machine had been taken away; 0: never."""


# Options that may differ between a run and its resumption without changing the result.
_FREE_ON_RESUME = {"data", "out", "resume", "workers", "checkpoint_every", "log_every", "stop_at"}


def parse(recipes: Mapping[str, Recipe], prog: str, argv: Sequence[str] | None = None) -> tuple[str, Recipe, Options]:
    """Reads ``RECIPE [--field value ...]``: a recipe's name, then overrides of its fields and of `Options`.

    Leaves with status 2 and one message on an unknown recipe or field, or a value of the wrong type.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<20} {(recipe.about or '').splitlines()[0]}" for name, recipe in recipes.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m {prog} RECIPE [--field value ...]\n\nrecipes:\n{listing}\n")
        print(f"python -m {prog} RECIPE --help explains every field.")
        sys.exit(0 if argv else 2)
    name, rest = argv[0], argv[1:]
    if name not in recipes:
        sys.exit(_usage(f"{prog}: unknown recipe {name!r}; the recipes are\n{listing}"))
    kind = type(recipes[name])
    both = dataclasses.make_dataclass("Run", [("recipe", kind), ("options", Options)], frozen=True)
    both.__doc__ = f"Recipe {name}: {recipes[name].about}"
    chosen = tyro.cli(
        tyro.conf.OmitArgPrefixes[both],
        default=both(recipe=recipes[name], options=Options()),
        args=rest,
        prog=f"python -m {prog} {name}",
    )
    return name, chosen.recipe, chosen.options


def _usage(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def main(function) -> None:
    """Runs a trainer's ``main()``: a `UserError` becomes one line and status 2, and the process group is closed."""
    try:
        function()
    except UserError as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)  # a mistake that all processes see is rank 0's to report, and ends them all
        text = str(error).rsplit("UserError: ", 1)[-1]  # a loader's worker wraps it in its traceback
        print(f"error: {text.strip()}", file=sys.stderr, flush=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            os._exit(2)  # the others may be waiting for this process: closing the group would wait for them
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# Processes, devices, seeds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    amp: torch.dtype | None  # autocast type of the forward pass; None: full precision

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> float:
        """A scalar averaged over the processes."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def autocast(self):
        """Context of the forward pass."""
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)


def start_world(options: Options) -> World:
    """Joins torchrun's process group if there is one (nccl on GPUs, gloo on CPUs) and chooses the device."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30))
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    bf16 = options.precision == "bf16" or (options.precision == "auto" and cuda)
    return World(rank, size, device, torch.bfloat16 if bf16 else None)


def seed_all(*key: int) -> None:
    """Seeds torch, numpy and python from a tuple of integers, such as (seed, step, rank).

    Called at every step, it makes all randomness of a step a function of its number: a resumed run needs no
    generator states, and two runs that agree at a step agree from there on.
    """
    state = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def accumulation(batch: int, world: World, micro_batch: int) -> int:
    """Chunks in which each rank takes its share of the global batch so that none exceeds `micro_batch`."""
    if batch % world.size:
        raise UserError(f"global batch {batch} is not a multiple of the {world.size} processes")
    share = batch // world.size
    return math.ceil(share / micro_batch) if micro_batch else 1


# Run folder -----------------------------------------------------------------------------------------------


def open_run(paper: str, name: str, recipe: Any, options: Options, world: World) -> Path:
    """Makes a run folder, or finds the one to resume, and records configuration and environment in it.

    Raises `UserError` when a resumed run was made with other settings, naming those that differ.
    """
    folder = [None]
    if world.main:
        folder = [_find_run(paper, name, recipe, options)]
    if world.size > 1:
        dist.broadcast_object_list(folder)
    if isinstance(folder[0], UserError):
        raise folder[0]
    return folder[0]


def _find_run(paper: str, name: str, recipe: Any, options: Options) -> Path | UserError:
    config = {"paper": paper, "recipe_name": name, "recipe": recipe, "options": options}
    config = json.loads(json.dumps(config, default=_plain))
    home = options.out / paper / name
    folder = None
    if options.resume == "auto":
        unfinished = [p.parent for p in sorted(home.glob("*/config.json")) if not (p.parent / "results.json").exists()]
        folder = unfinished[-1] if unfinished else None
        if folder is None:
            print(f"nothing to resume under {home}: starting afresh")
    elif options.resume:
        folder = Path(options.resume)
        if not (folder / "config.json").is_file():
            return UserError(f"--resume {folder}: not a run folder (no config.json in it)")
    if folder:
        before = json.loads((folder / "config.json").read_text())
        then, now = ({**c["options"], **c["recipe"]} for c in (before, config))
        differ = [
            f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted({*then, *now} - _FREE_ON_RESUME) if then.get(key) != now.get(key)
        ]
        if differ or (before["paper"], before["recipe_name"]) != (paper, name):
            made_by = f"{before['paper']} {before['recipe_name']}"
            return UserError(f"cannot resume {folder}, a run of {made_by}, as {paper} {name}: " + "; ".join(differ))
        return folder
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = next(p for i in range(1000) if not (p := home / (f"{stamp}-{i}" if i else stamp)).exists())
    try:
        folder.mkdir(parents=True)
        write_json(folder / "environment.json", environment())
        write_json(folder / "config.json", config)  # last: a folder with it is complete
    except OSError as error:
        return UserError(f"cannot write a run folder at {folder}: {error.strerror}; choose another with --out")
    return folder


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


@functools.cache
def git_revision() -> str:
    """Commit of this checkout, with '-dirty' when files other than records differ; 'unknown' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    changes = ["status", "--porcelain", "--", ".", ":(exclude)benchmarks", ":(exclude)papers/*/results/*"]
    try:
        revision, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], changes)
        )
        return revision + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def hardware() -> str:
    """The device a figure was measured on, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(row.split(":")[1].strip() for row in rows if row.startswith("model name"))
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores of {cpu}"


def environment() -> dict[str, Any]:
    """Versions, revision, hardware and command: what is needed to explain a figure later."""
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "command": command(sys.orig_argv),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_revision(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "packages": dict(sorted(versions.items(), key=lambda item: item[0].lower())),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never half of either."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# Checkpoints ----------------------------------------------------------------------------------------------


def save_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a state dict as safetensors, atomically; tensors that share memory are stored one by one."""
    part = path.with_name(f".{path.name}.part")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def export_timm(
    model: torch.nn.Module, folder: Path, *, side: int, crop: float, classes: Sequence[str],
    model_args: Mapping[str, Any],
) -> None:
    """Writes a timm model so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

    `side` is the image's in pixels and `crop` the share of it kept in evaluation: what timm's data pipeline asks for.
    """
    from timm.models._hub import save_config_for_hf

    folder.mkdir(exist_ok=True)
    model.pretrained_cfg |= {"input_size": (3, side, side), "crop_pct": crop}
    save_config_for_hf(model, folder / "config.json", {"label_names": list(classes)}, dict(model_args))
    save_weights(folder / "model.safetensors", model.state_dict())


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a state dict from safetensors, or from a torch file without ever unpickling code.

    A training checkpoint's ``model`` (or ``state_dict``) entry is taken, and a DDP ``module.`` prefix removed.
    Raises `UserError` for a file that is missing, truncated, no checkpoint, or would need to run code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            # DeiT's trainer, and many after it, saved its arguments too; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"reading it could run {found[1]}" if found else "it is no file of tensors"
        raise UserError(f"{path} is refused: {what}") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} is truncated or not a checkpoint: {error}") from None
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{path} holds no state dict: expected names mapped to tensors")
    return {k.removeprefix("module."): v for k, v in weights.items()}


def save_checkpoint(
    run: Path, step: int, weights: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], keep: int = 2
) -> None:
    """Writes ``checkpoints/step_NNNNNNNN`` whole or not at all, then removes all but the `keep` newest.

    `weights` are named state dicts, one safetensors file each; `state` is any nesting of dicts, lists, tensors
    and JSON scalars, such as an optimizer's ``state_dict()``.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in weights.items():
        save_weights(part / f"{name}.safetensors", tensors)
    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(dict(state), tensors, "")
    save_weights(part / "state.safetensors", tensors)
    write_json(part / "state.json", packed)
    if folder.exists():  # left by the interrupted run that this one resumed
        shutil.rmtree(folder)
    os.replace(part, folder)
    for old in sorted(folder.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(run: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """(step, weights, state) of a run's newest whole checkpoint, or None; a damaged one is named and passed over."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            files = {p.stem: load_weights(p) for p in folder.glob("*.safetensors")}
            state = _unpack(json.loads((folder / "state.json").read_text()), files.pop("state"))
        except (UserError, OSError, ValueError, KeyError) as error:
            print(f"passing over {folder}: {error}", file=sys.stderr)
            continue
        return int(folder.name.removeprefix("step_")), files, state
    return None


def _pack(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """JSON skeleton of a nested state; tensors go to `tensors` and leave their name behind."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[k, _pack(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
    return value


def _unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "list":
        return [_unpack(v, tensors) for v in value]
    return {k: _unpack(v, tensors) for k, v in value}


# Log ------------------------------------------------------------------------------------------------------


class Log:
    """Progress line, ``log.jsonl`` and TensorBoard for one run; silent on every rank but the first."""

    def __init__(self, run: Path, world: World, *, steps: int, start: int = 0):
        self.active, self.path, self.began = world.main, run / "log.jsonl", time.monotonic()
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_log(run) if row["step"] <= start]  # an interrupted run may have logged further
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.tensorboard = SummaryWriter(str(run), purge_step=start + 1)
        # In a file or a pipe a line now and then is enough.
        interval = 0.5 if sys.stderr.isatty() else 15
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=interval)

    def step(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Advances the progress line to `step`, and records `values` if there are any."""
        if not self.active:
            return
        if values:
            row = {"step": step, **values}
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items() if "/" not in k}, refresh=False)
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress line."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.tensorboard.close()


def read_log(run: Path) -> list[dict[str, float]]:
    """Rows of ``log.jsonl``; a last line cut short by a kill is dropped."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


# Results --------------------------------------------------------------------------------------------------


def metric(
    name: str, value: float, unit: str, *, paper_value: float | None = None, paper_source: str | None = None,
    comparable: bool = False,
) -> dict[str, Any]:
    """One row of ``results.json``. `comparable` only if data, protocol and variant equal the paper's."""
    return {
        "name": name, "value": value, "unit": unit,
        "paper_value": paper_value, "paper_source": paper_source, "comparable": comparable,
    }


def multiply_adds(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds in convolutions and matrix products of one forward pass in eval mode.

    Counted on the meta device, where nothing is computed: the counter does not know the attention kernels of CPUs.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).to("meta").eval()(*(x.to("meta") for x in inputs))
    return counter.get_total_flops() // 2


def command(argv: Sequence[str]) -> str:
    """A command as another person would type it: without this machine's interpreter and folders."""
    text = " ".join(["python", *map(shlex.quote, argv[1:])])
    text = re.sub(r" --(out|resume)[ =]\S+", "", text)
    text = re.sub(r" --data[ =]\S+", " --data DATA", text)
    return re.sub(r" --([\w-]+)[ =]/\S+", lambda found: f" --{found[1]} {found[1].replace('-', '_').upper()}", text)


def peak_memory_bytes() -> int:
    """Most memory taken so far: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """Completes `results` with revision, hardware and command, checks them against the schema and writes them.

    ``results.json`` is for tools, ``report.md`` for people.
    """
    import jsonschema

    results = {
        **results,
        "git": git_revision(), "hardware": hardware(), "command": command(sys.orig_argv),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    jsonschema.validate(results, SCHEMA)
    (run / "report.md").write_text(report(results, run))
    write_json(run / "results.json", results)


def report(results: Mapping[str, Any], run: Path) -> str:
    """The page that ends a run: paper's figures beside ours, and where everything is."""
    rows = [
        f"| {m['name']} | {_figure(m['paper_value'])} | {_figure(m['value'])} {m['unit']} "
        f"| {'yes' if m['comparable'] else 'no'} |" for m in results["metrics"]
    ]
    sources = sorted({f"{m['name']}: {m['paper_source']}" for m in results["metrics"] if m["paper_source"]})
    notes = [] if any(m["comparable"] for m in results["metrics"]) else [
        "Not comparable with the paper: other data, size or schedule than the paper's.", ""]
    return "\n".join([
        f"# {results['paper']} · {results['recipe']}", "",
        "| metric | paper | ours | comparable |", "|---|---|---|---|", *rows, "",
        *notes,
        *(f"Paper's figure, {s}" for s in sources),
        f"Data: {results['data']}. Parameters: {results['params']:,}. "
        f"Multiply-adds per sample: {_figure(results['flops'] / 1e9 if results['flops'] else None)} G. "
        f"Trained {results['wall_s']:.0f} s at {_figure(results['throughput'])} samples/s on {results['hardware']}, "
        f"peak memory {results['peak_mem_bytes'] / 2**20:.0f} MiB, seed {results['seed']}.", "",
        f"Run folder: {run}", "",
        *(f"![{p.stem}]({p.name})" for p in sorted(run.glob("*.png"))), "",
    ])


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
