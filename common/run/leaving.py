"""Leaving a training early: Ctrl-C, SIGTERM, and all processes at the same step.

The first signal asks for a checkpoint at the next step, the second leaves at once. The processes of a training are
never more than a step apart, since each step's gradients are exchanged; so whoever is asked says, after step s, that
step s + 1 is the last, and all others read that before they have finished s + 1.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch.distributed as dist

_KEY = "leave after"
_asked: int | None = None  # the signal
_training = False


def listen(handlers: dict[int, Any] | None = None) -> dict[int, Any]:
    """Takes charge of both signals, in the main thread of a command, or gives them back; returns who had them."""
    global _asked
    _asked = None if handlers is None else _asked
    return {
        number: signal.signal(number, _handle if handlers is None else handlers[number])
        for number in (signal.SIGINT, signal.SIGTERM)
    }


def _handle(number: int, _frame: object) -> None:
    global _asked
    if _asked is not None or not _training:
        if not int(os.environ.get("RANK") or 0):
            os.write(sys.stderr.fileno(), f"\nleft at once, for {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)
    _asked = number


def training(now: bool) -> None:
    """Says whether steps are being made, after which a signal can wait for a checkpoint."""
    global _training
    _training = now


def last_step(step: int) -> bool:
    """Whether all processes leave after `step`, which they ask after each one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return _asked is not None
    store = dist.distributed_c10d._get_default_store()
    if _asked is not None:
        store.compare_set(_KEY, "", str(step + 1))
    return store.check([_KEY]) and int(store.get(_KEY)) <= step


def status() -> int | None:
    """The exit status that says which signal a command left for; None if it did not."""
    return None if _asked is None else 128 + _asked


def name() -> str:
    return "--stop-at" if _asked is None else signal.Signals(_asked).name
