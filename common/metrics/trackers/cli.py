"""The command line of a paper's evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import run
from common.data import tracking as data
from common.metrics import evaluation, tracking
from common.metrics.trackers.draw import plot
from common.metrics.trackers.files import results
from common.metrics.trackers.loop import device_of
from common.metrics.trackers.paper import Paper, data_folder, entrants, evaluate_and_score
from common.metrics.trackers.protocol import dataset_of
from common.metrics.trackers.score import metrics
from common.run import UserError


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, file of weights (.safetensors, .pth), or shipped[:NAME]."""
    recipe: str | None = None
    """Recipe that names the model; a run folder knows its own."""
    data: Path | None = None
    """Folder of sequences: OTB, GOT-10k, LaSOT, TrackingNet or VOT."""
    split: str | None = None
    """train, val or test, where the data have splits."""
    rule: str | None = None
    """How to score, if not as the paper's figures are: one of common.metrics.tracking.RULES."""
    out: Path | None = None
    """Folder of results, kept and completed; default: tracking/ in the run folder, or beside the file;
    of shipped weights runs/PAPER/shipped/tracking."""
    baselines: bool = False
    """Also run the static box and template matching by normalised cross-correlation."""
    fresh: bool = False
    """Track all sequences anew; else those that were tracked by these weights before are taken from --out."""
    integers: bool = False
    """Hand in boxes truncated to integers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(paper: Paper) -> None:
    """The command line of ``papers.<name>.evaluate``."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.evaluate", description="Scores of a tracker.")
    if args.rule not in (None, *tracking.RULES):
        raise UserError(f"no rule {args.rule!r}; there are {', '.join(tracking.RULES)}")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    sequences = data.open_sequences(args.data, args.split) if args.data else []  # before a network is built
    loaded = paper.load(args.checkpoint, args.recipe, world)
    sequences = sequences or data.open_sequences(data_folder(loaded.recipe, None), args.split or "val")
    usual = paper.protocol(dataset_of(sequences))
    protocol = replace(usual, rule=args.rule or usual.rule, integers=args.integers)
    home = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    out = args.out or (home if args.checkpoint.exists() else Path("runs") / paper.name / "shipped") / "tracking"
    published, comparable = paper.figures(loaded.recipe, protocol), paper.comparable(loaded, protocol, sequences)

    rows, summaries = [], {}
    for label, tracker, settings, home in entrants(loaded, out, args.baselines):
        summary, fps = evaluate_and_score(
            tracker, sequences, home, protocol=protocol, settings=settings, world=world, fresh=args.fresh
        )
        scores = (summary.scores if summary else {}) | fps
        beside = {} if label else {
            "published": published, "source": loaded.recipe.paper_source, "comparable": comparable}
        rows += metrics(protocol.name, scores, label=label, **beside)
        summaries[label or paper.name] = summary
    if world.is_main:
        evaluation.print_rows(rows)
        print(f"{len(sequences)} sequences, {sum(map(len, sequences))} frames, rule {protocol.rule}, {args.checkpoint}")
        elsewhere = sum(result.hardware != device_of(world) for result in results(sequences, out))
        if elsewhere:
            print(f"{elsewhere} of them were tracked on other hardware before: their speed is not counted")
        if summaries[paper.name]:
            note = "" if comparable else ", not comparable"
            plot(out / f"{protocol.name}.png", summaries, {f"{paper.name}, the paper{note}": published})
        else:
            print(f"no ground truth here: hand in {out / protocol.dataset}.zip at the benchmark's server")
        about = {"checkpoint": str(args.checkpoint), "sequences": len(sequences), "rule": protocol.rule}
        run.write_json(out / "evaluation.json", about | {"metrics": rows} | run.environment())
