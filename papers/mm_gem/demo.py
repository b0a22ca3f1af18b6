"""Picture in, caption and picture out: ``python -m papers.mm_gem.demo cat.jpg [--checkpoint RUN] [--box 10 20 90 80]``.

Prints what the model says of the picture, or of a box in it, and draws it beside the most fitting of `--texts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import ImageDraw

from common import run
from common.data.picture import Unreadable, read_picture
from common.data.tiny.scenes import scenes
from common.run import UserError, drawing
from papers.mm_gem.embedder import load


@dataclass
class Arguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    """An image file; without one, a generated scene."""
    checkpoint: Path | None = None
    """Run folder, or model folder; without one, the newest run answers."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of a region in pixels."""
    texts: tuple[str, ...] = ()
    """Texts to compare the picture with; without any, its own caption is the only one."""
    beams: int = 1
    """Of the search for the caption."""
    new_tokens: int = 32
    """Most tokens of the caption."""
    out: Path = Path("answer.png")
    """Picture to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.demo", description="Describe a picture.")
    file = args.picture or min((scenes() / "val").glob("*.png"))
    try:
        picture = read_picture(file)
    except Unreadable as error:
        raise UserError(f"{file} is no readable picture ({error})") from None
    embedder = load(args.checkpoint, run.start_world(run.Options(device=args.device)))
    boxes = [[args.box or (0, 0, *picture.size)]]
    (caption,) = embedder.describe([picture], boxes, beams=args.beams, new_tokens=args.new_tokens)
    texts = args.texts or (caption,)
    similarity = embedder.regions([picture], boxes) @ embedder.texts(texts).mT
    probabilities = (similarity[0] / embedder.model.temperature).softmax(0).tolist()
    drawn = picture.copy()
    if args.box:
        ImageDraw.Draw(drawn).rectangle(args.box, outline="magenta", width=max(1, picture.width // 100))
    best = sorted(zip(texts, probabilities), key=lambda row: -row[1])[:8]
    drawing.answer(args.out, drawn, dict(best))
    print(caption)
    if args.texts:
        for text, probability in best:
            print(f"{probability:7.1%}  {text}")
    print(f"drawn in {args.out}")


if __name__ == "__main__":
    run.main(main)
