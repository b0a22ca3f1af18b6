"""Two machines, made of two network namespaces on one: torchrun over both, one of them is lost, the run goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESSES = ("10.213.7.1", "10.213.7.2")


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces that a cable joins."""
    if not shutil.which("ip"):
        pytest.skip("no ip (iproute2): network namespaces cannot be made")
    names = [f"host{side}-{os.getpid()}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "del", name])
        cable = ["ip", "link", "add", "eth-a", "netns", names[0], "type", "veth", "peer", "eth-b", "netns", names[1]]
        joined = subprocess.run(cable, capture_output=True, text=True)
        if joined.returncode:
            pytest.skip(f"namespaces cannot be joined here: {joined.stderr.strip()}")
        for name, side, address in zip(names, "ab", ADDRESSES):
            for words in (f"addr add {address}/24 dev eth-{side}", f"link set eth-{side} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield names


@contextmanager
def job(hosts: list[str], runs: Path, *more: str, port: int):
    """The processes of a training of two machines, as README.md has it: the same line on each but for its rank."""
    with ExitStack() as stack:
        processes = []
        for rank, name in enumerate(hosts):
            log = stack.enter_context(open(runs / f"host{rank}.log", "ab"))
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"eth-{'ab'[rank]}"}
            line = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                    "--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port",
                    str(port), "-m", "papers.shiftvit", "smoke", "--device", "cpu", "--out", str(runs),
                    "--checkpoint-every", "4", *more]
            processes.append(subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log,
                                              start_new_session=True))
        try:
            yield processes
        finally:
            for name, process in zip(hosts, processes):
                lose(name)
                process.wait()


def lose(host: str) -> None:
    """Ends all that runs on it, at once."""
    running = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True)
    for number in map(int, running.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _scores(runs: Path) -> dict[str, float]:
    (path,) = runs.glob("shiftvit/smoke/*/results.json")
    return {row["name"]: row["value"] for row in json.loads(path.read_text())["metrics"]}


def _log(runs: Path) -> str:
    return "\n".join((runs / f"host{rank}.log").read_text(errors="replace")[-2000:] for rank in (0, 1))


@pytest.mark.long
def test_a_lost_host_loses_no_work(hosts, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with job(hosts, whole, port=29871) as processes:
        assert [process.wait(900) for process in processes] == [0, 0], _log(whole)

    with job(hosts, broken, port=29872) as (one, _other):
        deadline = time.monotonic() + 900
        while not list(broken.glob("shiftvit/smoke/*/checkpoints/step_*")):
            assert one.poll() is None and time.monotonic() < deadline, _log(broken)
            time.sleep(0.05)
        lose(hosts[1])  # the machine is gone, in the midst of a step
        assert one.wait(900) != 0, "a process went on without its peer"
    assert not list(broken.glob("shiftvit/smoke/*/results.json"))

    with job(hosts, broken, "--resume", "auto", port=29873) as processes:
        assert [process.wait(900) for process in processes] == [0, 0], _log(broken)
    assert _scores(broken) == _scores(whole)
