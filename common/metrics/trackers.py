"""Trackers run, resumed and measured: one interface, one loop over sequences, the benchmarks' files.

A paper's ``evaluate.py`` describes itself by a `Paper` and hands it to `main`, its ``demo.py`` to
`common.metrics.tracker_demo.main`, its ``vot.py`` to `common.metrics.vot.main`; its ``train.py`` calls `compare`.
A result folder holds::

    <dataset>/<sequence>.csv    x, y, w, h (zero-based), score, seconds, seconds of reading for each frame
    <dataset>.zip               the same as the benchmark wants it handed in
    <dataset>.json, .png        scores of every sequence, and curves
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from common import run
from common.data import tracking as data
from common.metrics import tracking
from common.metrics.baselines import BASELINES
from common.run import UserError, World

Box = tuple[float, float, float, float]
# How a data set's sequences are scored unless asked otherwise. VOT's own measures are its toolkit's (see vot.py).
RULES = {"otb": "otb", "vot": "otb", "lasot": "lasot", "trackingnet": "trackingnet", "got10k": "got10k"}
# Sequences of the test sets that need no server.
WHOLE = {"otb": 100, "lasot": 280}
COLORS = {"truth": "lime", "tracker": "red", "still": "white", "correlation": "deepskyblue"}
PANELS = {"success": ("auc", "ao"), "precision": ("precision",), "norm_precision": ("norm_precision",)}


class Tracker(Protocol):
    """What is evaluated: given a target's box in one frame, it finds the target in the frames that follow.

    Frames are (H, W, 3) uint8 RGB. Boxes are x, y, w, h in pixels, zero-based: the image is [0, W) x [0, H).
    """

    def init(self, frame: np.ndarray, box: Box) -> None:
        """Starts on a new target; whatever was known of another one is forgotten."""

    def track(self, frame: np.ndarray) -> tuple[Box, float]:
        """(box, score) of the target in the next frame; the score is the tracker's own, higher is surer."""


# What trackers share --------------------------------------------------------------------------------------


def hann_window(grid: int) -> torch.Tensor:
    """(grid * grid), row by row: the outer product of two Hann windows whose ends are zero."""
    window = torch.hann_window(grid, periodic=False)
    return torch.outer(window, window).flatten()


def keep_inside(box, width: int, height: int, margin: float = 10) -> Box:
    """The part of a box x, y, w, h (px) inside the frame, moved or enlarged so that its sides are at least `margin`."""
    x, y, w, h = (float(v) for v in box)
    left, right = min(max(x, 0.0), width - margin), min(max(x + w, margin), width)
    top, bottom = min(max(y, 0.0), height - margin), min(max(y + h, margin), height)
    return left, top, max(right - left, margin), max(bottom - top, margin)


# The loop -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A tracker's answer to one sequence of N frames."""

    boxes: np.ndarray
    """(N, 4) zero-based, the given one first"""
    scores: np.ndarray
    """(N,), NaN for the first frame"""
    seconds: np.ndarray
    """(N,) in `Tracker.init`, then `Tracker.track`"""
    read_seconds: np.ndarray
    """(N,) reading and decoding the frame"""
    size: tuple[int, int]
    """(width, height) of the first frame"""
    settings: dict[str, Any]
    hardware: str
    """what the seconds were measured on"""


def evaluate(
    tracker: Tracker, sequences: Sequence[data.Sequence], out: Path, *, settings: Mapping[str, Any],
    world: World | None = None,
) -> None:
    """Runs a tracker over sequences and writes ``OUT/<dataset>/<name>.csv`` for each.

    Frames are read one at a time. A file appears when its sequence is finished, so a killed evaluation started again
    goes on with the first unfinished sequence. `settings` is what the answers depend on (JSON values): a file that
    is damaged or was made under other settings is made anew. Under torchrun the ranks share the sequences out, and
    all return when all files are there.
    """
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    settings = json.loads(json.dumps(settings))
    mine = sorted(sequences, key=len, reverse=True)[rank::ranks]  # the longest first: ranks finish together
    due = [s for s in mine if not _finished(s, out, settings)]
    total = sum(map(len, mine))
    with tqdm(total=total, initial=total - sum(map(len, due)), desc="tracking", unit="frame", leave=False,
              disable=None if rank == 0 else True, dynamic_ncols=True) as bar:
        for sequence in due:
            bar.set_postfix_str(sequence.name, refresh=False)
            _write_result(_path(sequence, out), _follow(tracker, sequence, settings, bar))
    if ranks > 1:
        dist.barrier()


def _follow(tracker: Tracker, sequence: data.Sequence, settings: dict[str, Any], bar: tqdm) -> Result:
    first = tuple(sequence.boxes[0].tolist())
    if not (np.isfinite(first).all() and min(first[2:]) > 0):
        raise UserError(f"{sequence.name}: a tracker starts from the first frame's box, and that is {first}")
    rows = []
    for path in sequence.frames:
        began = time.perf_counter()
        try:
            frame = data.read_frame(path)
        except OSError as error:
            raise UserError(f"cannot evaluate: {error}") from None
        read = time.perf_counter()
        if rows:
            box, value = tracker.track(frame)
            if len(box) != 4:
                raise TypeError(f"a tracker's box is x, y, w, h; {type(tracker).__name__} returned {box}")
        else:
            tracker.init(frame, first)
            box, value, size = first, np.nan, frame.shape[1::-1]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or reading the next frame would hide what the tracker still computes
        rows.append([*map(float, box), float(value), time.perf_counter() - read, read - began])
        bar.update()
    table = np.array(rows)
    return Result(table[:, :4], *table.T[4:], size, settings, run.hardware())


def _path(sequence: data.Sequence, out: Path) -> Path:
    return out / sequence.dataset / f"{sequence.name}.csv"


def _finished(sequence: data.Sequence, out: Path, settings: Mapping[str, Any]) -> bool:
    try:
        result = read_result(_path(sequence, out))
    except (OSError, ValueError):
        return False
    fits = len(result.boxes) == len(sequence) and np.array_equal(result.boxes[0], sequence.boxes[0])
    return fits and result.settings == settings


def _write_result(path: Path, result: Result) -> None:
    header = {"frames": len(result.boxes)} | {key: getattr(result, key) for key in ("size", "settings", "hardware")}
    table = np.column_stack([result.boxes, result.scores, result.seconds, result.read_seconds]).tolist()
    rows = [",".join(map(repr, row)) for row in table]
    _write_whole(path, "\n".join([f"# {json.dumps(header)}", *rows, "# end", ""]).encode())


def read_result(path: Path) -> Result:
    """The result in a file of `evaluate`; ValueError if it is not whole."""
    try:
        header, *rows, end = path.read_text().splitlines()
        header = json.loads(header.removeprefix("# "))
        table = np.array([row.split(",") for row in rows], dtype=np.float64)
        if end != "# end" or table.shape != (header["frames"], 7):
            raise ValueError("not whole")
        return Result(table[:, :4], *table.T[4:], tuple(header["size"]), header["settings"], header["hardware"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result file: {error}") from None


def _write_whole(path: Path, content: bytes) -> None:
    """So that a reader finds the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# What the files say ---------------------------------------------------------------------------------------


def results(sequences: Sequence[data.Sequence], out: Path) -> list[Result]:
    """The sequences' results; `UserError` for one that is missing, cut short or of another length."""
    found = []
    for sequence in sequences:
        try:
            found.append(read_result(_path(sequence, out)))
        except (OSError, ValueError) as error:
            raise UserError(f"no result of {sequence.name}: {error}; evaluate it again") from None
        if (boxes := len(found[-1].boxes)) != len(sequence):
            raise UserError(f"{_path(sequence, out)} has {boxes} boxes, its sequence {len(sequence)} frames")
    return found


def dataset_of(sequences: Sequence[data.Sequence]) -> str:
    """The one data set that sequences are from."""
    names = sorted({sequence.dataset for sequence in sequences})
    if len(names) != 1:
        raise UserError(f"sequences of one data set are scored together, not of {', '.join(names) or 'none'}")
    return names[0]


def scorable(sequences: Sequence[data.Sequence]) -> bool:
    """Whether all have ground truth beyond the first frame; GOT-10k's and TrackingNet's test sets have not."""
    return all(len(s) < 2 or np.isfinite(s.boxes[1:]).all(1).any() for s in sequences)


def score(sequences: Sequence[data.Sequence], out: Path, rule: str | None = None) -> tracking.Summary:
    """Scores of the result files in OUT under one of `tracking.RULES` (default: that of the sequences' data set)."""
    rule = rule or RULES[dataset_of(sequences)]
    tracks = []
    for sequence, result in zip(sequences, results(sequences, out)):
        to_file = (sequence.offset, sequence.offset, 0, 0)
        visible = None
        if rule == "got10k" and sequence.cover is not None:
            visible = np.asarray(sequence.cover) > 0
        elif rule.startswith("lasot") and sequence.absent is not None:
            visible = ~sequence.absent
        truth, boxes = sequence.boxes + to_file, result.boxes + to_file
        tracks.append(tracking.Track(sequence.name, truth, boxes, visible, result.size))
    try:
        return tracking.RULES[rule](tracks)
    except ValueError as error:
        raise UserError(str(error)) from None


def speed(sequences: Sequence[data.Sequence], out: Path) -> dict[str, float]:
    """{'fps': with reading, 'fps_model': in the tracker alone}: frames per second of one process, starts included.

    Nothing if all results were made on another machine."""
    found = [result for result in results(sequences, out) if result.hardware == run.hardware()]
    if not found:
        return {}
    frames = sum(len(r.boxes) for r in found)
    model, read = (sum(x.sum() for x in column) for column in zip(*((r.seconds, r.read_seconds) for r in found)))
    return {"fps": float(frames / (model + read)), "fps_model": float(frames / model)}


def archive(sequences: Sequence[data.Sequence], out: Path, *, integers: bool = False) -> Path:
    """``OUT/<dataset>.zip``: the results as the benchmark takes them, in the coordinates of its own files.

    One NAME.txt of x,y,w,h per sequence; for GOT-10k NAME/NAME_001.txt and NAME/NAME_time.txt. Three decimals, or
    with `integers` truncated, as some trackers' published files are. A box that is not finite becomes 0,0,0,0.
    """
    dataset, content = dataset_of(sequences), io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for sequence, result in zip(sequences, results(sequences, out)):
            boxes = result.boxes + (sequence.offset, sequence.offset, 0, 0)
            boxes[~np.isfinite(boxes).all(1)] = 0
            text = _text(boxes, "%d" if integers else "%.3f")
            if dataset == "got10k":
                file.writestr(f"{sequence.name}/{sequence.name}_001.txt", text)
                file.writestr(f"{sequence.name}/{sequence.name}_time.txt", _text(result.seconds, "%.8f"))
            else:
                file.writestr(f"{sequence.name}.txt", text)
    _write_whole(out / f"{dataset}.zip", content.getvalue())
    return out / f"{dataset}.zip"


def _text(table: np.ndarray, number: str) -> str:
    np.savetxt(stream := io.StringIO(), table, fmt=number, delimiter=",")
    return stream.getvalue()


def plot(
    path: Path, summaries: Mapping[str, tracking.Summary], published: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Success and precision curves of several trackers on the same sequences, their scores in the legend.

    `published` trackers (label -> {'auc': 71.2, ...}) have no curve, only their score in the legend.
    """
    from common.run import drawing

    kinds = next(iter(summaries.values())).curves
    figure, axes = drawing.plt.subplots(1, len(kinds), figsize=(4.4 * len(kinds), 3.6), squeeze=False,
                                        layout="constrained")
    labels = {"success": "overlap", "precision": "centre error in px", "norm_precision": "centre error / target size"}
    for axis, kind in zip(axes[0], kinds):
        def figure_of(scores, kind=kind):
            return next((scores[name] for name in PANELS[kind] if name in scores), None)

        for label, summary in summaries.items():
            axis.plot(*summary.curves[kind], label=f"{label} [{figure_of(summary.scores):.1f}]")
        for label, scores in (published or {}).items():
            if figure_of(scores) is not None:
                axis.plot([], [], " ", label=f"{label} [{figure_of(scores):.1f}]")
        axis.set(xlabel=labels[kind], ylabel="% of frames", title=kind.replace("norm_", "normalised "), ylim=(0, 100))
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    drawing.save(figure, path)


def draw_tracks(path: Path, sequences: Sequence[data.Sequence], out: Path, count: int = 6) -> None:
    """Evenly spread frames of each sequence with the true boxes, the tracker's under `out`, and those of `compare`'s
    baselines, where they were run."""
    from common.run import drawing

    homes = {"tracker": out, **{name: out / name for name in BASELINES if (out / name).is_dir()}}
    found = {name: results(sequences, home) for name, home in homes.items()}
    figure, axes = drawing.plt.subplots(
        len(sequences), count, figsize=(2.2 * count, 1.75 * len(sequences)), squeeze=False, layout="constrained"
    )
    for row, (line, sequence) in enumerate(zip(axes, sequences)):
        for axis, number in zip(line, np.linspace(0, len(sequence) - 1, count).astype(int)):
            axis.imshow(data.read_frame(sequence.frames[number]))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{sequence.name.removeprefix('GOT-10k_')}, {number + 1}", fontsize=7)
            boxes = {"truth": sequence.boxes} | {name: result[row].boxes for name, result in found.items()}
            for name, its in boxes.items():
                drawing.outline(axis, its[number], COLORS[name])
    figure.suptitle(", ".join(f"{name}: {COLORS[name]}" for name in ("truth", *homes)), fontsize=8)
    drawing.save(figure, path)


def measure(
    tracker: Tracker, sequences: Sequence[data.Sequence], out: Path, *, settings: Mapping[str, Any],
    world: World | None = None, rule: str | None = None, integers: bool = False,
) -> tuple[tracking.Summary | None, dict[str, float]]:
    """`evaluate`, then (scores, or None without ground truth, and `speed`); writes archive, curves and scores."""
    dataset = dataset_of(sequences)
    evaluate(tracker, sequences, out, settings=settings, world=world)
    summary = score(sequences, out, rule) if scorable(sequences) else None
    if world is None or world.is_main:
        archive(sequences, out, integers=integers)
        if summary:
            plot(out / f"{dataset}.png", {type(tracker).__name__: summary})
            run.write_json(out / f"{dataset}.json", {
                "rule": summary.rule, "scores": summary.scores, "sequences": summary.sequences, "settings": settings})
    return summary, speed(sequences, out)


def metrics(
    dataset: str, scores: Mapping[str, float], recipe: Any = None, *, comparable: bool = False, label: str = ""
) -> list[dict[str, Any]]:
    """Rows of results.json, named "got10k ao" (with a `label`: "got10k ao, still").

    Scores are percent, 'fps...' frames per second. Rows without a label stand beside the paper's figures,
    `recipe.paper_scores` (such as {"got10k ao": 69.9}) and `recipe.paper_source`. Speeds are never comparable.
    """
    rows = []
    for key, value in scores.items():
        fast = key.startswith("fps")
        row = run.metric(f"{dataset} {key}", value, "frames/s" if fast else "%")
        if label:
            row["name"] += f", {label}"
        elif recipe and row["name"] in recipe.paper_scores:
            row |= {"paper_value": recipe.paper_scores[row["name"]], "paper_source": recipe.paper_source}
            row["comparable"] = comparable and not fast
        rows.append(row)
    return rows


def compare(
    paper: Paper, folder: Path, sequences: Sequence[data.Sequence], world: World, *, baselines: bool = True,
    each: bool = False,
) -> list[dict[str, Any]]:
    """The tracker of a finished run and, if asked, the baselines on its test sequences: rows of results.json.

    For every data set the headline score (AO or AUC) of the tracker, then of the baselines; with `each` the same of
    every sequence ("otb/Bolt auc, still"); at last the tracker's speed, with reading and without. Boxes, curves and all
    scores are under tracking/ in the run folder.
    """
    tracker, recipe, settings, _ = paper.load(folder, None, world)
    rows, single, speeds = [], [], []
    for dataset in dict.fromkeys(sequence.dataset for sequence in sequences):
        its = [sequence for sequence in sequences if sequence.dataset == dataset]
        for label, (candidate, about, out) in _entrants(tracker, settings, folder / "tracking", baselines).items():
            summary, speeds_of_it = measure(candidate, its, out, settings=about, world=world)
            headline = next(iter(summary.scores))  # ao or auc
            rows += metrics(dataset, {headline: summary.scores[headline]}, recipe, label=label)
            for name, scores in summary.sequences.items() if each else ():
                single += metrics(f"{dataset}/{name}", {headline: scores[headline]}, label=label)
            if not label:
                speeds += metrics(dataset, speeds_of_it, recipe)
    return rows + single + speeds


def _entrants(
    tracker: Tracker, settings: dict[str, Any], out: Path, baselines: bool
) -> dict[str, tuple[Tracker, dict[str, Any], Path]]:
    """label -> (tracker, settings, folder of its results); the label of the tracker itself is empty."""
    chosen = BASELINES if baselines else {}
    return {"": (tracker, settings, out)} | {
        name: (make(), {"baseline": name}, out / name) for name, make in chosen.items()
    }


# Command lines --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paper:
    """A paper that tracks.

    Its recipes have `dataset` ("sequences": the built-in set), `paper_scores` ({"got10k ao": 69.9, ...}) and
    `paper_source`. Its checkpoints hold the network as "model"; a training that followed the paper in everything
    says so by `"comparable": True` in the checkpoint's state.
    """

    name: str
    recipes: Mapping[str, Any]
    build: Callable[[Any], torch.nn.Module]
    """recipe -> network"""
    tracker: Callable[[torch.nn.Module, Any, World], Tracker]
    """(network in eval mode on `world.device`, recipe, world) -> tracker"""
    convert: Callable[[Mapping[str, torch.Tensor], torch.nn.Module], Mapping[str, torch.Tensor]]
    """(state dict of a file, ours or the authors', and the network) -> state dict of the network"""
    official: Callable[[Mapping[str, torch.Tensor]], bool] = lambda _weights: False
    """Whether a file's state dict is the authors': of files, the scores of these alone stand beside the paper's."""
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How its figures are scored, by data set, where that is not the data set's own rule."""

    def rule(self, dataset: str) -> str:
        return self.rules.get(dataset, RULES[dataset])

    def load(self, checkpoint: Path, name: str | None, world: World) -> tuple[Tracker, Any, dict[str, Any], bool]:
        """(tracker, recipe, settings for `evaluate`, may its scores stand beside the paper's?).

        `checkpoint` is a run folder, whose newest model and own recipe are taken, or a file of weights for the
        recipe called `name`.
        """
        if checkpoint.is_dir():
            found = run.load_checkpoint(checkpoint) if (checkpoint / "config.json").is_file() else None
            if not found:
                raise UserError(f"{checkpoint} is no run folder with a whole checkpoint")
            _, weights, state = found
            config = json.loads((checkpoint / "config.json").read_text())
            try:
                recipe = type(next(iter(self.recipes.values())))(**config["recipe"])
            except TypeError as error:
                raise UserError(f"{checkpoint} is no tracker's run of this version: {error}") from None
            network, comparable = self.build(recipe), bool(state.get("comparable", False))
            network.load_state_dict(weights["model"])
        else:
            if name not in self.recipes:
                raise UserError(f"a file of weights needs --recipe, one of {', '.join(self.recipes)}; got {name!r}")
            recipe, weights = self.recipes[name], run.load_weights(checkpoint)
            network, comparable = self.build(recipe), self.official(weights)
            try:
                network.load_state_dict(self.convert(weights, network))
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{checkpoint} does not fit the recipe {name}: {reason}") from None
        digest = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
        settings = {
            "paper": self.name, "recipe": dataclasses.asdict(recipe), "weights": digest.hexdigest()[:16],
            "precision": str(world.amp),
        }
        return self.tracker(network.to(world.device).eval(), recipe, world), recipe, settings, comparable


def data_folder(recipe: Any, folder: Path | None) -> Path:
    """Where a recipe's sequences are: as given, or the built-in ones for a recipe meant for them."""
    if folder:
        return folder
    if recipe.dataset == "sequences":
        from common.data.tiny.sequences import sequences

        return sequences()
    raise UserError(f"this recipe is meant for {recipe.dataset}: give the sequences' folder with --data")


def shares(recipe: Any) -> dict[str, float] | None:
    """`recipe.shares` by data set, as `pairs.Pairs` takes them for weights; None where there are none: equal ones."""
    if not recipe.shares:
        return None
    if len(recipe.shares) != len(recipe.datasets) or min(recipe.shares) <= 0:
        raise UserError(
            f"--shares {recipe.shares}: expected a probability above 0 for each of {', '.join(recipe.datasets)}"
        )
    return dict(zip(recipe.datasets, recipe.shares))


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, or file of weights (.safetensors, .pth)."""
    recipe: str | None = None
    """Recipe that names the model; a run folder knows its own."""
    data: Path | None = None
    """Folder of sequences: OTB, GOT-10k, LaSOT, TrackingNet or VOT."""
    split: str | None = None
    """train, val or test, where the data have splits."""
    rule: str | None = None
    """How to score, if not as the paper's figures are: one of common.metrics.tracking.RULES."""
    out: Path | None = None
    """Folder of results, kept and completed; default: tracking/ in the run folder, or beside the file."""
    baselines: bool = False
    """Also run the box held still and normalised cross-correlation."""
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
    if not args.checkpoint.exists():
        raise UserError(f"no checkpoint at {args.checkpoint}")
    tracker, recipe, settings, comparable = paper.load(args.checkpoint, args.recipe, world)
    sequences = data.open_sequences(data_folder(recipe, args.data), args.split or (None if args.data else "val"))
    dataset = dataset_of(sequences)
    rule = args.rule or paper.rule(dataset)
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    out = args.out or folder / "tracking"
    comparable = comparable and WHOLE.get(dataset) == len(sequences) and rule == paper.rule(dataset)

    rows, summaries = [], {}
    for label, (candidate, its_settings, place) in _entrants(tracker, settings, out, args.baselines).items():
        summary, speeds = measure(
            candidate, sequences, place, settings=its_settings, world=world, rule=rule, integers=args.integers
        )
        scores = (summary.scores if summary else {}) | speeds
        rows += metrics(dataset, scores, recipe, comparable=comparable, label=label)
        summaries[label or paper.name] = summary
    if not world.is_main:
        return
    for row in rows:
        published = f"   the paper: {row['paper_value']}" if row["paper_value"] is not None else ""
        note = "" if row["comparable"] or not published else " (not comparable)"
        print(f"{row['name']:>40} {row['value']:8.2f} {row['unit']}{published}{note}")
    print(f"{len(sequences)} sequences, {sum(map(len, sequences))} frames, rule {rule}, {args.checkpoint}")
    if summaries[paper.name]:
        its = {row["name"].split(maxsplit=1)[1]: row["paper_value"] for row in rows if row["paper_value"] is not None}
        note = "" if comparable else ", not comparable"
        plot(out / f"{dataset}.png", summaries, {f"{paper.name}, the paper{note}": its})
    else:
        print(f"no ground truth here: hand in {out / dataset}.zip at the benchmark's server")
    about = {"checkpoint": str(args.checkpoint), "sequences": len(sequences), "rule": rule, "metrics": rows}
    run.write_json(out / "evaluation.json", about | run.environment())
