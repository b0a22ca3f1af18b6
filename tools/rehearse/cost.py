"""What a training costs: FLOPs, hours, memory and loader processes. `make plan` and `make rehearse` say the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from common.run import multiply_adds
from common.run.cases import Rehearsal, TrainingCost
from tools.rehearse.stage import Shown

# Dense peak of the vendors' data sheets, TFLOP/s, by autocast type; fp32 runs in TF32.
PEAK_TFLOPS = {
    "A100": {"bf16": 312, "fp32": 156},
    "H100 or H200": {"bf16": 989, "fp32": 495},
    "RTX 4090": {"bf16": 165, "fp32": 83},
}
UTILISATIONS = (0.10, 0.25)
"""Shares of the peak that training such networks reaches."""
CARDS_GB = (24, 40, 80, 141)
USABLE = 0.9
"""Share of a card's memory that the counted tensors may fill."""
PROCESSES = 16
"""Loader processes of each GPU that hours are told with: what machines of eight A100 have cores for."""
VIEWS = Path(__file__).parent / "views"
"""PAPER.json: seconds of a core for one training sample by recipe, as `make rehearse` measured them."""


@dataclass(frozen=True)
class Cost:
    """Of one recipe on one kind of card."""

    flops: float
    hours: tuple[float, float]
    """At the higher and the lower of `UTILISATIONS`, and no less than the loader takes."""
    loader_hours: float | None
    """What `PROCESSES` loader processes a GPU need; None: not measured."""
    processes: tuple[int, int] | None
    """Loader processes a GPU needs at the lower and the higher utilisation."""
    memory_gb: float

    def fits(self, card_gb: float) -> bool:
        return self.memory_gb <= USABLE * card_gb


def view_seconds(paper: str, recipe: str) -> float | None:
    path = VIEWS / f"{paper}.json"
    return json.loads(path.read_text()).get(recipe) if path.exists() else None


def cost(
    paper: str, recipe: str, work: Rehearsal, counted: TrainingCost, shown: Shown, *, card: str = "A100",
    precision: str = "bf16",
) -> Cost:
    """`counted` samples and epochs against a card's peak and the loader's measured pace."""
    macs = multiply_adds(counted.model, *counted.inputs) * work.cost
    samples = shown.steps * counted.batch
    flops = 6 * macs * samples
    peak = PEAK_TFLOPS[card][precision] * 1e12 * work.gpus
    compute = [flops / peak / share / 3600 for share in reversed(UTILISATIONS)]
    seconds = view_seconds(paper, recipe)
    loader = seconds and samples * seconds / (work.gpus * PROCESSES) / 3600
    processes = None
    if seconds:
        per_s = [samples / (hours * 3600) / work.gpus for hours in reversed(compute)]
        processes = tuple(max(1, math.ceil(rate * seconds)) for rate in per_s)
    hours = tuple(max(hours, loader or 0) for hours in compute)
    return Cost(flops, hours, loader or None, processes, shown.peak_bytes / 1e9)
