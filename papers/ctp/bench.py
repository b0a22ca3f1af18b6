"""Can the loading processes feed a GPU? ``python -m papers.ctp.bench --data FOLDER``

Times one process on one core while it makes the clips of a recipe, stage by stage, and then the training loader with
one process for each core. Writes results/bench/ctp_clips_<hardware>.{json,md}.
"""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro

from common import run
from common.data import loader
from common.data.video import Videos, open_video, open_videos
from papers.ctp import cases, data, evaluate, patches
from papers.ctp.recipes import RECIPES, Recipe

PEAK_TFLOPS = {"A100, TF32": 156, "H100 or H200, TF32": 495, "H100 or H200, bf16": 989}
UTILISATION = 0.4  # assumed share of the peak that training reaches, as in tools/plan.py
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass
class Arguments:
    data: Path | None = None
    """Data folder in any layout of common/data/video.py; without one, the built-in clips."""
    recipe: str = "ucf101_r3d18"
    clips: int = 100
    """That a process makes, alone or as one of the loading processes."""
    workers: int = CORES
    """Loading processes."""
    out: Path = Path(__file__).parent / "results" / "bench"


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.ctp.bench", description=__doc__)
    if args.recipe not in RECIPES or RECIPES[args.recipe].method != "ctp":
        raise run.UserError(f"no recipe of the game is called {args.recipe!r}")
    recipe = RECIPES[args.recipe]
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    videos = open_videos(args.data or evaluate.data_folder(RECIPES["tiny"], None), "train")
    rng, stages = np.random.default_rng(0), {}

    def timed(stage: str, function):
        began = time.perf_counter()
        result = function()
        stages.setdefault(stage, []).append(time.perf_counter() - began)
        return result

    for i in range(args.clips):
        with timed("open", lambda i=i: open_video(videos.paths[i % len(videos)])) as video:
            frames = timed("decode", lambda video=video: data.read_clip(video, rng, recipe))
        frames = timed("resize, crop, flip", lambda frames=frames: data.place(rng, frames, recipe))
        frames, *_ = timed("paste", lambda frames=frames: patches.play(rng, frames, data.game(recipe)))
        frames = timed("colour", lambda frames=frames: data.colour(rng, frames, recipe))
        timed("tensor", lambda frames=frames: data.tensor(frames))

    means = {stage: 1000 * float(np.mean(spent)) for stage, spent in stages.items()}
    per_second = 1000 / sum(means.values())
    with torch.device("meta"):
        model, inputs = evaluate.build(recipe, 1), cases.inputs(recipe)
    flops = 6 * run.multiply_adds(model, *inputs)
    loaded = loaded_per_second(videos, recipe, args.workers, args.clips)
    about = {
        "recipe": args.recipe, "videos": len(videos), "clips": args.clips, "milliseconds per clip": means,
        "clips per second, one process": per_second, "loading processes": args.workers, "cores": CORES,
        "clips per second, loaded": loaded, "training FLOPs per clip": flops, "hardware": run.hardware(),
        "git": run.git_revision(), "time": run.environment()["time"],
    }
    stem = args.out / ("ctp_clips_" + re.sub(r"[^a-z0-9]+", "_", run.hardware().lower()).strip("_"))
    run.write_json(stem.with_suffix(".json"), about)
    stem.with_suffix(".md").write_text(page(about, recipe))
    print(stem.with_suffix(".md").read_text())


def loaded_per_second(videos: Videos, recipe: Recipe, workers: int, clips: int) -> float:
    """Clips per second out of the training loader, whose processes make a batch each at a time, timed from when each
    has given its first; `clips` or more are made by each after that."""
    batch, processes = min(recipe.batch, len(videos)), max(workers, 1)
    timed = processes * math.ceil(clips / batch)
    batches = iter(loader.train_loader(
        data.training_clips(videos, recipe), evaluate.as_it_is, batch, processes + timed, seed=0, workers=workers
    ))
    for _ in range(processes):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return timed * batch / (time.perf_counter() - began)


def page(about: dict, recipe: Recipe) -> str:
    means, per_second, flops = (
        about[key] for key in ("milliseconds per clip", "clips per second, one process", "training FLOPs per clip")
    )
    fed = about["clips per second, loaded"]
    rates = {gpu: UTILISATION * peak * 1e12 / flops for gpu, peak in PEAK_TFLOPS.items()}
    needs = [f"| {gpu} | {rate:.0f} | {1000 * recipe.batch / rate:.0f} |" for gpu, rate in rates.items()]
    return "\n".join([
        "`.venv/bin/python -m papers.ctp.bench --data FOLDER`", "",
        f"{about['hardware']}, one process on one core, {about['clips']} clips of {about['recipe']} from "
        f"{about['videos']} videos; revision {about['git']}, {about['time']}", "",
        f"| {' | '.join(means)} | all | clips/s |", "|---" * (len(means) + 2) + "|",
        f"| {' | '.join(f'{ms:.1f} ms' for ms in (*means.values(), sum(means.values())))} | {per_second:.1f} |", "",
        f"The training loader with {about['loading processes']} processes on {about['cores']} cores gives {fed:.1f} "
        f"clips/s after warm-up, enough for a step of {recipe.batch} clips every {1000 * recipe.batch / fed:.0f} ms. "
        "What a GPU would take, estimated from "
        f"{flops / 1e9:.0f} GFLOP a clip at {UTILISATION:.0%} of its peak:", "",
        f"| GPU | clips/s | ms for {recipe.batch} clips |", "|---|---|---|", *needs, "",
    ])


if __name__ == "__main__":
    run.main(main)
