"""The papers' shell scripts and tools/setup.sh, with a Python that only says what it was asked to run."""

import fcntl
import os
import shutil
import subprocess

import pytest

from common.run import ROOT

SCRIPTS = sorted(ROOT.glob("papers/*/scripts/*.sh"))
LOOKING = [path for path in SCRIPTS if path.name == "prepare_data.sh"]
OWN_WAY = {"full.sh of mm_gem", "ablation.sh of dualtfr"}  # two commands in a row, each with options of its own
TRAINING = [p for p in SCRIPTS if p not in LOOKING and f"{p.name} of {p.parent.parent.name}" not in OWN_WAY]


def _id(path):
    return f"{path.parent.parent.name}-{path.stem}"


@pytest.fixture
def stub(tmp_path):
    python = tmp_path / "my bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"; echo\n")
    python.chmod(0o755)
    return python


def _call(script, *words, folder, **environment):
    """(status, what is printed, errors but for the command that bash shows) of a script called from `folder`."""
    done = subprocess.run(
        ["bash", str(script), *words], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if not line.startswith("+")]


@pytest.mark.parametrize("script", TRAINING, ids=_id)
def test_a_training_takes_the_callers_paths_and_passes_arguments_on(tmp_path, stub, script):
    for name in ("data dir", "init"):
        (tmp_path / name).mkdir()
    given = {"PYTHON": str(stub), "DATA": "data dir", "INIT": "init", "GPUS": "2", "CDPATH": "/:/tmp"}
    status, said, errors = _call(script, "--epochs", "3", folder=tmp_path, **given)
    assert (status, errors) == (0, []) and said.startswith(f"<-m><common.run.launch><2><papers.{script.parts[-3]}><")
    assert f"<--data><{tmp_path}/data dir>" in said and said.endswith("<--epochs><3>\n")
    assert "INIT" not in script.read_text(encoding="utf-8") or f"<--init><{tmp_path}/init>" in said


@pytest.mark.parametrize("script", TRAINING, ids=_id)
@pytest.mark.parametrize("given, message", [
    ({}, "error: DATA=... is needed: "), ({"DATA": "nowhere"}, "error: no folder DATA="),
    ({"PYTHON": "/nowhere/python"}, "error: no /nowhere/python: make setup PAPER=... makes the environment"),
])
def test_a_mistake_is_one_line_before_anything_is_launched(tmp_path, stub, script, given, message):
    status, said, errors = _call(script, folder=tmp_path, **{"PYTHON": str(stub), "DATA": ""} | given)
    assert (status, said, len(errors)) == (2, "", 1) and errors[0].startswith(message)


@pytest.mark.parametrize("script", LOOKING, ids=_id)
def test_data_are_looked_for_where_one_stands(tmp_path, stub, script):
    (tmp_path / "my data").mkdir()
    status, said, errors = _call(script, "my data", folder=tmp_path, PYTHON=str(stub), CDPATH="/:/tmp")
    assert (status, errors) == (0, []) and said.endswith(f"><{tmp_path}/my data>\n") and said.startswith("<-m><")
    status, said, errors = _call(script, folder=tmp_path, PYTHON=str(stub))
    assert (status, said, errors) == (2, "", ["error: usage: prepare_data.sh FOLDER..."])


def test_the_ablation_of_dualtfr_passes_arguments_on(tmp_path, stub):
    script = ROOT / "papers/dualtfr/scripts/ablation.sh"
    status, said, errors = _call(script, "--epochs", "3", folder=tmp_path, PYTHON=str(stub), DATA="")
    assert (status, errors) == (0, []) and said.startswith("<-m><papers.dualtfr><ablation>")
    assert said.endswith("<--epochs><3>\n")


def test_slurm_passes_arguments_on():
    jobs = sorted(ROOT.glob("papers/*/scripts/*.slurm"))
    for job in jobs:
        *_, last = job.read_text(encoding="utf-8").splitlines()
        assert last.endswith('.sh "$@"') and (ROOT / last.split()[-2]).is_file(), job
    assert len(jobs) == 7


# tools/setup.sh ---------------------------------------------------------------------------------------------

PIP = """#!/bin/sh
case "$*" in *install*)
  echo "WARNING: Location '/opt/nowhere' is ignored: it is either a non-existing path or lacks a specific scheme." >&2
  echo "WARNING: something else" >&2
  exit ${PIP_STATUS:-0} ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """As much of a checkout as setup.sh looks at, with an environment whose pip installs nothing."""
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "papers/toy").mkdir(parents=True)
    (tmp_path / "papers/toy/requirements.txt").write_text("something\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    return tmp_path


def test_setup_shows_what_matters_of_pips_words(clone):
    status, said, errors = _call(clone / "tools/setup.sh", "toy", folder=clone)
    assert status == 0 and "installing what toy needs besides: something" in said
    assert errors == ["WARNING: something else"] * 2
    assert _call(clone / "tools/setup.sh", "toy", folder=clone) == (0, "", [])  # nothing is left to do


def test_setup_says_that_pip_failed(clone):
    status, _, errors = _call(clone / "tools/setup.sh", folder=clone, PIP_STATUS="1")
    assert status == 1 and errors[-1] == "setup: the packages could not be installed; the lines above say why"
    assert errors[:-1] == ["WARNING: something else"] and not list(clone.glob(".venv/.installed*"))


def test_a_second_setup_says_that_it_waits_and_for_this_clone_alone(clone):
    with open(clone / ".setup.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(["bash", "tools/setup.sh"], cwd=clone, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout.readline() == "setup: waiting for another setup in this folder\n"
        assert waiting.poll() is None
    assert "installing PyTorch" in waiting.communicate(timeout=60)[0] and waiting.returncode == 0


@pytest.mark.parametrize("version, shown", [("", "none"), ("Python 3.10.2", "Python 3.10.2")])
def test_setup_says_which_pythons_it_found(clone, version, shown):
    shutil.rmtree(clone / ".venv")
    python = clone / "my python"
    if version:
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] || exit 1\necho {version}\n')
        python.chmod(0o755)
    status, _, errors = _call(clone / "tools/setup.sh", folder=clone, PYTHON3=str(python))
    assert status == 1 and len(errors) == 1 and errors[0].startswith("setup: needs Python 3.11, 3.12 or 3.13")
    assert errors[0].endswith(f"found {python}: {shown}") and not (clone / ".venv").exists()
