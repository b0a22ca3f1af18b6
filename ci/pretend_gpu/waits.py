"""Where the host waits for the device."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROCESS = os.getpid()


class Waits:
    """Where the host waited for the device, by optimizer step: (what, line of source) -> how often."""

    def __init__(self):
        self.steps: list[collections.Counter[tuple[str, str]]] = [collections.Counter()]

    def note(self, what: str) -> None:
        self.steps[-1][what, where()] += 1

    @property
    def total(self) -> collections.Counter[tuple[str, str]]:
        return sum(self.steps, collections.Counter())

    @contextlib.contextmanager
    def counted(self) -> Iterator[collections.Counter[tuple[str, str]]]:
        """Of a block of code."""
        before = self.total
        found: collections.Counter[tuple[str, str]] = collections.Counter()
        yield found
        found.update(self.total - before)


waits = Waits()


def where() -> str:
    """The two innermost lines of this project, of what runs now."""
    frame, lines = sys._getframe(1), []
    while frame and len(lines) < 2:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and ".venv" not in path and not path.startswith(str(HERE)):
            lines.append(f"{path[len(str(ROOT)) + 1:]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "outside the project"


def report() -> None:
    """Waits by their line; PRETEND_REPORT: as JSON, with what broke compiled graphs."""
    if os.getpid() != PROCESS:
        return
    if path := os.environ.get("PRETEND_REPORT"):
        from torch._dynamo.utils import counters

        steps = [{" at ".join(key): n for key, n in step.items()} for step in waits.steps]
        breaks = {reason[:300]: n for reason, n in counters["graph_break"].items()}
        Path(path).write_text(json.dumps({"steps": steps, "graph_breaks": breaks}, indent=1), encoding="utf-8")
