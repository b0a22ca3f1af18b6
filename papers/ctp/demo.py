"""Video in, video out: ``python -m papers.ctp.demo video.mp4 --checkpoint RUN [--out tracks.mp4]``.

A network that learned to track plays the game on the video; a recogniser says what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from common import run
from common.data.text import printable
from common.data.tiny.clips import clips
from common.data.video import open_video, write_video
from common.run import UserError, shipped
from papers.ctp import data, evaluate, figures
from papers.ctp.recipes import RECIPES


@dataclass
class Arguments:
    video: Annotated[Path | None, tyro.conf.Positional] = None
    """A video file or a folder of frames; without one, a clip of the built-in set."""
    checkpoint: Path | None = None
    """Run folder, or shipped[:NAME]; without one, the shipped weights, or the newest finished run under runs/."""
    out: Path = Path("tracks.gif")
    """.gif or .mp4; of a tracker."""
    seed: int = 0
    """Of the game: which patches, and where they go."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.ctp.demo", description=__doc__)
    device = run.start_world(run.Options(device=args.device)).device
    shown = [name for name, recipe in RECIPES.items() if recipe.method in ("ctp", "recognize")]
    checkpoint = shipped.for_demo("ctp", args.checkpoint, shown)
    model, recipe, classes = evaluate.load_run(checkpoint)
    if recipe.method not in ("ctp", "recognize"):
        raise UserError(f"{checkpoint} was trained for {recipe.method}; the demo takes ctp and recognize")
    model.to(device)
    video = args.video or min((clips() / "UCF-101" / "PanLeft").iterdir())
    try:
        with open_video(video) as opened:
            if recipe.method == "ctp":
                sample = data.tracking(opened, np.random.default_rng(args.seed), recipe)
            else:
                sample = data.test_clips(opened, np.random.default_rng(args.seed), recipe)
    except OSError as error:
        raise UserError(f"{video} is no video: {error}") from None
    if recipe.method == "ctp":
        frames = figures.track(model, sample, recipe)
        write_video(args.out, frames, fps=4)
        print(f"{args.out} written: thin, where the patches are; thick, where {checkpoint} says they are")
        return
    with torch.inference_mode():
        probabilities, guesses = model(sample[None].to(device)).mean(1).softmax(1)[0].topk(min(5, len(classes)))
    for probability, guess in zip(probabilities.tolist(), guesses.tolist()):
        print(f"{probability:7.2%}  {printable(classes[guess])}")


if __name__ == "__main__":
    run.main(main)
