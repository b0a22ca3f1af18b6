"""How well a model answers and describes: ``python -m papers.vlora.evaluate CHECKPOINT --recipe NAME --data FOLDER``.

CHECKPOINT is a run folder, or a model folder as transformers saves it. Answers count when they match exactly; beside
them stand two controls: the prior (always the commonest training answer) and the answers with the images exchanged.
Larger benchmarks: vlmevalkit.py.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from common import run
from common.data.loader import progress
from common.metrics import captions as metrics
from common.run import UserError, World
from papers.vlora.data import CaptionTalks, Talks, caption_messages, data_folder, open_if_there, open_talks
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
    """A saved model, in eval mode, and its processor. `UserError` for a folder that holds none."""
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no model: expected config.json and *.safetensors of save_pretrained")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def questions(talks: Talks | CaptionTalks, most: int) -> list[Question]:
    """What is asked: the last turn of conversations, or the captions of images; evenly spread if there are too many."""
    rows = [len(talks) * i // min(most, len(talks)) for i in range(min(most, len(talks)))]
    if isinstance(talks, CaptionTalks):
        return [
            Question(i, tuple(caption_messages(talks.prompt, "")[:1]), "caption", talks.data.captions(i)) for i in rows
        ]
    found = (talks.data.rows[i] for i in rows)
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


def pictures(question: Question, talks: Talks | CaptionTalks) -> list[Image.Image]:
    try:
        if isinstance(talks, CaptionTalks):
            return [talks.data[question.images][0]]
        return [Image.open(path).convert("RGB") for path in question.images]
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot evaluate: {question.images} is unreadable ({error})") from None


def stops(processor: VLoRAProcessor) -> list[int]:
    """Token ids that end an answer: the end token, and a newline where that is what ends a caption."""
    tokenizer = processor.tokenizer
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ends_in_newline = processor.chat_template in (TEMPLATES["plain"], TEMPLATES["prompted"])
    return [tokenizer.eos_token_id, *(newline[-1:] if ends_in_newline else [])]


@torch.no_grad()
def answer(
    model: VisionLanguageModel, processor: VLoRAProcessor, images: Sequence[list[Image.Image]],
    messages: Sequence[Sequence[dict[str, Any]]], world: World, new_tokens: int, **options: Any,
) -> list[str]:
    """Greedy answers to conversations that end with a question, unless `options` tell generate otherwise."""
    prompts = [processor.apply_chat_template(list(turns), add_generation_prompt=True) for turns in messages]
    batch = processor([image for each in images for image in each], prompts).to(world.device)
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
    messages: Sequence[Sequence[dict[str, Any]]], world: World,
) -> torch.Tensor:
    """Mean loss per learned token of each conversation, in nats. (rows,)"""
    batch = processor.collate([(image, processor.encode(turns)) for image, turns in zip(images, messages)])
    batch = {key: value.to(world.device) for key, value in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    with world.autocast():
        logits = model(**batch).logits[:, :-1].float()
    each = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    return (each.sum(1) / (labels != IGNORED).sum(1)).cpu()


def gather(rows: list[Any], world: World) -> list[Any]:
    """Every rank's ``rows[rank::size]`` put back into order, on all ranks."""
    if world.size == 1:
        return rows
    parts: list[list[Any]] = [None] * world.size
    dist.all_gather_object(parts, rows)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: world.size] = part
    return whole


def evaluate(
    model: VisionLanguageModel, processor: VLoRAProcessor, talks: Talks | CaptionTalks, recipe: Recipe, world: World,
    train: Talks | CaptionTalks | None = None,
) -> tuple[dict[str, tuple[float, str]], list[dict[str, Any]]]:
    """Scores {name: (value, unit)} over all of `talks`, and what was answered to each question.

    With `train`, the prior is its commonest answer for each category, else that of `talks` itself.
    """
    model.eval()
    asked = questions(talks, recipe.eval_rows)
    other = exchanged(asked)
    mine = list(range(len(asked)))[world.rank :: world.size]
    right, wrong, own_loss, other_loss = [], [], [], []
    for first in progress(range(0, len(mine), BATCH), "evaluating", active=world.is_main):
        rows = mine[first : first + BATCH]
        turns = [asked[i].messages for i in rows]
        images, swapped = ([pictures(asked[i], talks) for i in which] for which in (rows, [other[i] for i in rows]))
        right += answer(model, processor, images, turns, world, recipe.new_tokens)
        wrong += answer(model, processor, swapped, turns, world, recipe.new_tokens)
        full = [[*asked[i].messages, _said(asked[i].truths[0])] for i in rows]
        own_loss += losses(model, processor, images, full, world).tolist()
        other_loss += losses(model, processor, swapped, full, world).tolist()
    right, wrong, own_loss, other_loss = (gather(each, world) for each in (right, wrong, own_loss, other_loss))
    samples = [
        {"question": question.messages[-1]["content"][-1]["text"], "category": question.category, "answer": told,
         "exchanged": mistold, "truths": list(question.truths), "loss": own, "loss_exchanged": others}
        for question, told, mistold, own, others in zip(asked, right, wrong, own_loss, other_loss)
    ]
    return score(samples, _answers(train) if isinstance(train, Talks) else None), samples


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _answers(talks: Talks) -> dict[str, Counter]:
    """How often each answer is given to each question in training."""
    counts = defaultdict(Counter)
    for row in talks.data.rows:
        for question, reply in zip(row.messages[::2], row.messages[1::2]):
            counts[question["content"][-1]["text"]][reply["content"][-1]["text"]] += 1
    return counts


def score(
    samples: Sequence[dict[str, Any]], training: dict[str, Counter] | None = None
) -> dict[str, tuple[float, str]]:
    """Scores of answered questions (see `evaluate`); the first is what the run is judged by."""
    scores: dict[str, tuple[float, str]] = {}

    def share(values) -> tuple[float, str]:
        values = list(values)
        return 100 * sum(values) / len(values), "%"

    captions = all(sample["category"] == "caption" for sample in samples)
    prefers = share(s["loss"] < s["loss_exchanged"] for s in samples)
    if captions:
        scores["right image preferred"] = prefers
    else:
        by_category = defaultdict(list)
        for sample in samples:
            by_category[sample["category"]].append(sample)
        scores["accuracy"] = share(_hit(s, "answer") for s in samples)
        scores["accuracy, images exchanged"] = share(_hit(s, "exchanged") for s in samples)
        scores["accuracy, prior"] = share(hit for rows in by_category.values() for hit in _prior(rows, training))
        for category, rows in by_category.items() if len(by_category) > 1 else ():
            scores[category] = share(_hit(s, "answer") for s in rows)
            scores[f"{category}, images exchanged"] = share(_hit(s, "exchanged") for s in rows)
            scores[f"{category}, prior"] = share(_prior(rows, training))
        scores["right image preferred"] = prefers
    scores["loss"] = sum(s["loss"] for s in samples) / len(samples), "nats"
    scores["loss, images exchanged"] = sum(s["loss_exchanged"] for s in samples) / len(samples), "nats"
    if described := [s for s in samples if s["category"] in ("caption", "describe")]:
        for key, note in (("answer", ""), ("exchanged", ", images exchanged")):
            found = metrics.scores([s[key] for s in described], [s["truths"] for s in described])
            scores |= {f"{name}{note}": (found[name], "") for name in ("cider_d", "bleu4", "rouge_l")}
    return scores


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
    """Run folder, or model folder."""
    recipe: str | None = None
    """Recipe that says what is evaluated and how; a run folder knows its own."""
    data: Path | None = None
    """Data folder with a validation split."""
    out: Path | None = None
    """JSON file to write the scores and all answers to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def recipe_of(checkpoint: Path, name: str | None) -> Recipe:
    """The recipe of a run folder, or the named one."""
    path = checkpoint / "config.json"
    if path.is_file() and "recipe" in (found := json.loads(path.read_text())):
        return Recipe(**found["recipe"])
    if name not in RECIPES:
        raise UserError(f"a model folder needs --recipe, one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.vlora.evaluate", description="Scores of a checkpoint.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    if not args.checkpoint.is_dir():
        raise UserError(f"no run or model folder at {args.checkpoint}")
    recipe = recipe_of(args.checkpoint, args.recipe)
    model, processor = load(args.checkpoint, world.device)
    root = data_folder(recipe, args.data)
    talks = open_talks(root, "val", recipe)
    scores, samples = evaluate(model, processor, talks, recipe, world, open_if_there(root, "train", recipe))
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
