"""Picture in, picture out: ``python -m papers.maskco.demo photo.jpg --checkpoint RUN [--out regions.png]``.

Masks regions of one view and shows where in another view the network finds what it predicts to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from common.data.tiny.digits import digits
from common.run import UserError
from common.run import main as run_main
from papers.maskco import evaluate, figures
from papers.maskco.recipes import RECIPES


@dataclass
class Arguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    """An image file; without one, a digit of the built-in set."""
    checkpoint: Path | None = None
    """Run folder; without one, the paper's newest finished run under runs/."""
    out: Path = Path("regions.png")
    tries: int = 4
    """Rows: each draws other views and another region."""
    seed: int = 0


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.maskco.demo", description=__doc__)
    finished = sorted(Path("runs", "maskco").glob("*/*/results.json"), key=lambda p: p.stat().st_mtime)
    own = [path.parent for path in finished if getattr(RECIPES.get(path.parts[-3]), "method", None) == "maskco"]
    if not (args.checkpoint or own):
        raise UserError(
            "no finished run under runs/maskco; make one with make reproduce PAPER=maskco, or give --checkpoint"
        )
    checkpoint = args.checkpoint or own[-1]
    model, recipe, _ = evaluate.load_run(checkpoint)
    if recipe.method != "maskco":
        raise UserError(f"{checkpoint} was trained for {recipe.method}; the demo takes maskco")
    picture = args.picture or min((digits() / "val" / "7").iterdir())
    try:
        image = Image.open(picture).convert("RGB")
    except OSError as error:
        raise UserError(f"{picture} is no picture: {error}") from None
    figures.regions(args.out, model, [image] * args.tries, recipe, args.seed)
    print(f"{args.out} written: red, the masked region; bright, where {checkpoint} finds what it predicts")


if __name__ == "__main__":
    run_main(main)
