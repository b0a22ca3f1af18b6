"""A new paper passes every check from its first minute."""

import os
import shutil
import subprocess
import sys

import pytest

from common.run import ROOT
from tools import new_paper
from tools.list import PAPERS
from tools.new_paper import main


@pytest.fixture
def repository(tmp_path):
    """A copy of what the checks need."""
    files = "Makefile", "conftest.py", "pyproject.toml", "constraints.txt"
    for name in ("ci", "common", "tools", "papers/shiftvit", *files):
        source = ROOT / name
        if source.is_dir():
            unneeded = shutil.ignore_patterns("__pycache__", "fixtures", "emulator")
            shutil.copytree(source, tmp_path / name, ignore=unneeded)
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / "papers/__init__.py").touch()
    return tmp_path


@pytest.mark.slow
def test_a_new_paper_passes_the_contract(repository):
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    python = f"{sys.executable} -m"
    for check in (
        f"{python} tools.new_paper vit_shift", f"{python} pytest -q -p no:cacheprovider ci -k vit_shift",
        f"{python} pytest -q -p no:cacheprovider papers/vit_shift", f"{python} ruff check papers/vit_shift",
        f"{python} tools.tables --check", f"bash ci/smoke.sh vit_shift {sys.executable}",
    ):
        done = subprocess.run(check.split(), cwd=repository, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name, message", [
    ("Bad", "lower case"), ("", "lower case"), ("class", "lower case"), ("shiftvit", "exists already"),
])
def test_a_name_that_cannot_be(monkeypatch, name, message):
    monkeypatch.setattr(sys, "argv", ["new_paper", name])
    with pytest.raises(Exception, match=message):
        main()


def test_half_a_paper_is_not_left_behind(monkeypatch, tmp_path):
    (tmp_path / "shiftvit").symlink_to(PAPERS / "shiftvit")
    monkeypatch.setattr(new_paper, "PAPERS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["new_paper", "vit_shift"])
    monkeypatch.setattr(new_paper.golden, "first_losses", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main()
    assert not (tmp_path / "vit_shift").exists()
