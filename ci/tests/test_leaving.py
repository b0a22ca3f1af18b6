"""Signals and several processes, as a shell sees them: status, last line, and what is left to go on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import run

COMMAND = ["papers.shiftvit.train", "tiny", "--device", "cpu", "--batch", "32", "--log-every", "1"]


def _start(out, *more, processes=1):
    launch = [] if processes == 1 else ["-m", "common.run.launch", str(processes)]
    command = [sys.executable, *launch, *(["-m"] if processes == 1 else []), *COMMAND, "--out", str(out), *more]
    return subprocess.Popen(
        command, cwd=run.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )


def _wait_for_step(out, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for folder in out.glob("shiftvit/tiny/*"):
            if any(row["step"] >= step for row in run.read_log(folder)):
                return folder
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("number, status, processes", [
    pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.long), pytest.param(signal.SIGINT, 130, 1),
    pytest.param(signal.SIGTERM, 143, 2),
])
def test_a_signal_leaves_a_checkpoint(tmp_path, number, status, processes):
    process = _start(tmp_path, "--checkpoint-every", "100000", processes=processes)
    folder = _wait_for_step(tmp_path, 3, process)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and time.monotonic() - began < 30, err
    assert "Traceback" not in err
    step, *_ = run.load_checkpoint(folder)
    assert step == run.read_log(folder)[-1]["step"] and not (folder / "results.json").exists()
    process = _start(tmp_path, "--checkpoint-every", "100000", "--resume", str(folder), "--stop-at", str(step + 1),
                     processes=processes)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and run.read_log(folder)[-1]["step"] == step + 1, err


@pytest.mark.long
def test_the_second_signal_leaves_at_once(tmp_path):
    process = _start(tmp_path, "--batch", "1437")  # long steps
    _wait_for_step(tmp_path, 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("words, message", [
    (["--data", "/nowhere"], "error: no data folder /nowhere"),
    (["--batch", "33"], "error: the global batch of 33 is not a multiple of the 2 processes"),
])
def test_a_mistake_of_two_processes_is_one_line(tmp_path, words, message):
    process = _start(tmp_path, *words, processes=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith(message) and err.count("error:") == 1, err
    assert "Traceback" not in err and len(err.splitlines()) < 6


@pytest.mark.slow
@pytest.mark.parametrize("paper, most_kb", [
    ("shiftvit", 1), ("shiftvit", 200),  # the run folder, the first checkpoint
    pytest.param("vlora", 5000, marks=pytest.mark.long),  # the optimizer
])
def test_no_room_for_a_file_is_one_line_of_its_own(tmp_path, paper, most_kb):
    limited = ["bash", "-c", f"ulimit -f {most_kb}; exec \"$@\"", "bash"]
    command = [*limited, sys.executable, "-m", f"papers.{paper}", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    *before, last = re.split(r"[\r\n]", done.stderr.strip())
    assert done.returncode == 2 and re.match("error: .*(too large|so large|no space left)", last), done.stderr
    assert not any("Traceback" in line or "error: " in line for line in before), done.stderr


def test_more_gpus_than_there_are(tmp_path):
    command = [sys.executable, "-m", "common.run.launch", "64", "papers.shiftvit", "tiny"]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: 64 GPUs were asked for, torch sees")


@pytest.mark.parametrize("environment, message", [
    ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    ({"WORLD_SIZE": "two"}, "whole numbers"),
])
def test_half_an_environment_of_torchrun(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(run.UserError, match=message):
        run.start_world(run.Options(device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    assert run.start_world(run.Options(device="cpu")).size == 1


@pytest.mark.long
def test_no_port_is_opened(tmp_path):
    process = _start(tmp_path, processes=2)
    _wait_for_step(tmp_path, 1, process)
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            if state == "0A":
                listening.add((rest[5], local))  # inode, address
    family = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    mine = set()
    for pid in [str(process.pid), *family.split()]:
        for link in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{link}")
            mine |= {address for inode, address in listening if target == f"socket:[{inode}]"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    everywhere = {address for address in mine if set(address.split(":")[0]) == {"0"}}
    assert not everywhere, f"ports on all interfaces: {json.dumps(sorted(everywhere))}"
