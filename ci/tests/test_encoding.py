"""No file of ours is read or written in the locale's encoding: Python can warn of each, and here that ends it."""

import os
import subprocess
import sys

import pytest

from common.run import ROOT
from tools.list import papers

STRICT = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]


@pytest.mark.slow
def test_every_paper_is_imported():
    script = "; ".join(f"import papers.{paper}.__main__, papers.{paper}.evaluate" for paper in papers())
    done = subprocess.run([sys.executable, *STRICT, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["common", "papers.sbt"])
def test_a_file_of_ours_is_not_overlooked(tmp_path, module):
    """What is let pass are packages by name, which no module of this repository bears."""
    script = f"import common; exec(compile(\"open(r'{__file__}')\", 'x', 'exec'), {{'__name__': '{module}.x'}})"
    done = subprocess.run([sys.executable, *STRICT, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "EncodingWarning" in done.stderr


def test_a_terminal_of_another_encoding_ends_nothing():
    script = r"from common import run; run.main(lambda: print('shiftvit \xb7 5 \u2013 7'))"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | ascii_only, capture_output=True)
    assert done.returncode == 0 and done.stdout == rb"shiftvit \xb7 5 \u2013 7" + b"\n", done.stderr


@pytest.mark.long
@pytest.mark.parametrize("paper", papers())
def test_a_smoke_run_says_every_encoding(paper, tmp_path):
    command = [
        sys.executable, "-W", "error::EncodingWarning", "-m", f"papers.{paper}.train", "smoke", "--device", "cpu",
        "--out", str(tmp_path),
    ]
    environment = os.environ | {"PYTHONWARNDEFAULTENCODING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
