"""The run folder, and what explains a figure later: revision, hardware, versions, command.

``runs/<paper>/<recipe>/<timestamp>/`` holds ::

    config.json        recipe and options          environment.json   versions, revision, hardware, command
    log.jsonl          one line per logged step    events.out.*       the same for TensorBoard
    checkpoints/       step_NNNNNNNN/: weights in safetensors, trainer state beside; the two newest
    model/             the final model, for others to load
    results.json       see results.schema.json     report.md, *.png   for people
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from common.run.files import ROOT, UserError, read_json, write_json
from common.run.options import FREE_ON_RESUME, Options
from common.run.world import World

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


def open_run(paper: str, name: str, recipe: Any, options: Options, world: World) -> Path:
    """Makes a run folder, or finds the one to resume, records configuration and environment in it, and holds it until
    this process ends: nobody else trains in it meanwhile.

    ``--resume auto`` takes the newest unfinished run of these very settings that nobody holds, or starts afresh.
    Raises `UserError` when a named run was made with other settings, naming those that differ.
    """
    found = world.agree(_find_run(paper, name, recipe, options) if world.is_main else None)
    if isinstance(found, UserError):
        raise found
    return found


def _find_run(paper: str, name: str, recipe: Any, options: Options) -> Path | UserError:
    config = {"paper": paper, "recipe_name": name, "recipe": recipe, "options": options}
    config = json.loads(json.dumps(config, default=_plain))
    home = options.out / paper / name
    try:
        if options.resume == "auto":
            for folder in sorted((path.parent for path in home.glob("*/config.json")), reverse=True):
                if not finished(folder) and not _differences(folder, config) and _hold(folder):
                    return _resumed(folder)
            print(f"nothing to resume under {home}: starting afresh")
        elif options.resume:
            folder = Path(options.resume)
            if not (folder / "config.json").is_file():
                return UserError(f"--resume {folder}: not a run folder (no config.json in it)")
            if differ := _differences(folder, config):
                return UserError(f"cannot resume {folder}: {differ}. Without --resume a new run is made")
            if not _hold(folder):
                return UserError(f"cannot resume {folder}: a process that is still running trains in it")
            return _resumed(folder)
        folder = new_folder(home)
        _hold(folder)
        write_json(folder / "environment.json", environment())
        write_json(folder / "config.json", config)  # last: a folder with it is complete
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"cannot write a run folder at {home}: {error.strerror}; choose another with --out")
    return folder


def _differences(folder: Path, config: dict[str, Any]) -> str:
    """What tells the run in `folder` from one of `config`; nothing if it may be gone on with."""
    try:
        before = read_json(folder / "config.json")
        if (made := (before["paper"], before["recipe_name"])) != (config["paper"], config["recipe_name"]):
            return f"it is a run of {' '.join(map(str, made))}, not of {config['paper']} {config['recipe_name']}"
        then, now = ({**c["options"], **c["recipe"]} for c in (before, config))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its config.json is damaged ({error})"
    return "; ".join(
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now} - FREE_ON_RESUME) if then.get(key) != now.get(key)
    )


_held: dict[Path, IO] = {}  # files whose locks this process keeps


def _hold(folder: Path) -> bool:
    """Locks a run for this process; False if another one has it. Where the file system knows no locks, all may."""
    if links := [path for path in folder.rglob("*") if path.is_symlink()]:
        raise UserError(f"{folder} is refused: {links[0].name} in it is a link, and what is written would go elsewhere")
    path = (folder / "lock").resolve()
    if fcntl is None or path in _held:
        return True
    file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the process lives)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError:
        pass
    _held[path] = file
    return True


def release(folder: Path) -> None:
    """Lets others resume the run, as the end of the process does."""
    if file := _held.pop((folder / "lock").resolve(), None):
        file.close()


def _resumed(folder: Path) -> Path:
    """The folder, with what it is resumed under in its environment.json, and under `before` what it ran under."""
    try:
        before = read_json(folder / "environment.json")
    except (OSError, ValueError):
        before = {}
    earlier = [*before.pop("before", []), {key: before[key] for key in before if key != "packages"}]
    write_json(folder / "environment.json", environment() | {"before": earlier})
    return folder


def new_folder(home: Path) -> Path:
    """A folder under `home` named after the present second that nobody else has."""
    stamp, number = datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), 0
    while True:
        folder = home / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def finished(folder: Path) -> bool:
    """Whether a run has its results, and nothing of what follows them is still to be made."""
    return (folder / "results.json").exists() and not (folder / "pending.json").exists()


def newest(paper: str, recipes: Collection[str] = (), runs: Path = Path("runs")) -> Path:
    """The paper's newest finished run that has a checkpoint, of `recipes` if any are named."""
    found = [
        path.parent for path in (runs / paper).glob("*/*/results.json")
        if (path.parent / "checkpoints").is_dir() and (not recipes or path.parts[-3] in recipes)
    ]
    if not found:
        raise UserError(
            f"no finished run under {runs / paper}; make one with make reproduce PAPER={paper}, or give --checkpoint"
        )
    return max(found, key=lambda folder: (folder / "results.json").stat().st_mtime)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


@functools.cache
def git_revision() -> str:
    """Commit of this checkout, with '-dirty' when files other than records differ; 'unknown' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    changes = ["status", "--porcelain", "--", ".", ":(exclude)papers/*/results/*", ":(exclude)common/*/records/*"]
    try:
        revision, changed = (
            subprocess.run([*git, *command], capture_output=True, encoding="utf-8", check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], changes)
        )
        return revision + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def computed_on() -> str:
    """The type of device this process has used: a machine's GPUs may have stood idle."""
    return "cuda" if torch.cuda.is_initialized() else "cpu"


@functools.cache
def hardware(device: str = "auto") -> str:
    """The device a figure was measured on, in one line; `device` is torch's name of its type, 'auto' the GPU if there
    is one."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(row.split(":")[1].strip() for row in rows if row.startswith("model name"))
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores of {cpu}"


def environment() -> dict[str, Any]:
    """Versions, revision, hardware and command: what is needed to explain a figure later."""
    # an interrupted installation leaves distributions without a name
    named = [(each.name, each.version) for each in importlib.metadata.distributions() if each.metadata["Name"]]
    return {
        "command": command(sys.orig_argv),
        "time": now(),
        "git": git_revision(),
        "hardware": hardware(computed_on()),
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "packages": dict(sorted(named, key=lambda pair: pair[0].lower())),
    }


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def command(argv: Sequence[str]) -> str:
    """A command as another person would type it: without this machine's interpreter and folders."""
    words, rest = ["python"], list(argv[1:])
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            words.append(shlex.quote(word))
            continue
        folder = {"--out": "", "--resume": "", "--data": "DATA"}.get(name)
        if not equals:
            value = rest[0] if rest else ""
        if folder is None and value.startswith("/"):
            folder = name.removeprefix("--").replace("-", "_").upper()
        if folder is None:
            words.append(shlex.quote(word))
            continue
        words += [name, folder] if folder else []
        if not equals:
            del rest[:1]
    return " ".join(words)
