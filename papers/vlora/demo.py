"""Chat about a picture: ``python -m papers.vlora.demo photo.jpg --question "What is this?"``.

Without a question, questions are read from the terminal, one a line; the picture's weights are computed once for all of
them. A model of captions is asked for one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from common import run
from common.data.picture import Unreadable, read_picture
from common.data.tiny.scenes import DESCRIBE, scenes
from common.run import UserError, drawing, shipped
from common.run.hf import quiet
from papers.vlora.data import assistant_message
from papers.vlora.evaluate import answer, load
from papers.vlora.figures import wrapped
from papers.vlora.model import VLoRAForConditionalGeneration
from papers.vlora.processing import TEMPLATES
from papers.vlora.recipes import RECIPES


@dataclass
class Arguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    """An image file; without one, a generated scene."""
    question: str | None = None
    """What to ask; without one, questions are read from the terminal."""
    checkpoint: Path | None = None
    """Run or model folder, or shipped[:NAME]; without one, the shipped weights, or the newest finished run."""
    new_tokens: int = 64
    """Most tokens of an answer."""
    out: Path = Path("answer.png")
    """Picture to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Chat:
    """A dialogue about one picture. `ask` answers, knowing the turns before."""

    def __init__(self, model: Any, processor: Any, picture: Image.Image, world: run.World, new_tokens: int):
        self.model, self.processor, self.picture, self.world = model, processor, picture, world
        self.new_tokens, self.turns = new_tokens, []
        self.options: dict[str, Any] = {}
        if isinstance(model, VLoRAForConditionalGeneration):
            mark = torch.tensor([[processor.image_token_id]], device=world.device)
            pixels = processor.pixels([picture]).to(world.device)
            with torch.no_grad(), world.autocast():
                self.options["perceptual_weights"] = model.perceive(mark, pixels)

    @property
    def captions_only(self) -> bool:
        """It was trained on captions after one prompt, and can be asked nothing else."""
        return self.processor.chat_template in (TEMPLATES["plain"], TEMPLATES["prompted"])

    def ask(self, question: str) -> str:
        turns = [] if self.captions_only else self.turns
        image = [] if turns else [{"type": "image"}]
        turns = [*turns, {"role": "user", "content": [*image, {"type": "text", "text": question}]}]
        (reply,) = answer(
            self.model, self.processor, [[self.picture]], [turns], self.world, self.new_tokens, **self.options
        )
        self.turns = [*turns, assistant_message(reply)]
        return reply


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.vlora.demo", description="Chat about a picture.")
    quiet()
    checkpoint = shipped.for_demo("vlora", args.checkpoint)
    picture = args.picture or min((scenes() / "val").glob("*.png"))
    try:
        image = read_picture(picture)
    except Unreadable as error:
        raise UserError(f"{picture} is no picture: {error}") from None
    world = run.start_world(run.Options(device=args.device))
    model, processor = load(checkpoint, world.device)
    chat = Chat(model, processor, image, world, args.new_tokens)

    asked = []
    with contextlib.suppress(KeyboardInterrupt):
        for question in questions(args.question or (RECIPES["smollm2"].prompt if chat.captions_only else None)):
            asked.append((question, chat.ask(question)))
            print(f"{question}\n  {asked[-1][1]}")
    caption = "\n".join(wrapped(f"{q} {a}") for q, a in asked[-4:])
    drawing.gallery(args.out, [np.asarray(image)], [caption], ["black"], columns=1)
    print(f"{args.out} written; {checkpoint}")


def questions(given: str | None) -> Iterator[str]:
    """The one that is given, or what is typed or comes from a pipe; if nothing does, what scenes are described by."""
    if given:
        yield given
        return
    typed = sys.stdin.isatty()
    if typed:
        print("ask about the picture; an empty line ends")
    asked = 0
    with contextlib.suppress(EOFError):
        while question := input("> " if typed else "").strip():
            yield question
            asked += 1
    if not typed and not asked:
        yield DESCRIBE


if __name__ == "__main__":
    run.main(main)
