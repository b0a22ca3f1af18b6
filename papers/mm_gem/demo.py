"""Picture in, caption and picture out: ``python -m papers.mm_gem.demo cat.jpg [--checkpoint RUN] [--box 10 20 90 80]``.

Prints what the model says of the picture, or of a box in it, and draws it beside the most fitting of `--texts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image, ImageDraw, UnidentifiedImageError

from common import run
from common.run import UserError, drawing
from papers.mm_gem.evaluate import load


@dataclass
class Arguments:
    image: Annotated[Path, tyro.conf.Positional]
    """A picture."""
    checkpoint: Path | None = None
    """Run folder, or model folder; without one, the newest run answers."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of a region in pixels."""
    texts: tuple[str, ...] = ()
    """Texts to compare the picture with; without any, its own caption is the only one."""
    beams: int = 1
    new_tokens: int = 32
    """Most tokens of the caption."""
    out: Path = Path("answer.png")
    """Picture to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.demo", description="Describe a picture.")
    try:
        picture = Image.open(args.image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{args.image} is no readable picture ({error})") from None
    tools = load(args.checkpoint, run.start_world(run.Options(device=args.device)))
    source = (picture, args.box)
    (caption,) = tools.describe([source], args.beams, args.new_tokens)
    texts = args.texts or (caption,)
    similarity = tools.images([source]) @ tools.texts(texts).mT
    chances = (similarity[0] / tools.model.temperature).softmax(0).tolist()
    drawn = picture.copy()
    if args.box:
        ImageDraw.Draw(drawn).rectangle(args.box, outline="magenta", width=max(1, picture.width // 100))
    best = sorted(zip(texts, chances), key=lambda row: -row[1])[:8]
    drawing.answer(args.out, drawn, dict(best))
    print(caption)
    for text, chance in best if args.texts else ():
        print(f"{chance:7.1%}  {text}")
    print(f"drawn in {args.out}")


if __name__ == "__main__":
    run.main(main)
