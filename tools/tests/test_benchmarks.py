"""tools/benchmarks.sh: all benchmarks that are there, whatever becomes of one of them."""

import os
import subprocess

import pytest

from common.run import ROOT

PYTHON = """#!/bin/sh
case "$1" in -c) [ -e "$3/has-$4" ]; exit ;; esac  # is this part of a benchmark there?
echo "asked: $*"
case "$*" in *BROKEN*) exit 2 ;; esac
"""


@pytest.fixture
def script(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "w.pth").touch()

    given = {"PYTHON": str(python), "PAPER": "sbt", "CHECKPOINT": "w.pth", "DATA": "data"}

    def call(*arguments, **environment):
        done = subprocess.run(
            [ROOT / "tools/benchmarks.sh", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | given | environment,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_it_goes_on_sums_up_and_passes_arguments_on(tmp_path, script):
    for name in ("OTB", "GOT-10k"):
        (tmp_path / "data" / name).mkdir(parents=True)
    status, out, _ = script("--rule", "otb", "--baselines", OUT="res ults", RECIPE="full")
    asked = [line for line in out.splitlines() if line.startswith("asked")]
    assert status == 0 and len(asked) == 2
    assert asked[1] == (
        f"asked: -m papers.sbt.evaluate {tmp_path}/w.pth --data {tmp_path}/data/GOT-10k "
        f"--out {tmp_path}/res ults/GOT-10k --split test --recipe full --rule otb --baselines"
    )
    assert f"measured: OTB GOT-10k; failed: none; not in {tmp_path}/data: OTB-otb50 OTB-otb2013 LaSOT LaSOT_ext" in out


def test_parts_that_are_there_are_measured_and_those_of_otb_share_its_boxes(tmp_path, script):
    for part in ("OTB/has-otb50", "UAV123/has-uav20l", "NFS/has-30"):
        (tmp_path / "data" / part).mkdir(parents=True)
    status, out, _ = script("--tracker", "csrt", CHECKPOINT="")
    asked = [line.split("/data/", 1)[1] for line in out.splitlines() if line.startswith("asked")]
    assert status == 0 and [line.split()[0] for line in asked] == ["OTB", "OTB", "UAV123", "UAV123", "NFS"]
    assert [line.split("--out ")[1].split("/")[-1].split()[0] for line in asked] == [
        "OTB", "OTB", "UAV123", "UAV123-uav20l", "NFS-30"]
    assert "asked: -m papers.sbt.evaluate --data" in out and asked[1].endswith("--split otb50 --tracker csrt")


def test_one_that_fails_does_not_end_it_and_is_named(tmp_path, script):
    (tmp_path / "BROKEN").mkdir()
    for name in ("OTB", "LaSOT"):
        (tmp_path / "data" / name).mkdir(parents=True)
    status, out, _ = script(CHECKPOINT="BROKEN")
    assert status == 2 and out.count("asked") == 2 and "measured: none; failed: OTB LaSOT;" in out


@pytest.mark.parametrize("environment, message", [
    ({"DATA": "nowhere"}, "no folder DATA=nowhere"), ({"CHECKPOINT": "gone.pth"}, "no checkpoint at gone.pth"),
    ({"PAPER": ""}, "PAPER=... is needed"), ({"DATA": ""}, "DATA=... is needed"),
])
def test_mistakes_are_one_line_with_status_2(tmp_path, script, environment, message):
    (tmp_path / "data").mkdir()
    status, out, error = script(**environment)
    assert (status, out, len(error.splitlines())) == (2, "", 1) and message in error


def test_none_at_all_is_status_2(tmp_path, script):
    (tmp_path / "data").mkdir()
    assert script()[0] == 2
