"""How well a model embeds and describes: ``python -m papers.mm_gem.evaluate CHECKPOINT --data FOLDER``.

CHECKPOINT is a run folder, or a model folder as transformers saves it. FOLDER has a validation split in COCO's format;
with --images FOLDER (classes as folders), zero-shot classification of those instead, by the scores of CLIP's usual
benchmark: top-1, top-5, and the mean of the classes' own shares. Definitions:

image -> text, text -> image R@K   COCO's retrieval by cosine similarity, over images and over captions
long text                          the same with all captions of an image joined to one text
zero-shot                          nearest class, its vector the unit mean of its prompts' embeddings
CIDEr-D, BLEU-4, ROUGE-L           of generated captions; CIDEr-D on its own scale of 0 to 10
region retrieval                   images with boxes of several phrases: is the nearest box to a phrase one of its own?
region captions                    CIDEr-D of what is generated for a box against its phrase, and exact matches
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from common import run
from common.data import images as image_sets
from common.data.captions import Region
from common.data.picture import Unreadable
from common.data.text import printable, read_text
from common.data.tiny.scenes import COLORS, SHAPES
from common.metrics import captions as metrics
from common.metrics.retrieval import recall_at
from common.run import UserError, model_folder, shipped
from papers.mm_gem.data import Captioned, corners, data_folder, open_captions, regions_if_there
from papers.mm_gem.embedder import Chosen, Embedder, Files, Pictures, load
from papers.mm_gem.processing import Box
from papers.mm_gem.prompts import CLIP, SCENES, SEVEN
from papers.mm_gem.recipes import RECIPES, Recipe

Scores = dict[str, tuple[float, str]]


# Measures --------------------------------------------------------------------------------------------------


def retrieval(similarity_IT: Tensor, relevant_IT: Tensor, note: str = "") -> Scores:
    """R@1/5/10 both ways; relevant (I, T) says which texts belong to which images."""
    to_image = recall_at(similarity_IT.mT, relevant_IT.mT)
    both = {"image -> text": recall_at(similarity_IT, relevant_IT), "text -> image": to_image}
    return {f"{note}{way} {k}": (value, "%") for way, found in both.items() for k, value in found.items()}


def class_vectors(prompts_CMD: Tensor) -> Tensor:
    """Embeddings of C classes' M prompts -> (C, D): the unit mean of the unit embeddings."""
    return F.normalize(F.normalize(prompts_CMD, dim=-1).mean(1), dim=-1)


def named_classes(embedder: Embedder, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The vectors (C, D) of classes by their names."""
    prompts = embedder.texts([template.format(name) for name in classes for template in templates], "prompts")
    return class_vectors(prompts.view(len(classes), len(templates), -1))


def zero_shot(v_ID: Tensor, labels: Sequence[int], classes_CD: Tensor) -> Tensor:
    """Whether each image's nearest class is its own. (I,) bool"""
    return (v_ID @ classes_CD.mT).argmax(1) == torch.as_tensor(labels)


def region_hits(
    v_RD: Tensor, t_PD: Tensor, regions: Sequence[Region], phrases: Sequence[str]
) -> tuple[list[bool], float]:
    """For each phrase of every image that has several: is its nearest box one of its own? And the chance of that."""
    rows, place = defaultdict(list), {phrase: i for i, phrase in enumerate(phrases)}
    for i, region in enumerate(regions):
        rows[region.image].append(i)
    hits, chances = [], []
    for members in rows.values():
        asked = list(dict.fromkeys(regions[i].phrase for i in members))
        if len(asked) == 1:
            continue
        for phrase in asked:
            nearest = members[int((v_RD[members] @ t_PD[place[phrase]]).argmax())]
            hits.append(regions[nearest].phrase == phrase)
            chances.append(sum(regions[i].phrase == phrase for i in members) / len(members))
    return hits, sum(chances) / max(1, len(chances))


def words_right(captions: Sequence[str], truths: Sequence[Sequence[str]], words: Sequence[str]) -> float:
    """Percent of captions that hold just those of `words` that the true captions hold; plurals count as the word."""

    def held(text: str) -> set[str]:
        return {word for word in words for spoken in text.split() if spoken in (word, f"{word}s")}

    return 100 * sum(held(caption) == held(truth[0]) for caption, truth in zip(captions, truths)) / len(captions)

# Tasks: (scores, outputs) of each --------------------------------------------------------------------------


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of the rows 0 to count - 1."""
    most = min(most, count)
    return [count * i // most for i in range(most)]


@dataclass(frozen=True)
class Validation:
    """Images with their captions, and the regions in them, image by image."""

    names: list[str]
    pictures: Pictures
    truths: list[tuple[str, ...]]
    files: list[Path]
    """Images that have regions."""
    boxes: list[list[Box]]
    """Of each of them."""
    regions: list[Region]
    """All boxes' regions, in that order."""

    @classmethod
    def of(cls, images: Captioned, regions: Sequence[Region], most: int) -> Validation:
        """At most so many images, evenly spread, with all their regions; `UserError` if there is nothing to read of
        one."""
        rows = evenly_spread(len(images), most)
        names = [images.name(i) for i in rows]
        try:
            truths = [images.captions(i) for i in rows]
        except Unreadable as error:
            raise UserError(f"cannot evaluate: {error}") from None
        members = defaultdict(list)
        for region in regions:
            members[region.image].append(region)
        chosen = set(names)
        kept = {file: its for file, its in members.items() if printable(file) in chosen}
        for file, its in kept.items():
            if not all(region.phrase.strip() for region in its):
                raise UserError(f"cannot evaluate: {printable(file)} has a box with an empty phrase")
        return cls(
            names, Chosen(images, rows), truths, list(kept),
            [[corners(region) for region in its] for its in kept.values()],
            [region for its in kept.values() for region in its],
        )


def evaluate(
    embedder: Embedder, images: Captioned, regions: Sequence[Region], recipe: Recipe
) -> tuple[Scores, dict[str, Any]]:
    """Scores {name: (value, unit)}, and what was found and written. Objectives that were not trained are left out."""
    embedder.model.eval()
    shown = Validation.of(images, regions, recipe.eval_rows)
    results = []
    if recipe.objectives != "generation":
        v = embedder.images(shown.pictures)
        results.append(retrieve(embedder, shown, recipe, v))
        if shown.regions:
            r = embedder.regions(Files(shown.files, shown.boxes), shown.boxes)
            results.append(classify(embedder, shown, recipe, v, r))
            results.append(retrieve_regions(embedder, shown, r))
        results.append(retrieve_long_texts(embedder, shown, recipe, v))
    if recipe.objectives != "embedding":
        results.append(caption(embedder, shown, recipe))
        if shown.regions:
            results.append(caption_regions(embedder, shown, recipe))
    scores: Scores = {}
    outputs: dict[str, Any] = {"images": shown.names, "truths": shown.truths}
    for found, made in results:
        scores |= found
        outputs |= made
    return scores, outputs


def retrieve(embedder: Embedder, shown: Validation, recipe: Recipe, v_ID: Tensor) -> tuple[Scores, dict[str, Any]]:
    """Images and their captions; the images found for each text, the nearest first."""
    texts = [text for texts in shown.truths for text in texts]
    owner = torch.tensor([i for i, texts in enumerate(shown.truths) for _ in texts])
    similarity = v_ID @ embedder.texts(texts).mT
    nearest = similarity.topk(min(5, len(v_ID)), dim=0).indices.T.tolist()
    return retrieval(similarity, relevant(texts, owner, recipe)), {"texts": texts, "nearest": nearest}


def retrieve_long_texts(
    embedder: Embedder, shown: Validation, recipe: Recipe, v_ID: Tensor
) -> tuple[Scores, dict[str, Any]]:
    """All captions of an image as one text."""
    texts, owner = [" ".join(texts) for texts in shown.truths], torch.arange(len(v_ID))
    found = retrieval(v_ID @ embedder.texts(texts).mT, relevant(texts, owner, recipe), "long text, ")
    return {key: value for key, value in found.items() if key.endswith("R@1")}, {}


def relevant(texts: Sequence[str], owner_T: Tensor, recipe: Recipe) -> Tensor:
    """Which texts belong to which images (I, T). With `duplicates`, one that says of another image what its own caption
    says does, too."""
    owns = owner_T == torch.arange(int(owner_T.max()) + 1)[:, None]
    if recipe.duplicates:
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        key = torch.tensor([place[text] for text in texts])
        owns = (owns.double() @ (key[:, None] == key).double()) > 0
    return owns


def classify(
    embedder: Embedder, shown: Validation, recipe: Recipe, v_ID: Tensor, v_RD: Tensor
) -> tuple[Scores, dict[str, Any]]:
    """Zero-shot: regions, and images with one kind of thing in them, among all phrases."""
    phrases = sorted({region.phrase for region in shown.regions})
    kinds = defaultdict(set)
    for region in shown.regions:
        kinds[printable(region.image)].add(region.phrase)
    classes = [phrase.removeprefix("a ") for phrase in phrases]
    vectors = named_classes(embedder, classes, SCENES if recipe.dataset == "scenes" else SEVEN)
    scores: Scores = {}
    sole = [i for i, name in enumerate(shown.names) if len(kinds[name]) == 1]
    if sole:
        labels = [phrases.index(*kinds[shown.names[i]]) for i in sole]
        scores[f"zero-shot, {len(classes)} classes"] = _percent(zero_shot(v_ID[sole], labels, vectors))
    labels = [phrases.index(region.phrase) for region in shown.regions]
    scores["zero-shot, regions"] = _percent(zero_shot(v_RD, labels, vectors))
    return scores, {}


def classify_folder(
    embedder: Embedder, data: image_sets.Images, names: Sequence[str], templates: Sequence[str] = CLIP
) -> Scores:
    """Zero-shot classification of a folder of pictures in classes, which are called `names`."""
    vectors = named_classes(embedder, names, templates)
    v, labels = embedder.images(Chosen(data, range(len(data)))), torch.tensor(list(map(int, data.labels)))
    found = (v @ vectors.mT).topk(min(5, len(names)), dim=1).indices == labels[:, None]
    first = found[:, 0].double()
    shares = [first[labels == label].mean() for label in labels.unique()]
    what = f"zero-shot, {len(names)} classes"
    return {
        what: _percent(found[:, 0]), f"{what}, top-5": _percent(found.any(1)),
        f"{what}, mean over classes": (100 * torch.stack(shares).mean().item(), "%"),
    }


def read_names(file: Path | None, classes: Sequence[str]) -> list[str]:
    """What the folders of classes are called: their own names; or what a text file says of each, a line with the
    folder, a blank or tab, and the name (of several, separated by commas, the first), as ImageNet's words.txt has it.
    """
    if file is None:
        return [name.replace("_", " ") for name in classes]
    try:
        rows = [line.split(None, 1) for line in read_text(file).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no list of names: {error}") from None
    known = {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
    if missing := [name for name in classes if not known.get(name)]:
        raise UserError(f"{file} names no class {missing[0]!r}; expected a line with the folder, a blank and the name")
    return [known[name] for name in classes]


def retrieve_regions(embedder: Embedder, shown: Validation, v_RD: Tensor) -> tuple[Scores, dict[str, Any]]:
    """Of an image's boxes the one that a phrase means."""
    phrases = sorted({region.phrase for region in shown.regions})
    hits, chance = region_hits(v_RD, embedder.texts(phrases), shown.regions, phrases)
    return {"region retrieval": _percent(hits), "region retrieval, chance": (100 * chance, "%")} if hits else {}, {}


def caption(embedder: Embedder, shown: Validation, recipe: Recipe) -> tuple[Scores, dict[str, Any]]:
    """Captions of whole images."""
    scenes = recipe.dataset == "scenes"
    captions = embedder.describe(shown.pictures, beams=recipe.beams, new_tokens=20 if scenes else 32)
    found = metrics.scores(captions, shown.truths)
    scores = {"CIDEr-D": (found["cider_d"], ""), "BLEU-4": (found["bleu4"], ""), "ROUGE-L": (found["rouge_l"], "")}
    if scenes:
        scores["captions, colours right"] = words_right(captions, shown.truths, list(COLORS)), "%"
        scores["captions, shapes right"] = words_right(captions, shown.truths, SHAPES), "%"
    return scores, {"captions": captions}


def caption_regions(embedder: Embedder, shown: Validation, recipe: Recipe) -> tuple[Scores, dict[str, Any]]:
    """Captions of boxes against their phrases."""
    captions = embedder.describe(
        Files(shown.files, shown.boxes), shown.boxes, beams=recipe.beams,
        new_tokens=20 if recipe.dataset == "scenes" else 32, what="describing regions",
    )
    phrases = [[region.phrase] for region in shown.regions]
    scores = {
        "region captions, CIDEr-D": (metrics.scores(captions, phrases)["cider_d"], ""),
        "region captions, exact": _percent([metrics.exact_match(a, b) for a, b in zip(captions, phrases)]),
    }
    rows = [
        {"image": str(region.image), "box_xyxy_px": corners(region), "phrase": region.phrase, "caption": text}
        for region, text in zip(shown.regions, captions)
    ]
    return scores, {"regions": rows}


def _percent(hits: Sequence[bool] | Tensor) -> tuple[float, str]:
    return 100 * sum(map(bool, hits)) / len(hits), "%"


# Command line ----------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, model folder, or shipped weights: shipped, shipped:NAME."""
    recipe: str | None = None
    """Recipe that says what is evaluated and how; a run folder knows its own."""
    data: Path | None = None
    """Data folder with a validation split."""
    images: Path | None = None
    """Image folder with val/CLASS/*.jpg, or another layout of common/data/images.py, to classify zero-shot."""
    names: Path | None = None
    """With --images: text file that says what each folder of a class is called; without one, the folders' own names."""
    out: Path | None = None
    """JSON file to write the scores to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 0
    """Processes that read images."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.evaluate", description="Scores of a checkpoint.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    args.checkpoint = shipped.path_of("mm_gem", args.checkpoint)
    if world.size > 1:
        raise UserError(f"found {world.size} processes; evaluation runs in one: start it without torchrun")
    if args.images:
        embedder, data = load(args.checkpoint, world, args.workers), image_sets.open_images(args.images, "val")
        scores = classify_folder(embedder, data, read_names(args.names, data.classes))
    else:
        about = shipped.header(args.checkpoint)
        known = Recipe(**about["recipe"]) if about and not args.recipe else None
        recipe = known or model_folder.recipe_of(args.checkpoint, args.recipe, RECIPES)
        embedder, root = load(args.checkpoint, world, args.workers), data_folder(recipe, args.data)
        scores, _ = evaluate(embedder, open_captions(root, "val"), regions_if_there(root, "val"), recipe)
    for name, (value, unit) in scores.items():
        print(f"{name:>44} {value:8.3f} {unit}")
    if args.out:
        rows = [run.metric(name, value, unit) for name, (value, unit) in scores.items()]
        run.write_json(args.out, {"checkpoint": str(args.checkpoint), "metrics": rows} | run.environment())


if __name__ == "__main__":
    run.main(main)
