"""First losses of every paper's tiny recipe: a change in them is a change in what is trained.

``python -m tools.golden PAPER`` writes them anew, to papers/PAPER/tests/golden.json, after an intended change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10


def first_losses(paper: str) -> list[float]:
    """Losses of the tiny recipe's first steps, on one CPU thread."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", f"papers.{paper}.train", "tiny", "--out", runs, "--device", "cpu",
                   "--stop-at", str(STEPS), "--log-every", "1"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        (log,) = Path(runs).glob(f"{paper}/tiny/*/log.jsonl")
        return [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines()][:STEPS]


def path(paper: str) -> Path:
    return ROOT / "papers" / paper / "tests" / "golden.json"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path(name).write_text(json.dumps(first_losses(name)) + "\n", encoding="utf-8")
        print(path(name), path(name).read_text(encoding="utf-8"), end="")
