"""How well a model embeds and describes: ``python -m papers.mm_gem.evaluate CHECKPOINT --data FOLDER``.

CHECKPOINT is a run folder, or a model folder as transformers saves it. FOLDER has a validation split in COCO's format;
with --images FOLDER (classes as folders), zero-shot classification of those instead. Definitions:

image -> text, text -> image R@K   COCO's retrieval by cosine similarity, over images and over captions
long text                          the same with all captions of an image joined to one text
zero-shot                          nearest class, its vector the unit mean of its prompts' embeddings
CIDEr-D, BLEU-4, ROUGE-L           of generated captions; CIDEr-D on its own scale of 0 to 10
region retrieval                   images with boxes of several phrases: is the nearest box to a phrase one of its own?
region captions                    CIDEr-D of what is generated for a box against its phrase, and exact matches
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from common import run
from common.data import images as image_sets
from common.data.captions import Captions, CaptionShards, Region
from common.data.loader import progress
from common.data.tiny.scenes import COLORS, SHAPES
from common.metrics import captions as metrics
from common.metrics.retrieval import recall_at
from common.run import UserError, World
from papers.mm_gem.data import corners, data_folder, open_captions, open_regions
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.processing import MMGEMProcessor
from papers.mm_gem.prompts import CLIP, SCENES, SEVEN
from papers.mm_gem.recipes import RECIPES, Recipe

BATCH = 64
Scores = dict[str, tuple[float, str]]


@dataclass
class Tools:
    """A model in use: embeds and describes any number of images, regions and texts, in batches."""

    model: MMGEMModel
    processor: MMGEMProcessor
    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu"), None))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], what: str = "texts") -> Tensor:
        """(N, D) on the CPU."""
        found = []
        for batch in _batches(texts, what, self.world):
            rows = {key: value.to(self.world.device) for key, value in self.processor.texts(batch).items()}
            with self.world.autocast():
                found.append(self.model.encode_text(**rows).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def images(self, sources: Sequence[Any], what: str = "images") -> Tensor:
        """(N, D) on the CPU, of PIL images, files, functions that open an image, or (any of these, box)."""
        return torch.cat([self._embed(batch) for batch in _batches(sources, what, self.world)])

    def _embed(self, batch: Sequence[Any]) -> Tensor:
        with self.world.autocast():
            return self.model.encode_region(*self._inputs(batch)).float().cpu()

    @torch.inference_mode()
    def describe(
        self, sources: Sequence[Any], beams: int = 1, new_tokens: int = 32, what: str = "describing"
    ) -> list[str]:
        """Captions of what `images` takes."""
        found = []
        for batch in _batches(sources, what, self.world):
            with self.world.autocast():
                ids = self.model.generate(*self._inputs(batch), num_beams=beams, max_new_tokens=new_tokens)
            found += self.processor.captions(ids)
        return found

    def _inputs(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        pairs = [source if isinstance(source, tuple) else (source, None) for source in batch]
        keys = [image if isinstance(image, Path) else id(image) for image, _ in pairs]
        opened = {key: _opened(image) for key, (image, _) in dict(zip(keys, pairs)).items()}  # each but once
        place = {key: i for i, key in enumerate(opened)}
        rows = [
            self.processor.scaled(opened[key], box or (0, 0, *opened[key].size), place[key])
            for key, (_, box) in zip(keys, pairs)
        ]
        device = self.world.device
        return self.processor.pixels(list(opened.values())).to(device), torch.tensor(rows, device=device)


def _opened(image: Image.Image | Path | Callable[[], Image.Image]) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if callable(image):
        return image()
    try:
        return Image.open(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{image} is unreadable ({error})") from None


def _batches(rows: Sequence[Any], what: str, world: World):
    for first in progress(range(0, len(rows), BATCH), what, active=world.is_main):
        yield rows[first : first + BATCH]


# Measures --------------------------------------------------------------------------------------------------


def retrieval(v_ID: Tensor, t_TD: Tensor, relevant_IT: Tensor, note: str = "") -> Scores:
    """R@1/5/10 both ways; relevant (I, T) says which texts belong to which images."""
    similarity = v_ID @ t_TD.mT
    to_image = recall_at(similarity.mT, relevant_IT.mT)
    both = {"image -> text": recall_at(similarity, relevant_IT), "text -> image": to_image}
    return {f"{note}{way} {k}": (value, "%") for way, found in both.items() for k, value in found.items()}


def class_vectors(prompts_CMD: Tensor) -> Tensor:
    """Embeddings of C classes' M prompts -> (C, D): the unit mean of the unit embeddings."""
    return F.normalize(F.normalize(prompts_CMD, dim=-1).mean(1), dim=-1)


def named_classes(tools: Tools, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The vectors (C, D) of classes by their names."""
    prompts = tools.texts([template.format(name) for name in classes for template in templates], "prompts")
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
        for phrase in asked if len(asked) > 1 else ():
            nearest = members[int((v_RD[members] @ t_PD[place[phrase]]).argmax())]
            hits.append(regions[nearest].phrase == phrase)
            chances.append(sum(regions[i].phrase == phrase for i in members) / len(members))
    return hits, sum(chances) / max(1, len(chances))


def words_right(captions: Sequence[str], truths: Sequence[Sequence[str]], words: Sequence[str]) -> float:
    """Percent of captions that hold just those of `words` that the true captions hold; plurals count as the word."""

    def held(text: str) -> set[str]:
        return {word for word in words for spoken in text.split() if spoken in (word, f"{word}s")}

    return 100 * sum(held(caption) == held(truth[0]) for caption, truth in zip(captions, truths)) / len(captions)


def _share(hits: Sequence[bool] | Tensor) -> tuple[float, str]:
    return 100 * sum(map(bool, hits)) / len(hits), "%"


def evaluate(
    tools: Tools, images: Captions | CaptionShards, regions: Sequence[Region], recipe: Recipe,
) -> tuple[Scores, dict[str, Any]]:
    """Scores {name: (value, unit)}, and what was said and found. Objectives that were not trained are left out."""
    tools.model.eval()
    rows = _spread(len(images), recipe.eval_rows)
    pictures, truths = [partial(_read, images, i) for i in rows], [images.captions(i) for i in rows]
    chosen = {images.name(i) for i in rows}
    regions = [region for region in regions if str(region.image) in chosen]  # all of an image, or none
    crops = [(region.image, corners(region)) for region in regions]
    scenes = recipe.dataset == "scenes"
    scores: Scores = {}
    said: dict[str, Any] = {"images": [images.name(i) for i in rows], "truths": truths}
    if recipe.objectives != "generation":
        v = tools.images(pictures)
        texts = [text for texts in truths for text in texts]
        owner = torch.tensor([i for i, texts in enumerate(truths) for _ in texts])
        found, similarity = _retrieval(tools, v, texts, owner, recipe)
        scores |= found
        said["texts"], said["similarity"] = texts, similarity
        if regions:
            scores |= _named(tools, v, said["images"], regions, crops, scenes)
        found, _ = _retrieval(tools, v, [" ".join(x) for x in truths], torch.arange(len(v)), recipe, "long text, ")
        scores |= {key: value for key, value in found.items() if key.endswith("R@1")}
    if recipe.objectives != "embedding":
        length = 20 if scenes else 32
        said["captions"] = tools.describe(pictures, recipe.beams, length)
        found = metrics.scores(said["captions"], truths)
        names = {"CIDEr-D": "cider_d", "BLEU-4": "bleu4", "ROUGE-L": "rouge_l"}
        scores |= {key: (found[name], "") for key, name in names.items()}
        if scenes:
            scores["captions, colours right"] = words_right(said["captions"], truths, list(COLORS)), "%"
            scores["captions, shapes right"] = words_right(said["captions"], truths, SHAPES), "%"
        if regions:
            told = tools.describe(crops, recipe.beams, length, "describing regions")
            phrases = [[region.phrase] for region in regions]
            scores["region captions, CIDEr-D"] = metrics.scores(told, phrases)["cider_d"], ""
            scores["region captions, exact"] = _share([metrics.exact_match(a, b) for a, b in zip(told, phrases)])
            said["regions"] = [
                {"image": str(r.image), "box_xyxy_px": corners(r), "phrase": r.phrase, "said": text}
                for r, text in zip(regions, told)
            ]
    return scores, said


def _retrieval(tools, v, texts, owner, recipe, note="") -> tuple[Scores, Tensor]:
    t = tools.texts(texts)
    relevant = owner == torch.arange(len(v))[:, None]
    if recipe.duplicates:  # a text that says of another image what its own caption says is right, too
        same = torch.tensor([hash(text) for text in texts])
        relevant = (relevant.double() @ (same[:, None] == same).double()) > 0
    return retrieval(v, t, relevant, note), v @ t.mT


def _named(tools, v, names, regions, crops, scenes) -> Scores:
    """Zero-shot classification of images with one kind of thing in them, and retrieval of regions."""
    phrases = sorted({region.phrase for region in regions})
    kinds = defaultdict(set)
    for region in regions:
        kinds[str(region.image)].add(region.phrase)
    sole = [(i, phrases.index(next(iter(kinds[name])))) for i, name in enumerate(names) if len(kinds[name]) == 1]
    classes = [phrase.removeprefix("a ") for phrase in phrases]
    vectors, scores = named_classes(tools, classes, SCENES if scenes else SEVEN), {}
    if sole:
        rows, labels = zip(*sole)
        scores[f"zero-shot, {len(classes)} classes"] = _share(zero_shot(v[list(rows)], labels, vectors))
    boxes = tools.images(crops, "regions")
    labels = [phrases.index(region.phrase) for region in regions]
    scores["zero-shot, regions"] = _share(zero_shot(boxes, labels, vectors))
    hits, chance = region_hits(boxes, tools.texts(phrases), regions, phrases)
    if hits:
        scores |= {"region retrieval": _share(hits), "region retrieval, chance": (100 * chance, "%")}
    return scores


def _spread(count: int, most: int) -> list[int]:
    return [count * i // min(most, count) for i in range(min(most, count))]


def _read(images: Captions | CaptionShards | image_sets.Images, index: int) -> Image.Image:
    try:
        return images[index][0]
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot evaluate: {images.name(index)} is unreadable ({error})") from None


# Command line ----------------------------------------------------------------------------------------------


def load(folder: Path | None, world: World) -> Tools:
    """A saved model, in eval mode, and its processor; None: the newest run's. `UserError` for a folder without one."""
    if folder is None:
        finished = Path("runs/mm_gem").glob("*/*/results.json")
        if (newest := max(finished, key=lambda path: path.stat().st_mtime, default=None)) is None:
            command = "make reproduce PAPER=mm_gem"
            raise UserError(f"no finished run under runs/mm_gem; make one with {command}, or give --checkpoint")
        folder = newest.parent
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no model: expected config.json and *.safetensors of save_pretrained")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder, dtype="auto").to(world.device).eval()
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if not isinstance(model, MMGEMModel):
        raise UserError(f"{folder} holds a {type(model).__name__}, not an MM-GEM model")
    return Tools(model, AutoProcessor.from_pretrained(folder), world)


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, or model folder."""
    recipe: str | None = None
    """Recipe that says what is evaluated and how; a run folder knows its own."""
    data: Path | None = None
    """Data folder with a validation split."""
    images: Path | None = None
    """Image folder with val/CLASS/*.jpg, or another layout of common/data/images.py, to classify zero-shot."""
    out: Path | None = None
    """JSON file to write the scores to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def recipe_of(checkpoint: Path, name: str | None) -> Recipe:
    """The named recipe, or that of a run folder."""
    if name is None and (checkpoint / "config.json").is_file():
        found = json.loads((checkpoint / "config.json").read_text())
        if "recipe" in found:
            return Recipe(**found["recipe"])
    if name not in RECIPES:
        raise UserError(f"a model folder needs --recipe, one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.evaluate", description="Scores of a checkpoint.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    if not args.checkpoint.is_dir():
        raise UserError(f"no run or model folder at {args.checkpoint}")
    if world.size > 1:
        raise UserError("evaluation runs in one process")
    if args.images:
        tools, data = load(args.checkpoint, world), image_sets.open_images(args.images, "val")
        pictures = [partial(_read, data, i) for i in range(len(data))]
        hits = zero_shot(tools.images(pictures), data.labels, named_classes(tools, data.classes, CLIP))
        scores = {f"zero-shot, {len(data.classes)} classes": _share(hits)}
    else:
        recipe = recipe_of(args.checkpoint, args.recipe)
        tools, root = load(args.checkpoint, world), data_folder(recipe, args.data)
        scores, _ = evaluate(tools, open_captions(root, "val"), open_regions(root, "val", needed=False), recipe)
    for name, (value, unit) in scores.items():
        print(f"{name:>32} {value:8.3f} {unit}")
    if args.out:
        rows = [run.metric(name, value, unit) for name, (value, unit) in scores.items()]
        run.write_json(args.out, {"checkpoint": str(args.checkpoint), "metrics": rows} | run.environment())


if __name__ == "__main__":
    run.main(main)
