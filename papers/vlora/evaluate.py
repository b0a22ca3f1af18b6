"""How well a model answers and describes: ``python -m papers.vlora.evaluate CHECKPOINT --recipe NAME --data FOLDER``.

CHECKPOINT is a run folder, or a model folder as transformers saves it. Answers count when they match exactly; beside
them stand two controls: the prior (always the commonest training answer) and the answers with the images exchanged.
Larger benchmarks: vlmevalkit.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from common import run
from common.data.loader import progress
from common.data.picture import Unreadable, read_picture
from common.metrics import captions as metrics
from common.run import UserError, World, model_folder, shipped
from papers.vlora import build
from papers.vlora.data import (
    CaptionDataset,
    ChatDataset,
    Messages,
    Samples,
    assistant_message,
    caption_messages,
    data_folder,
    evenly_spread,
    open_dataset,
    open_if_there,
)
from papers.vlora.features import featured
from papers.vlora.processing import IGNORED, TEMPLATES, VLoRAProcessor
from papers.vlora.recipes import RECIPES, Recipe
from papers.vlora.vision_language import VisionLanguageModel

BATCH = 32


@dataclass(frozen=True)
class Question:
    """One thing to be answered about one image (or none)."""

    images: tuple[Path, ...] | int  # of captions: the sample's index
    messages: tuple[dict[str, Any], ...]
    category: str
    truths: tuple[str, ...]


def load(folder: Path, device: torch.device) -> tuple[VisionLanguageModel, VLoRAProcessor]:
    """A saved model, in eval mode, and its processor. `UserError` for a folder that holds none.

    The language model gets the type that its own config names, if one is there. Of a file as they are shipped, which
    holds what was trained beside frozen parts, these parts are the installed packages'.
    """
    if shipped.header(folder):
        recipe = recipe_of(folder)
        processor = build.processor(recipe)
        model = build.model(recipe, processor.image_token_id)
        weights = {name: tensor.float() for name, tensor in run.load_weights(folder).items()}
        run.fit(build.connection(model, recipe), weights, f"{folder} does not fit its own recipe's model")
        return model.to(device).eval(), processor
    folder = model_folder.model_folder(folder)
    own = getattr(model_folder.load(AutoConfig, folder), "text_config", None)
    model = model_folder.load(AutoModelForImageTextToText, folder, dtype="auto")
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"{folder} holds a {type(model).__name__}, not a VLoRA model or the token baseline")
    if own.dtype:  # "auto" is one type for all parts
        model.language_model.to(own.dtype)
    return model.to(device).eval(), model_folder.load(AutoProcessor, folder)


def recipe_of(checkpoint: Path, name: str | None = None) -> Recipe:
    """The named recipe; without a name the one that a run folder, or a file as they are shipped, has with it."""
    about = shipped.header(checkpoint)
    if name is None and about:
        fields = {field.name for field in dataclasses.fields(Recipe)}
        said = {key: value for key, value in about["recipe"].items() if key in fields}
        return Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})
    return model_folder.recipe_of(checkpoint, name, RECIPES)


def questions(data: Samples, most: int) -> list[Question]:
    """What is asked: the last turn of conversations, or the captions of images; evenly spread if there are too many."""
    rows = evenly_spread(len(data), most)
    if isinstance(data, CaptionDataset):
        prompt = tuple(caption_messages(data.prompt, "")[:1])
        try:
            return [Question(i, prompt, "caption", data.captions(i)) for i in rows]
        except Unreadable as error:
            raise UserError(f"cannot evaluate: {error}") from None
    found = (data.data.rows[i] for i in rows)
    return [Question(row.images, row.messages[:-1], row.category or "all", (row.answer,)) for row in found]


def exchanged(asked: Sequence[Question]) -> list[int]:
    """For each question the one whose image it gets instead: of the same category, with as many images, and of another
    image wherever there is one."""
    members = defaultdict(list)
    for i, question in enumerate(asked):
        count = len(question.images) if isinstance(question.images, tuple) else 1
        members[question.category, count].append(i)
    other = list(range(len(asked)))
    for rows in members.values():
        for place, i in enumerate(rows):
            candidates = rows[place + 1 :] + rows[:place]
            other[i] = next((j for j in candidates if asked[j].images != asked[i].images), i)
    return other


def pictures(question: Question, data: Samples) -> list[Image.Image]:
    """The question's images, decoded, or their features if those are kept."""
    try:
        if isinstance(data, CaptionDataset):
            return [data.data[question.images][0]]
        return [read_picture(path) for path in question.images]
    except Unreadable as error:
        name = data.name(question.images) if isinstance(data, CaptionDataset) else ", ".join(map(str, question.images))
        raise UserError(f"cannot evaluate: {name} is unreadable ({error})") from None


class Pictures(Dataset):
    """For each of `rows` (question, question whose images it gets instead, ...): the images of each."""

    def __init__(self, data: Samples, rows: Sequence[Sequence[Question]]):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[list[Image.Image]]:
        return [pictures(question, self.data) for question in self.rows[index]]


def stops(processor: VLoRAProcessor) -> list[int]:
    """Token ids that end an answer: the end token, and a newline where that is what ends a caption."""
    tokenizer = processor.tokenizer
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ends_in_newline = processor.chat_template in (TEMPLATES["plain"], TEMPLATES["prompted"])
    return [tokenizer.eos_token_id, *(newline[-1:] if ends_in_newline else [])]


@torch.no_grad()
def answer(
    model: VisionLanguageModel, processor: VLoRAProcessor, images: Sequence[list[Image.Image]],
    messages: Sequence[Messages], world: World, new_tokens: int, **options: Any,
) -> list[str]:
    """Greedy answers to conversations that end with a question, unless `options` tell generate otherwise."""
    prompts = [processor.apply_chat_template(list(turns), add_generation_prompt=True) for turns in messages]
    batch = processor([image for each in images for image in each], prompts).to(world.device)
    if "perceptual_weights" in options:  # the images as they were perceived before
        batch.pop("pixel_values")
    with world.autocast():
        out = model.generate(**batch, **{
            "max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": stops(processor),
            "pad_token_id": processor.tokenizer.pad_token_id, **options,
        })
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def losses(
    model: VisionLanguageModel, processor: VLoRAProcessor, images: Sequence[list[Image.Image]],
    messages: Sequence[Messages], world: World,
) -> torch.Tensor:
    """Mean loss per learned token of each conversation, in nats. (rows,)"""
    batch = processor.collate([(image, processor.encode(turns)) for image, turns in zip(images, messages)])
    batch = {key: value.to(world.device) for key, value in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    with world.autocast():
        logits = model(**batch).logits[:, :-1].float()
    # Flat: the loss of a map of labels has no deterministic form on a GPU.
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    each = each.view_as(labels)
    return (each.sum(1) / (labels != IGNORED).sum(1)).cpu()


def evaluate(
    model: VisionLanguageModel, processor: VLoRAProcessor, data: Samples, recipe: Recipe, world: World,
    train: Samples | None = None, workers: int = 0,
) -> tuple[dict[str, tuple[float, str]], list[dict[str, Any]]]:
    """Scores {name: (value, unit)} over all of `data`, and what was answered to each question.

    With `train`, the prior is its commonest answer for each category, else that of `data` itself.
    """
    model.eval()
    asked = questions(data, recipe.eval_rows)
    pairs = [(asked[i], asked[j]) for i, j in enumerate(exchanged(asked))][world.rank :: world.size]
    loader = DataLoader(Pictures(data, pairs), batch_size=BATCH, num_workers=workers, collate_fn=_columns)
    mine = []
    for images, others in progress(loader, "evaluating", active=world.is_main):
        batch = [question for question, _ in pairs[len(mine) :][: len(images)]]
        prompts = [list(question.messages) for question in batch]
        whole = [[*question.messages, assistant_message(question.truths[0])] for question in batch]
        right = answer(model, processor, images, prompts, world, recipe.new_tokens)
        wrong = answer(model, processor, others, prompts, world, recipe.new_tokens)
        own_loss = losses(model, processor, images, whole, world).tolist()
        other_loss = losses(model, processor, others, whole, world).tolist()
        mine += [
            {"question": question.messages[-1]["content"][-1]["text"], "category": question.category,
             "answer": row[0], "exchanged": row[1], "truths": list(question.truths), "loss": row[2],
             "loss_exchanged": row[3]}
            for question, *row in zip(batch, right, wrong, own_loss, other_loss)
        ]
    if isinstance(data, CaptionDataset):
        for sample, question in zip(mine, (question for question, _ in pairs)):
            sample["name"] = data.name(question.images)
        compare_with_others(model, processor, data, asked, mine, recipe, world, workers)
    samples = run.gather_objects(mine)
    return score(samples, _answers(train) if isinstance(train, ChatDataset) else None), samples


def compare_with_others(
    model: VisionLanguageModel, processor: VLoRAProcessor, data: CaptionDataset, asked: Sequence[Question],
    mine: Sequence[dict[str, Any]], recipe: Recipe, world: World, workers: int = 0,
) -> None:
    """Adds to this rank's samples the loss of the first caption without any image, and for `recipe.other_rows` of them,
    evenly spread, with each of several other images, which are the same ones whatever the model."""
    chosen = evenly_spread(len(asked), recipe.other_rows or len(asked))
    step = max(1, len(asked) // (recipe.others + 1))
    others = {i: [asked[(i + k * step) % len(asked)] for k in range(1, recipe.others + 1)] for i in chosen}
    own = [i for i in chosen if i % world.size == world.rank] if recipe.others > 1 else []
    loader = DataLoader(Pictures(data, [others[i] for i in own]), batch_size=None, num_workers=workers)
    for i, images in zip(own, progress(loader, "other images", active=world.is_main)):
        whole = [*asked[i].messages, assistant_message(asked[i].truths[0])]
        found = losses(model, processor, images, [whole] * len(images), world)
        mine[i // world.size]["losses_others"] = found.tolist()
    for first in range(0, len(mine), BATCH):
        rows = range(world.rank + first * world.size, len(asked), world.size)[:BATCH]
        whole = [[*_blind(asked[i].messages), assistant_message(asked[i].truths[0])] for i in rows]
        found = losses(model, processor, [[]] * len(rows), whole, world).tolist()
        said = answer(model, processor, [[]], [_blind(asked[0].messages)], world, recipe.new_tokens)
        for sample, loss in zip(mine[first : first + BATCH], found):
            sample |= {"loss_blind": loss, "blind": said[0]}


def _blind(messages: Sequence[dict[str, Any]]) -> Messages:
    """The same turns without images."""
    return [turn | {"content": [part for part in turn["content"] if part["type"] != "image"]} for turn in messages]


def _columns(rows: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    first, second = zip(*rows)
    return list(first), list(second)


def _answers(data: ChatDataset) -> dict[str, Counter]:
    """How often each answer is given to each question in training."""
    counts = defaultdict(Counter)
    for row in data.data.rows:
        for question, reply in zip(row.messages[::2], row.messages[1::2]):
            counts[question["content"][-1]["text"]][reply["content"][-1]["text"]] += 1
    return counts


def score(
    samples: Sequence[dict[str, Any]], training: dict[str, Counter] | None = None
) -> dict[str, tuple[float, str]]:
    """Scores of answered questions (see `evaluate`); the first is what the run is judged by."""
    scores: dict[str, tuple[float, str]] = {}
    prefers = _percent(s["loss"] < s["loss_exchanged"] for s in samples)
    if all(sample["category"] == "caption" for sample in samples):
        scores["right image preferred"] = prefers
    else:
        by_category = defaultdict(list)
        for sample in samples:
            by_category[sample["category"]].append(sample)
        priors = {category: _prior(rows, training) for category, rows in by_category.items()}
        scores["accuracy"] = _percent(_hit(s, "answer") for s in samples)
        scores["accuracy, images exchanged"] = _percent(_hit(s, "exchanged") for s in samples)
        scores["accuracy, prior"] = _percent(hit for hits in priors.values() for hit in hits)
        if len(by_category) > 1:
            for category, rows in by_category.items():
                scores[category] = _percent(_hit(s, "answer") for s in rows)
                scores[f"{category}, images exchanged"] = _percent(_hit(s, "exchanged") for s in rows)
                scores[f"{category}, prior"] = _percent(priors[category])
        scores["right image preferred"] = prefers
    if tried := [s for s in samples if "losses_others" in s]:
        pairs = [s["loss"] < other for s in tried for other in s["losses_others"]]
        scores["right image preferred"] = _percent(pairs)
        scores["right image first of all"] = _percent(s["loss"] < min(s["losses_others"]) for s in tried)
    scores["loss"] = sum(s["loss"] for s in samples) / len(samples), "nats"
    scores["loss, images exchanged"] = sum(s["loss_exchanged"] for s in samples) / len(samples), "nats"
    blind = all("loss_blind" in s for s in samples)
    if blind:
        scores["loss, blind"] = sum(s["loss_blind"] for s in samples) / len(samples), "nats"
    if described := [s for s in samples if s["category"] in ("caption", "describe")]:
        ways = [("answer", ""), ("exchanged", ", images exchanged"), *([("blind", ", blind")] if blind else [])]
        for key, note in ways:
            found = metrics.scores([s[key] for s in described], [s["truths"] for s in described])
            scores |= {f"{name}{note}": (found[name], "") for name in ("cider_d", "bleu4", "rouge_l")}
    return scores


def _percent(hits: Iterable[bool]) -> tuple[float, str]:
    hits = list(hits)
    return 100 * sum(hits) / len(hits), "%"


def _hit(sample: dict[str, Any], key: str) -> bool:
    return metrics.exact_match(sample[key], sample["truths"])


def _prior(rows: Sequence[dict[str, Any]], training: dict[str, Counter] | None) -> list[bool]:
    """Hits of always giving a category's commonest answer, counted in training over the same questions if possible."""
    counts = Counter()
    for row in rows:
        counts += training.get(row["question"], Counter()) if training else Counter(row["truths"][:1])
    if not counts:
        counts = Counter(row["truths"][0] for row in rows)
    guess = counts.most_common(1)[0][0]
    return [metrics.exact_match(guess, row["truths"]) for row in rows]


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, model folder, or shipped[:NAME]."""
    recipe: str | None = None
    """Recipe that says what is evaluated and how; a run folder knows its own."""
    data: Path | None = None
    """Data folder with a validation split."""
    out: Path | None = None
    """JSON file to write the scores and all answers to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 0
    """Processes that read images."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.vlora.evaluate", description="Scores of a checkpoint.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    args.checkpoint = shipped.path_of("vlora", args.checkpoint)
    recipe = recipe_of(args.checkpoint, args.recipe)
    model, processor = load(args.checkpoint, world.device)
    root = data_folder(recipe, args.data)
    held_out, train = open_dataset(root, "val", recipe), open_if_there(root, "train", recipe)
    if recipe.features:
        held_out = featured(held_out, recipe, processor, train=False)
    scores, samples = evaluate(model, processor, held_out, recipe, world, train, args.workers)
    if world.is_main:
        for name, (value, unit) in scores.items():
            print(f"{name:>32} {value:8.3f} {unit}")
        print(f"{len(samples)} questions, {args.checkpoint}")
        if args.out:
            rows = [run.metric(name, value, unit) for name, (value, unit) in scores.items()]
            about = {"checkpoint": str(args.checkpoint), "metrics": rows, "answers": samples}
            run.write_json(args.out, about | run.environment())


if __name__ == "__main__":
    run.main(main)
