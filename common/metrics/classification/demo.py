"""The command line of a paper's demo.py: one picture, classified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from common import run
from common.data import images
from common.data.picture import Unreadable, read_picture
from common.data.text import printable
from common.data.tiny.digits import digits
from common.metrics.classification.paper import Paper
from common.run import UserError, drawing, shipped


@dataclass
class Arguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    """An image file; without one, a digit of the built-in set."""
    checkpoint: Path | None = None
    """Run folder, or shipped[:NAME]; without one, the shipped weights, or the newest finished run under runs/."""
    out: Path = Path("answer.png")
    device: Literal["auto", "cpu", "cuda"] = "auto"


def demo(paper: Paper) -> None:
    """The command line of ``papers.<name>.demo``: prints and draws a picture's most likely classes."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.demo", description="A picture, classified.")
    checkpoint = shipped.for_demo(paper.name, args.checkpoint, paper.recipes)
    picture = args.picture or min((digits() / "val" / "7").iterdir())
    try:
        image = read_picture(picture)
    except Unreadable as error:
        raise UserError(f"{picture} is no picture: {error}") from None

    world = run.start_world(run.Options(device=args.device))
    model, recipe, classes = paper.load_run(checkpoint)
    pixels = images.eval_transform(recipe.input_size_px, recipe.eval_crop)(image).to(world.device)
    with torch.inference_mode():
        logits = model.to(world.device)(pixels[None])[0]
    probabilities, guesses = logits.float().softmax(0).topk(min(5, len(classes)))
    answer = {classes[guess]: p for guess, p in zip(guesses.tolist(), probabilities.tolist())}
    for name, probability in answer.items():
        print(f"{probability:7.2%}  {printable(name)}")
    drawing.answer(args.out, image, answer)
    print(f"{args.out} written; {recipe.model} from {checkpoint}")
