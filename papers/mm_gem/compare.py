"""The paper's comparison: the objectives together and apart, and where [CAP] stands; tables of the README.

``python -m papers.mm_gem flickr8k_objectives --data FOLDER`` trains and compares; ``--resume auto`` goes on where it
was killed. Long texts are asked of the trained models, by evaluation alone.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import run
from papers.mm_gem import build, features, linear_map
from papers.mm_gem.data import data_folder, open_captions
from papers.mm_gem.embedder import load
from papers.mm_gem.evaluate import Validation, evenly_spread, retrieval
from papers.mm_gem.figures import draw_objectives
from papers.mm_gem.recipes import RECIPES, Recipe

MEMBERS = {
    "both": {}, "embedding": {"objectives": "embedding"}, "captions": {"objectives": "generation"},
    "cap_first": {"cap_position": "first"},
}
CUTS = (8, 16, 32)
"""Tokens that a long text is cut to, [EMB] not counted."""
LONG = ("in order", "shuffled", *(f"first {cut} tokens" for cut in CUTS))
WAYS = ("image -> text", "text -> image")
COLUMNS = {
    **{f"{way} R@{k}": run.Column(f"{way} R@{k}, %") for way in WAYS for k in (1, 5, 10)},
    "CIDEr-D": run.Column("CIDEr-D", "", 3), "BLEU-4": run.Column("BLEU-4", "", 3),
    "ROUGE-L": run.Column("ROUGE-L", "", 3),
    **{f"five captions {how}, text -> image R@1": run.Column(f"five captions {how}, text -> image R@1, %")
       for how in LONG},
}


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Trains each member with each seed and reports, the linear map beside them; returns the comparison's folder."""
    run.check_members(recipe.compare, MEMBERS)
    members = {one: replace(recipe, compare=(), **MEMBERS[one]) for one in recipe.compare}
    return run.sweep(
        "mm_gem", name, recipe, options, world, members, train, COLUMNS, title="objectives",
        scores=partial(scores, members=members, options=options, world=world),
        fixed=partial(floor, recipe=recipe, options=options), picture=partial(picture, columns=COLUMNS),
    )


def scores(
    home: Path, label: str, *, members: Mapping[str, Recipe], options: run.Options, world: run.World
) -> dict[str, float]:
    """All metrics of a run, and how its model finds images by long texts."""
    found = run.read_scores(home)
    recipe = members[label]
    if recipe.objectives != "generation" and world.is_main:
        embedder = load(home, world, options.workers)
        shown = Validation.of(open_captions(data_folder(recipe, options.data), "val"), [], recipe.eval_rows)
        found |= long_texts(embedder, shown)
    return found


def long_texts(embedder: Any, shown: Validation) -> dict[str, float]:
    """text -> image R@1, in percent, of all captions of an image as one text: as they come, in another order, and cut.

    A cut text is the first, so many tokens of it: what a model with a short context would read.
    """
    v = embedder.images(shown.pictures)
    shuffle = random.Random(0)
    others = [shuffle.sample(texts, len(texts)) for texts in shown.truths]
    whole = [" ".join(texts) for texts in shown.truths]
    tokenizer = embedder.processor.tokenizer
    rows = tokenizer(whole, add_special_tokens=False, split_special_tokens=True).input_ids
    found = {}
    for how, texts in zip(LONG, [
        whole, [" ".join(texts) for texts in others],
        *([tokenizer.decode(row[:cut]) for row in rows] for cut in CUTS),
    ]):
        both = retrieval(v @ embedder.texts(texts).mT, torch.eye(len(v), dtype=torch.bool))
        found[f"five captions {how}, text -> image R@1"] = both["text -> image R@1"][0]
    return found


def floor(_folder: Path, *, recipe: Recipe, options: run.Options) -> dict[str, dict[str, float]]:
    """What a linear map from the same features to counts of words finds: of as many images as are trained on, and of
    1,500 of them."""
    root = data_folder(recipe, options.data)
    run.seed_all(options.seed)
    processor = build.processor(recipe)
    model = build.model(recipe, processor)
    build.choose_trained(model, recipe)
    sets = [open_captions(root, split) for split in ("train", "val")]
    kept = [features.keep(model, processor, images, options.workers) for images in sets]
    rows = [evenly_spread(len(sets[0]), len(sets[0])), evenly_spread(len(sets[1]), recipe.eval_rows)]
    means = [torch.stack([each[i][0].float().mean((1, 2)) for i in its]) for each, its in zip(kept, rows)]
    captions, truths = ([images.captions(i) for i in its] for images, its in zip(sets, rows))
    texts = [text for its in truths for text in its]
    owner = torch.tensor([i for i, its in enumerate(truths) for _ in its])
    relevant = owner == torch.arange(len(truths))[:, None]
    scored = {}
    for count in sorted({min(1500, len(captions)), len(captions)}):
        chosen = evenly_spread(len(captions), count)
        found = linear_map.similarity(means[0][chosen], [captions[i] for i in chosen], means[1], texts)
        recalls = retrieval(found, relevant)
        scored[f"linear map of {count:,} images"] = {key: value for key, (value, _) in recalls.items()}
    return scored


def picture(folder: Path, _runs: Mapping[str, list[Path]], *, columns: Mapping[str, run.Column]) -> None:
    rows = run.by_member(run.read_json(folder / "results.json")["metrics"], columns)
    draw_objectives(folder / "objectives.png", rows, LONG)


# Recipes that differ in nothing but their objectives.
FAMILIES = (
    ("tiny",), ("objectives_both", "objectives_embedding", "objectives_generation"),
    ("smollm2", "smollm2_embedding", "smollm2_generation"),
)


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each family with records a table with a column for each recipe and a row for each score."""
    runs = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        runs[record["recipe"]].append(record)
    found = [{name: runs[name] for name in family if name in runs} for family in FAMILIES]
    return "\n".join(_table(family) for family in found if family)


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    first = next(iter(runs.values()))[0]
    seeds = "; ".join(f"{name} {', '.join(str(r['seed']) for r in found)}" for name, found in runs.items())
    scores = {name: [{m["name"]: m for m in r["metrics"]} for r in found] for name, found in runs.items()}
    names = dict.fromkeys(metric for found in scores.values() for metric in found[0])
    rows = [
        f"| {metric} | {' | '.join(_cell([s.get(metric) for s in found]) for found in scores.values())} |"
        for metric in names
    ]
    return "\n".join([
        f"{first['data']}. Seeds: {seeds}.", "",
        f"| score | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|", *rows, "",
    ])


def _cell(metrics: list[dict[str, Any] | None]) -> str:
    """Mean ± sample standard deviation."""
    if None in metrics:
        return ""
    values, places = [metric["value"] for metric in metrics], 1 if metrics[0]["unit"] == "%" else 2
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread} {metrics[0]['unit']}".strip()


COMPARISONS = [name for name, recipe in RECIPES.items() if recipe.compare]
README_PARTS = {
    "compare": tables, "objectives": lambda records: run.tables(records, COMPARISONS, COLUMNS, "objectives"),
}
