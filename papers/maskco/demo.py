"""Picture in, picture out: ``python -m papers.maskco.demo photo.jpg --checkpoint RUN [--out regions.png]``.

Masks regions of one view and shows where in another view the network finds what it predicts to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import run
from common.data.picture import Unreadable, read_picture
from common.data.tiny.digits import digits
from common.run import UserError, shipped
from papers.maskco import evaluate, figures
from papers.maskco.recipes import RECIPES


@dataclass
class Arguments:
    picture: Annotated[Path | None, tyro.conf.Positional] = None
    """An image file; without one, a digit of the built-in set."""
    checkpoint: Path | None = None
    """Run folder, or shipped[:NAME]; without one, the shipped weights, or the newest finished run under runs/."""
    out: Path = Path("regions.png")
    tries: int = 4
    """Rows: each draws other views and another region."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.maskco.demo", description=__doc__)
    device = run.start_world(run.Options(device=args.device)).device
    shown = [name for name, recipe in RECIPES.items() if recipe.method == "maskco"]
    checkpoint = shipped.for_demo("maskco", args.checkpoint, shown)
    model, recipe, _ = evaluate.load_run(checkpoint)
    if recipe.method != "maskco":
        raise UserError(f"{checkpoint} was trained for {recipe.method}; the demo takes maskco")
    picture = args.picture or min((digits() / "val" / "7").iterdir())
    try:
        image = read_picture(picture)
    except Unreadable as error:
        raise UserError(f"{picture} is no picture: {error}") from None
    figures.regions(args.out, model.to(device), [image] * args.tries, recipe, args.seed)
    print(f"{args.out} written: red, the masked region; bright, where {checkpoint} finds what it predicts")


if __name__ == "__main__":
    run.main(main)
