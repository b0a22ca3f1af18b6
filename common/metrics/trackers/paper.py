"""What a paper that tracks tells, and the comparison at the end of its trainings."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import run
from common.data import tracking as data
from common.data.tiny.sequences import hard_sequences
from common.data.tiny.sequences import sequences as built_in_sequences
from common.metrics import evaluation, tracking
from common.metrics.trackers.baselines import BASELINES, FLOOR
from common.metrics.trackers.draw import plot
from common.metrics.trackers.files import archive
from common.metrics.trackers.loop import device_of, evaluate
from common.metrics.trackers.protocol import RULES, Protocol, Tracker
from common.metrics.trackers.score import metrics, scorable, score, sizes_lost, speed
from common.run import UserError, World, shipped


class Loaded(NamedTuple):
    """A checkpoint as a tracker."""

    tracker: Tracker
    recipe: Any
    settings: dict[str, Any]
    """What its answers depend on, see `settings_of`."""
    published: bool
    """Whether it is the paper's network: trained by an untouched recipe of the paper, or the authors' own file."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper that tracks.

    Its recipes have `dataset` ("sequences": the built-in set), `paper_scores` ({"got10k ao": 69.9, ...}) and
    `paper_source`. Its checkpoints hold the network as "model".
    """

    name: str
    recipes: Mapping[str, Any]
    build: Callable[[Any], torch.nn.Module]
    """recipe -> network"""
    make_tracker: Callable[[torch.nn.Module, Any, World], Tracker]
    """(network in eval mode on `world.device`, recipe, world) -> tracker"""
    convert_weights: evaluation.ConvertWeights = lambda weights, _network: weights
    float32: Callable[[Any], bool] = lambda _recipe: False
    """recipe -> whether its tracker computes in full precision where nobody asks for another."""
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By which rule its figures are scored, by data set, where that is not the data set's own."""

    def protocol(self, dataset: str) -> Protocol:
        """How the paper's figures on a data set are scored."""
        return Protocol(dataset, self.rules.get(dataset, RULES[dataset]))

    def figures(self, recipe: Any, protocol: Protocol) -> dict[str, float]:
        """The paper's figures of a recipe under a protocol, by score: {"auc": 71.2, ...}; none under another rule."""
        if protocol.rule != self.protocol(protocol.dataset).rule:
            return {}
        place = f"{protocol.dataset} "
        return {key.removeprefix(place): v for key, v in recipe.paper_scores.items() if key.startswith(place)}

    def comparable(self, loaded: Loaded, protocol: Protocol, sequences: Sequence[data.Sequence]) -> bool:
        """Whether scores may stand beside the paper's: its network, its rule, the whole test set."""
        same_rule = protocol.rule == self.protocol(protocol.dataset).rule
        return loaded.published and same_rule and data.is_whole(protocol.dataset, [s.name for s in sequences])

    def load(self, checkpoint: Path, name: str | None, world: World) -> Loaded:
        """A run folder, whose newest model and own recipe are taken, shipped weights, or a file for the recipe `name`.
        """
        checkpoint = shipped.path_of(self.name, checkpoint)
        if checkpoint.is_dir() or (name is None and shipped.is_run(checkpoint)):
            recipe, weights, _ = run.load_run(checkpoint, type(next(iter(self.recipes.values()))))
            what = f"{checkpoint} is no tracker's run of this version"
            network = run.built(lambda: self.build(recipe), weights["model"], what)
            said = shipped.header(checkpoint) or run.read_json(checkpoint / "config.json")
            published = evaluation.is_untouched(said.get("recipe_name"), recipe, self.recipes)
        else:
            if name not in self.recipes:
                raise UserError(f"a file of weights needs --recipe, one of {', '.join(self.recipes)}; got {name!r}")
            recipe = self.recipes[name]
            network = self.build(recipe)
            evaluation.load_file(checkpoint, network, self.convert_weights, f"the recipe {name}")
            published = evaluation.is_authors_file(checkpoint, network)
        world = world.in_full(self.float32(recipe))
        settings = settings_of(self.name, recipe, network, world)
        return Loaded(self.make_tracker(network.to(world.device).eval(), recipe, world), recipe, settings, published)


def settings_of(paper: str, recipe: Any, network: torch.nn.Module, world: World) -> dict[str, Any]:
    """All that a network's answers depend on, for `evaluate`: the recipe, a digest of the weights, the precision."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return {
        "paper": paper, "recipe": dataclasses.asdict(recipe), "weights": digest.hexdigest()[:16],
        "precision": str(world.amp),
    }


def evaluate_and_score(
    tracker: Tracker, sequences: Sequence[data.Sequence], out: Path, *, protocol: Protocol,
    settings: Mapping[str, Any], world: World | None = None, fresh: bool = False,
) -> tuple[tracking.Summary | None, dict[str, float]]:
    """`evaluate`, then (scores, or None without ground truth, and `speed`); writes archive, curves and scores."""
    evaluate(tracker, sequences, out, settings=settings, world=world, fresh=fresh)
    summary = score(sequences, out, protocol) if scorable(sequences) else None
    if world is None or world.is_main:
        archive(sequences, out, protocol)
        if summary:
            plot(out / f"{protocol.name}.png", {type(tracker).__name__: summary})
            run.write_json(out / f"{protocol.name}.json", {
                "rule": summary.rule, "scores": summary.scores, "sequences": summary.sequences, "settings": settings})
    return summary, speed(sequences, out, device_of(world))


class Entrant(NamedTuple):
    """One of those that are compared."""

    label: str
    """A key of `BASELINES`; of the paper's own tracker empty."""
    tracker: Tracker
    settings: dict[str, Any]
    out: Path
    """Folder of its results."""


def entrants(loaded: Loaded | None, out: Path, baselines: Iterable[str]) -> Iterator[Entrant]:
    """The paper's tracker, if one is given, and the baselines, keys of `BASELINES`."""
    if loaded:
        yield Entrant("", loaded.tracker, loaded.settings, out)
    for label in baselines:
        make = BASELINES[label]
        yield Entrant(label, make(), {"baseline": label}, out / make.folder)


def compare(
    paper: Paper, folder: Path, sequences: Sequence[data.Sequence], world: World, *, baselines: bool = True,
    each: bool = False,
) -> list[dict[str, Any]]:
    """The tracker of a finished run and, if asked, the baselines on its test sequences: rows of results.json.

    For every data set the headline score (AO or AUC) of the tracker, then of the baselines (`FLOOR`); with `each` the
    same of every sequence ("otb/Bolt auc, static box"), `sizes_lost`, and OpenCV's trackers among the baselines; at
    last the tracker's speed, with reading and without. Boxes, curves and all scores are under tracking/ in the run
    folder.
    """
    beside_it = (BASELINES if each else FLOOR) if baselines else ()
    loaded = paper.load(folder, None, world)
    rows, single, speeds = [], [], []
    for dataset in dict.fromkeys(sequence.dataset for sequence in sequences):
        its = [sequence for sequence in sequences if sequence.dataset == dataset]
        protocol = paper.protocol(dataset)
        beside = {
            "published": paper.figures(loaded.recipe, protocol), "source": loaded.recipe.paper_source,
            "comparable": paper.comparable(loaded, protocol, its),
        }
        for label, tracker, settings, out in entrants(loaded, folder / "tracking", beside_it):
            summary, fps = evaluate_and_score(tracker, its, out, protocol=protocol, settings=settings, world=world)
            headline = next(iter(summary.scores))  # ao or auc
            own = {} if label else beside
            rows += metrics(protocol.name, {headline: summary.scores[headline]}, label=label, **own)
            if each:
                for name, scores in summary.sequences.items():
                    single += metrics(f"{protocol.name}/{name}", {headline: scores[headline]}, label=label)
                name = f"{protocol.name} sizes lost" + (f", {label}" if label else "")
                single.append(run.metric(name, sizes_lost(its, out), "sequences"))
            if not label:
                speeds += metrics(protocol.name, fps, **own)
    return rows + single + speeds


def data_folder(recipe: Any, folder: Path | None) -> Path:
    """Where a recipe's sequences are: as given, or the built-in ones for a recipe meant for them."""
    return run.data_folder(recipe, folder, {"sequences": built_in_sequences, "hard_sequences": hard_sequences})


def shares(recipe: Any) -> dict[str, float] | None:
    """`recipe.shares` by data set, as `pairs.Pairs` takes them for weights; None where there are none: equal ones."""
    if not recipe.shares:
        return None
    if len(recipe.shares) != len(recipe.datasets) or min(recipe.shares) <= 0:
        raise UserError(
            f"--shares {recipe.shares}: expected a probability above 0 for each of {', '.join(recipe.datasets)}"
        )
    return dict(zip(recipe.datasets, recipe.shares))
