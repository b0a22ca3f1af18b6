"""Picture in, picture out: ``python -m papers.smlpnet.demo cat.jpg --checkpoint RUN [--out answer.png]``.

Without a checkpoint, the newest finished run under runs/smlpnet; without a picture, a digit of the built-in set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from common import figures, run
from common.data import images, tiny
from papers.smlpnet.evaluate import PAPER


@dataclass
class Arguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    checkpoint: Path | None = None
    """Run folder."""
    out: Path = Path("answer.png")


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.smlpnet.demo", description=__doc__)
    results = sorted(Path("runs/smlpnet").glob("*/*/results.json"), key=lambda p: p.stat().st_mtime)
    finished = [p for p in results if (p.parent / "checkpoints").is_dir()]  # a comparison has none of its own
    if not (args.checkpoint or finished):
        raise run.UserError("no finished run under runs/smlpnet; make one with: make reproduce PAPER=smlpnet")
    checkpoint = args.checkpoint or finished[-1].parent
    picture = args.picture or next((tiny.digits() / "val" / "7").iterdir())
    try:
        image = Image.open(picture).convert("RGB")
    except OSError as error:
        raise run.UserError(f"{picture} is no picture: {error}") from None

    model, recipe, classes = PAPER.load_run(checkpoint)
    with torch.inference_mode():
        pixels = images.eval_transform(recipe.input_size_px, recipe.eval_crop)(image)
        chances, guesses = model(pixels[None])[0].softmax(0).topk(min(5, len(classes)))
    answer = {classes[guess]: chance for guess, chance in zip(guesses.tolist(), chances.tolist())}
    for name, chance in answer.items():
        print(f"{chance:7.2%}  {name}")
    figures.answer(args.out, image, answer)
    print(f"{args.out} written; {recipe.model} from {checkpoint}")


if __name__ == "__main__":
    run.main(main)
