"""The command line of a paper's evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import run
from common.data import tracking as data
from common.data.tiny.sequences import sequences as built_in_sequences
from common.metrics import evaluation, tracking
from common.metrics.trackers.baselines import FLOOR, WORDS
from common.metrics.trackers.draw import plot
from common.metrics.trackers.files import results
from common.metrics.trackers.loop import device_of
from common.metrics.trackers.paper import Paper, data_folder, entrants, evaluate_and_score
from common.metrics.trackers.protocol import dataset_of
from common.metrics.trackers.score import metrics
from common.run import UserError


@dataclass
class Arguments:
    checkpoint: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder, file of weights (.safetensors, .pth), or shipped[:NAME]; none: the --tracker alone."""
    weights: Path | None = None
    """The same, named."""
    tracker: tuple[Literal["static", "ncc", "kcf", "csrt"], ...] = ()
    """Baselines to run, alone or beside the checkpoint: the first box held still, template matching by normalised
    cross-correlation, OpenCV's KCF and CSRT."""
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
    """The same as --tracker static ncc."""
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
    if args.checkpoint and args.weights:
        raise UserError(f"one checkpoint is evaluated: {args.checkpoint} or {args.weights}, not both")
    checkpoint = args.checkpoint or args.weights
    labels = dict.fromkeys([*(FLOOR if args.baselines else ()), *(WORDS[word] for word in args.tracker)])
    if not (checkpoint or labels):
        raise UserError("nothing to evaluate: give a run folder, a file of weights or shipped, or --tracker csrt")
    loaded = paper.load(checkpoint, args.recipe, world) if checkpoint else None
    if not sequences:
        root = data_folder(loaded.recipe, None) if loaded else built_in_sequences()
        sequences = data.open_sequences(root, args.split or "val")
    usual = paper.protocol(dataset_of(sequences))
    protocol = replace(usual, rule=args.rule or usual.rule, integers=args.integers)
    out = args.out or _home(paper, checkpoint) / "tracking"
    published, comparable = {}, False
    if loaded:
        published, comparable = paper.figures(loaded.recipe, protocol), paper.comparable(loaded, protocol, sequences)

    rows, summaries = [], {}
    for label, tracker, settings, home in entrants(loaded, out, labels):
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
        what = checkpoint or ", ".join(labels)
        print(f"{len(sequences)} sequences, {sum(map(len, sequences))} frames, rule {protocol.rule}, {what}")
        elsewhere = sum(result.hardware != device_of(world) for result in results(sequences, home))
        if elsewhere:
            print(f"{elsewhere} of them were tracked on other hardware before: their speed is not counted")
        if all(summaries.values()):
            note = "" if comparable else ", not comparable"
            plot(out / f"{protocol.name}.png", summaries, {f"{paper.name}, the paper{note}": published})
        else:
            print(f"no ground truth here: hand in {out / protocol.dataset}.zip at the benchmark's server")
        about = {"checkpoint": str(checkpoint), "sequences": len(sequences), "rule": protocol.rule}
        run.write_json(out / "evaluation.json", about | {"metrics": rows} | run.environment())


def _home(paper: Paper, checkpoint: Path | None) -> Path:
    """Where results go: to the run, or beside the file; of shipped weights and of baselines alone to runs/."""
    if checkpoint is None or not checkpoint.exists():
        return Path("runs") / paper.name / ("shipped" if checkpoint else "baselines")
    return checkpoint if checkpoint.is_dir() else checkpoint.parent
