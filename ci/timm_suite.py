"""timm's own tests over every model that the papers register, as if they were part of timm:

    python -m ci.timm_suite [--names 'shiftvit_*' ...] [--tests forward backward_fx ...]

The tests stand in timm's source distribution, not in its wheel: that of the installed version is fetched once with pip
into the user's cache. All must pass, and none may be skipped: no model of ours is beyond timm's own limits of size.
"""

from __future__ import annotations

import collections
import fnmatch
import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import tyro

from common.run import UserError
from common.run import main as run_main
from common.run.files import cache_dir

PAPERS = ("shiftvit", "smlpnet", "spach")  # whose networks are image backbones, as timm's are

TESTS = ("forward", "backward", "default_cfgs", "forward_features", "forward_intermediates",
         "forward_intermediates_features", "forward_fx", "backward_fx")
CONTRACT = "prune_intermediate_layers_contract"  # of pruning, beyond what must pass


@dataclass
class Arguments:
    names: tuple[str, ...] = ("*",)
    """Patterns of names of models."""
    tests: tuple[str, ...] = (*TESTS, CONTRACT)
    """Which of timm's tests, without their test_model_ or test_."""
    threads: int = 0
    """Threads of the computation; 0: torch's own choice."""


class Ours:
    """A pytest plugin: shows timm's tests our models alone, and counts what became of them."""

    def __init__(self, patterns: tuple[str, ...]):
        self.patterns, self.counts, self.list_models = patterns, collections.Counter(), timm.list_models

    def pytest_configure(self) -> None:
        timm.list_models = self.ours

    def pytest_unconfigure(self) -> None:
        timm.list_models = self.list_models

    def ours(self, *args, module="", **kwargs) -> list[str]:
        """timm's list_models of our models. `module` chooses files of timm's in which features are to be had: ours too.
        """
        names = [name for name in self.list_models(*args, **kwargs) if is_ours(name.split(".")[0])]
        return [name for name in names if any(fnmatch.fnmatch(name.split(".")[0], p) for p in self.patterns)]

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def is_ours(name: str) -> bool:
    return timm.models.model_entrypoint(name).__module__.startswith(tuple(f"papers.{paper}." for paper in PAPERS))


def tests() -> Path:
    """The folder of the installed timm's tests. `UserError` if pip cannot fetch them."""
    version = importlib.metadata.version("timm")
    folder = cache_dir("timm_suite") / f"timm-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", part]
            done = subprocess.run([sys.executable, "-m", *command, f"timm=={version}"], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"pip cannot fetch the source distribution of timm {version}: {last}")
            (archive,) = Path(part).glob("*.tar.gz")
            with tarfile.open(archive) as file:
                file.extractall(part, filter="data")
            (Path(part) / folder.name).rename(folder)
    return folder / "tests"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m ci.timm_suite", description="timm's own tests over our models.")
    for paper in PAPERS:
        importlib.import_module(f"papers.{paper}")
    if args.threads:
        torch.set_num_threads(args.threads)
    plugin, file = Ours(args.names), tests() / "test_models.py"
    chosen = [f"{file}::test_{name if name == CONTRACT else f'model_{name}'}" for name in args.tests]
    quiet = ["-q", "-rfEs", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore"]
    status = pytest.main([*quiet, "-c", str(file.parent.parent / "pyproject.toml"), *chosen], plugins=[plugin])
    names = plugin.ours()
    plugin.pytest_unconfigure()
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(plugin.counts.items()))
    print(f"timm {importlib.metadata.version('timm')}: {said or 'nothing run'}; {len(names)} models of ours")
    if status or set(plugin.counts) != {"passed"}:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
