"""Runs that are killed at random moments, put on a full disk and started twice at once end as an undisturbed run does.

    make test-long ARGS="-k kill --kill-seed 4711"
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common import run

PAPERS = sorted(path.parent.name for path in run.ROOT.glob("papers/*/recipes.py"))
KILLS = 2  # of each trainer
MOST_STARTS = 8  # a run may end before its moment has come: then another one is started
HANGS_S = 1800  # a busy machine is no hang
# What is seen on disk before the seconds within which the process then dies.
EVENTS = {"a checkpoint is being written": 0.05, "evaluation begins": 0.5, "pictures are made": 1.0}
FULL_DISK = 'mount -t tmpfs -o "size=$1" tmpfs "$2"; "${@:4}"; status=$?; cp -a "$2"/. "$3"; exit $status'
FILES_CUT_SHORT = 'ulimit -f "$(($1 / 2048))"; "${@:4}"; status=$?; cp -a "$2"/. "$3"; exit $status'


@dataclass
class Fate:
    """What happens to a paper's runs."""

    fraction: float
    """Of an undisturbed run's life, at which one is killed."""
    event: str
    """At which another one is killed."""
    delay: float
    """After the event, as a fraction of its seconds."""
    checkpoints: float
    """That find room on the disk."""
    twice: bool
    """Whether it is started twice at once."""


def fates(seed: int) -> dict[str, Fate]:
    """The fractions, events and double starts are spread over the papers, and drawn within that."""
    rng, count = random.Random(seed), len(PAPERS)
    fractions = rng.sample([(i + rng.random()) / count for i in range(count)], count)
    events = rng.sample([list(EVENTS)[i % len(EVENTS)] for i in range(count)], count)
    twice = rng.sample([i % 3 == 0 for i in range(count)], count)
    return {
        paper: Fate(fraction, event, rng.random(), rng.uniform(1.3, 1.8), two)
        for paper, fraction, event, two in zip(PAPERS, fractions, events, twice)
    }


@dataclass
class Runs:
    """The runs of one paper's `smoke` in a folder."""

    paper: str
    out: Path
    logs: list[Path] = field(default_factory=list)

    def start(self, *more: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [
            *before, sys.executable, "-m", f"papers.{self.paper}", "smoke", "--device", "cpu", "--out", str(self.out),
            "--checkpoint-every", "4", *more,
        ]
        self.logs.append(self.out.with_name(f"{self.out.name}-{len(self.logs)}.txt"))
        with open(self.logs[-1], "wb") as log:
            return subprocess.Popen(
                command, cwd=run.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )

    def said(self, start: int = -1) -> str:
        return self.logs[start].read_text(encoding="utf-8", errors="replace")

    def end(self, process: subprocess.Popen, start: int = -1) -> None:
        assert process.wait(timeout=HANGS_S) == 0, self.said(start)

    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.out.glob(f"{self.paper}/smoke/*/config.json"))

    def unfinished(self) -> list[Path]:
        return [folder for folder in self.folders() if not run.finished(folder)]

    def saved(self) -> int:
        """The step at which the next start goes on."""
        return max((_step(path) for folder in self.unfinished()[-1:] for path in whole_checkpoints(folder)), default=0)

    def scores(self) -> list[dict[str, float]]:
        """The figures of each finished run, speeds aside."""
        records = [run.read_json(folder / "results.json") for folder in self.folders() if run.finished(folder)]
        return [{m["name"]: m["value"] for m in r["metrics"] if "/s" not in m["unit"]} for r in records]

    def seen(self, event: str) -> set[Path]:
        """What shows that the event has come, if it is more than before."""
        folders = self.folders()
        if event == "pictures are made":
            return {path for folder in folders if (path := folder / "pending.json").exists()}
        if event == "evaluation begins":
            return {path for folder in folders for path in whole_checkpoints(folder)}
        return {path for folder in folders for path in (folder / "checkpoints").glob("*")}

    def killed(self, *, after_s: float = 0, event: str = "", delay_s: float = 0) -> bool:
        """Starts or resumes a run and kills it; False if it ended before its moment came."""
        saved, seen = self.saved(), self.seen(event)
        process = self.start("--resume", "auto")
        began = time.monotonic()
        while process.poll() is None:
            if self.seen(event) - seen if event else time.monotonic() - began > after_s:
                time.sleep(delay_s)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        status = process.wait()
        assert status in (0, -signal.SIGKILL), self.said()
        self.went_on_from(saved)
        return status != 0

    def went_on_from(self, saved: int, start: int = -1) -> None:
        """Nothing was lost: the start took up the newest checkpoint, unless it did not come so far."""
        if found := re.search(r"steps (\d+) to", self.said(start)):
            assert int(found[1]) == saved, self.said(start)


def whole_checkpoints(folder: Path) -> list[Path]:
    ours = (folder / "checkpoints").glob("step_*")
    transformers = (path.parent for path in (folder / "checkpoints").glob("checkpoint-*/whole.json"))
    return [*ours, *transformers]


def _step(checkpoint: Path) -> int:
    return int(re.search(r"\d+$", checkpoint.name)[0])


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def fill_the_disk(runs: Runs, size: int) -> None:
    """A run on a disk of `size` bytes, whose folder then is where there is room again. Where no disk can be mounted,
    no file may be larger than half of that."""
    mountable = subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    script = FULL_DISK if mountable else FILES_CUT_SHORT
    kept, runs.out = runs.out, runs.out.with_name("small")
    for folder in (kept, runs.out):
        folder.mkdir()
    namespace = ("unshare", "-Urm") if mountable else ()
    process = runs.start(before=(*namespace, "bash", "-c", script, "bash", str(size), str(runs.out), str(kept)))
    assert process.wait(timeout=HANGS_S) == 2, runs.said()
    text = runs.said()
    assert "Traceback" not in text and sum("error: " in line for line in text.splitlines()) == 1, text
    runs.out = kept
    assert not mountable or runs.saved(), text


@pytest.mark.long
@pytest.mark.parametrize("paper", PAPERS)
def test_killed_runs_end_as_others(paper, tmp_path, pytestconfig):
    fate = fates(pytestconfig.getoption("--kill-seed"))[paper]
    print(fate)
    calm, runs = Runs(paper, tmp_path / "calm"), Runs(paper, tmp_path / "runs")
    began = time.monotonic()
    calm.end(calm.start())
    life = time.monotonic() - began
    (right,), (folder,) = calm.scores(), calm.folders()
    assert right

    largest = max(map(_bytes, whole_checkpoints(folder)))
    fill_the_disk(runs, round(fate.checkpoints * largest) + 2**19)  # the rest is small as long as it trains

    kills, after_s = 0, fate.fraction * life
    while kills < KILLS and len(runs.logs) < MOST_STARTS:
        at_event = {"event": fate.event, "delay_s": fate.delay * EVENTS[fate.event]}
        kills += runs.killed(**at_event) if kills else runs.killed(after_s=after_s)
        after_s *= 0.7  # what is resumed, or has the machine to itself, lives shorter
    assert kills == KILLS, "runs ended before their moments came"

    saved = runs.saved()
    first = runs.start("--resume", "auto")
    second = runs.start("--resume", "auto") if fate.twice else None
    if second:
        runs.end(second)
        runs.end(first, -2)
        places = {re.search(r"run folder (\S+)", runs.said(start))[1] for start in (-1, -2)}
        assert len(places) == 2, f"two starts in {places}"
    else:
        runs.end(first)
        runs.went_on_from(saved)
    assert not runs.unfinished()
    assert runs.scores() == [right] * len(runs.scores())
