"""What the verbs of the Makefiles run, and what they refuse before anything is installed."""

import os
import shutil
import subprocess
import sys

import pytest

from common.run import ROOT
from common.run.sources import source
from tools import check, needs
from tools.list import papers

ECHO = """#!/bin/sh
case "$1" in tools/needs.py) exit 0 ;; tools/*) exec REAL "$@" ;; esac
printf '<%s>' "$@"; echo
"""


@pytest.fixture
def python(tmp_path):
    """A Python that says what it was asked to run, one argument in each pair of brackets."""
    path = tmp_path / "my bin" / "python"
    path.parent.mkdir()
    path.write_text(ECHO.replace("REAL", f'"{sys.executable}"'))
    path.chmod(0o755)
    return path


def _make(*words, folder=ROOT, **environment):
    done = subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_paths_are_meant_from_where_make_was_called(python, tmp_path, how):
    for folder, words in ((ROOT, ["PAPER=shiftvit"]), (ROOT / "papers/shiftvit", [])):
        own = {"PYTHON": str(python)}
        given = [f"{key}={value}" for key, value in own.items()] if how == "argument" else []
        data = os.path.relpath(tmp_path, folder)
        status, printed = _make("evaluate", *words, *given, f"CHECKPOINT={data}", f"DATA={data}", folder=folder,
                                **({} if how == "argument" else own))
        assert status == 0 and f"<papers.shiftvit.evaluate><{folder}/{data}><--data><{folder}/{data}>" in printed


@pytest.mark.parametrize("name", [
    "with space", "cost$5", "R&D", "a;b", "it's", 'say "x"', "ümlaut", "(old)", "50%", "#1", "~x", "*", "$(HOME)",
])
def test_a_folder_may_have_any_name(python, tmp_path, name):
    (tmp_path / name).mkdir()
    status, printed = _make("reproduce", "PAPER=spach", f"DATA={tmp_path / name}", f"PYTHON={python}")
    assert status == 0 and f"<papers.spach><tiny><--data><{tmp_path / name}>" in printed


def test_a_clone_may_lie_in_a_folder_with_a_space(python, tmp_path):
    clone = tmp_path / "my repo"
    for part in ("Makefile", "tools", "common", "papers/spach"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (clone / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, clone / part)
    for folder, words in ((clone, ["PAPER=spach"]), (clone / "papers/spach", [])):
        status, printed = _make("reproduce", *words, f"PYTHON={python}", folder=folder, CDPATH="/tmp")
        assert status == 0 and "<-m><papers.spach><tiny>" in printed


def test_a_paper_without_the_checkouts_tools_says_how_it_runs(tmp_path):
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "common/paper.mk", tmp_path / "common")
    (tmp_path / "papers/spach").mkdir(parents=True)
    shutil.copy(ROOT / "papers/spach/Makefile", tmp_path / "papers/spach")
    status, printed = _make("reproduce", folder=tmp_path / "papers/spach")
    assert status == 2 and printed.startswith("error: make needs tools/ of the whole checkout")
    assert "python -m papers.spach RECIPE" in printed and len(printed.splitlines()) == 2


def test_every_verb_takes_a_python_of_ones_own(python):
    """None of them makes .venv then."""
    verbs = {"reproduce": "papers.spach", "train": "papers.spach", "test": "pytest", "test-long": "pytest",
             "report": "tools.report", "tables": "tools.tables", "lint": "ruff", "bench": "common.kernels.bench",
             "new_paper": "tools.new_paper", "demo": "papers.spach.demo", "plan": "tools.plan", "setup": ""}
    for verb, module in verbs.items():
        paper = [] if verb in ("bench", "report", "tables", "lint", "new_paper", "setup") else ["PAPER=spach"]
        recipe = ["RECIPE=tiny"] if verb == "plan" else []
        status, printed = _make(verb, *paper, *recipe, f"PYTHON={python}")
        assert status == 0 and "setup:" not in printed and (not module or f"<{module}>" in printed), (verb, printed)


def test_a_gpu_each_gets_a_process(python):
    _, one = _make("reproduce", "PAPER=shiftvit", f"PYTHON={python}")
    more = ["GPUS=8", "SEEDS=0 1", "ARGS=--lr 1 --about 'a b'"]
    _, eight = _make("reproduce", "PAPER=shiftvit", *more, f"PYTHON={python}")
    assert "<-m><papers.shiftvit><tiny>" in one and "launch" not in one
    assert "<common.run.launch><8><papers.shiftvit><tiny><--seeds><0><1><--lr><1><--about><a b>" in eight


@pytest.mark.parametrize("words, message", [
    (["reproduce", "PAPER=typo"], "no paper 'typo'; there are: " + " ".join(papers())),
    (["reproduce"], "which paper? PAPER=...; there are: "),
    (["reproduce", "PAPER=vlora ;cmd"], "no paper 'vlora ;cmd'"), (["reproduce", "PAPER=v%"], "no paper 'v%'"),
    (["reproduce", "PAPER=sbt", "RECIPE=typo"], "sbt has no recipe 'typo'; there are tiny,"),
    (["reproduce", "PAPER=shiftvit", "RECIPE=imagenet_tiny"],
     "this recipe is meant for ImageNet-1K: give its folder with DATA=FOLDER (ImageNet-1K from image-net.org"),
    (["train", "PAPER=shiftvit", "RECIPE=imagenet_tiny", "DATA=/nowhere"], "no data folder /nowhere (ImageNet-1K from"),
    (["reproduce", "PAPER=shiftvit", "GPUS=two"], "GPUS takes whole numbers, got 'two'"),
    (["evaluate", "PAPER=shiftvit"], "which checkpoint? CHECKPOINT="),
    (["evaluate", "PAPER=shiftvit", "CHECKPOINT=/nowhere"], "no checkpoint at /nowhere"),
    (["demo", "PAPER=shiftvit", "INPUT=/nowhere.jpg"], "no INPUT at /nowhere.jpg"),
    (["plan"], "which paper?"), (["plan", "PAPER=sbt"], "which recipe?"),
    (["bench", "PAPER=spach"], "spach has no benchmark of its own"),
])
def test_a_mistake_is_one_line_before_anything_is_installed(words, message):
    status, printed = _make(*words)
    assert status == 2 and f"error: {message}" in printed
    assert "setup:" not in printed and len(printed.splitlines()) == 2  # make adds its own


def test_an_environment_of_ones_own_says_what_it_lacks(monkeypatch, tmp_path):
    assert needs.lacking("vlora") == []
    (tmp_path / "papers/toy").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "papers/toy/requirements.txt").write_text("# of its own\ntorch\nno-such-package<3\n")
    monkeypatch.setattr(needs, "ROOT", tmp_path)
    assert needs.lacking("toy") == ["no-such-package"]


def test_every_data_set_says_where_it_comes_from():
    listing = check.load(ROOT / "tools/list.py")
    for paper in papers():
        module = listing.recipes(paper)
        for recipe in module.RECIPES.values():
            assert recipe.dataset in module.BUILT_IN or source(recipe.dataset), recipe.dataset


def test_help_names_every_verb():
    _, printed = _make("help")
    verbs = {line.split()[0] for line in printed.splitlines()}
    assert verbs >= {"setup", "list", "reproduce", "smoke", "train", "evaluate", "test", "bench", "report", "tables"}
    assert verbs >= {"plan", "lint", "new_paper", "clean", "demo", "test-long"}
