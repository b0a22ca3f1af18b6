"""What the verbs of the Makefiles would run."""

import subprocess

import pytest

from common.run import ROOT
from tools.list import papers


def _make(*words, folder="."):
    done = subprocess.run(["make", "-n", *words], cwd=ROOT / folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("paper", papers())
def test_paths_are_meant_from_where_make_was_called(paper):
    for folder, words in ((".", [f"PAPER={paper}"]), (f"papers/{paper}", [])):
        _, printed = _make("evaluate", *words, "CHECKPOINT=some/run", "DATA=some/data", folder=folder)
        here = (ROOT / folder).resolve()
        assert f"papers.{paper}.evaluate {here}/some/run" in printed and f"--data {here}/some/data" in printed


def test_a_gpu_each_gets_a_process():
    _, one = _make("reproduce", "PAPER=shiftvit")
    _, eight = _make("reproduce", "PAPER=shiftvit", "RECIPE=imagenet_tiny", "GPUS=8", "ARGS=--seed 1")
    assert "-m  papers.shiftvit.train tiny" in one and "launch" not in one
    assert "-m common.run.launch 8 papers.shiftvit.train imagenet_tiny" in eight and "--seed 1" in eight


def test_an_unknown_paper_gets_the_list():
    status, printed = _make("reproduce", "PAPER=typo")
    assert status == 2 and "no paper 'typo'; there are: " + " ".join(papers()) in printed


def test_help_names_every_verb():
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    verbs = {line.split()[0] for line in printed.splitlines()}
    assert verbs >= {"setup", "list", "reproduce", "smoke", "train", "evaluate", "test", "bench", "report", "tables"}
    assert verbs >= {"plan", "lint", "new_paper", "clean"}
