"""Can the loading processes feed a GPU? ``python -m papers.ctp.bench --data FOLDER``

Times one process on one core while it makes the clips of a recipe, stage by stage, and then the training loader with
one process for each core. Writes results/bench/ctp_clips_<hardware>.{json,md}.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from common import run
from common.data import loader
from common.data.tiny.clips import clips
from common.data.video import Videos, open_video, open_videos
from common.run import bench
from papers.ctp import data, evaluate, patches
from papers.ctp.recipes import RECIPES, Recipe

PEAK_TFLOPS = {"A100, TF32": 156, "H100 or H200, TF32": 495, "H100 or H200, bf16": 989}
UTILIZATION = 0.4  # assumed fraction of the peak that training reaches, as in tools/plan.py
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
    recipe, load = RECIPES[args.recipe], os.getloadavg()[0]
    bench.prepare(threads=1)
    videos = open_videos(args.data or clips(), "train")
    stages = stages_ms(videos, recipe, args.clips)
    with torch.device("meta"):
        model, inputs = evaluate.build(recipe, 1), evaluate.inputs(recipe)
    record = {
        "recipe": args.recipe, "videos": len(videos), "clips": args.clips,
        "milliseconds per clip": {stage: statistics.median(spent) for stage, spent in stages.items()},
        "clips per second, one process": 1000 / statistics.median(map(sum, zip(*stages.values()))),
        "loading processes": args.workers, "cores": CORES,
        "clips per second, loaded": loaded_per_second(videos, recipe, args.workers, args.clips),
        "training FLOPs per clip": 6 * run.multiply_adds(model, *inputs),
    }
    text = page(record, recipe)
    print(text)
    about = f"Median milliseconds of one process, {args.clips} clips of {args.recipe} from {len(videos)} videos."
    bench.write_record(args.out, "ctp_clips", "cpu", record, text, stamp="one thread", load=load, explanation=about)


def stages_ms(videos: Videos, recipe: Recipe, count: int) -> dict[str, list[float]]:
    """Milliseconds that each stage took of each clip."""
    rng, stages = np.random.default_rng(0), defaultdict(list)

    def timed(stage: str, function, *arguments) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        stages[stage].append(1000 * (time.perf_counter() - began))
        return result

    for i in range(count):
        with timed("open", open_video, videos.paths[i % len(videos)]) as video:
            frames = timed("decode", data.read_clip, video, rng, recipe)
        frames = timed("resize, crop, flip", data.random_crop, rng, frames, recipe)
        frames, *_ = timed("paste", patches.play, rng, frames, data.game(recipe))
        frames = timed("color", data.color, rng, frames, recipe)
        timed("tensor", data.tensor, frames)
    return stages


def loaded_per_second(videos: Videos, recipe: Recipe, workers: int, count: int) -> float:
    """Clips per second out of the training loader, whose processes make a batch each at a time, timed from when each
    has given its first; `count` or more are made by each after that."""
    batch, processes = min(recipe.batch, len(videos)), max(workers, 1)
    timed = processes * math.ceil(count / batch)
    batches = iter(loader.train_loader(
        data.training_clips(videos, recipe), loader.identity, batch, processes + timed, seed=0, workers=workers
    ))
    for _ in range(processes):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return timed * batch / (time.perf_counter() - began)


def page(record: dict[str, Any], recipe: Recipe) -> str:
    """Markdown: the stages, the loader, and what GPUs would take."""
    stages, per_second = record["milliseconds per clip"], record["clips per second, one process"]
    fed, flops = record["clips per second, loaded"], record["training FLOPs per clip"]
    rates = {gpu: UTILIZATION * peak * 1e12 / flops for gpu, peak in PEAK_TFLOPS.items()}
    return "\n".join([
        f"| {' | '.join(stages)} | all | clips/s |", "|---" * (len(stages) + 2) + "|",
        f"| {' | '.join(f'{ms:.1f}' for ms in stages.values())} | {1000 / per_second:.1f} | {per_second:.1f} |", "",
        f"The training loader with {record['loading processes']} processes on {record['cores']} cores gives {fed:.1f} "
        f"clips/s after warm-up, enough for a step of {recipe.batch} clips every {1000 * recipe.batch / fed:.0f} ms. "
        f"What a GPU would take, estimated from {flops / 1e9:.0f} GFLOP a clip at {UTILIZATION:.0%} of its peak:", "",
        f"| GPU | clips/s | ms for {recipe.batch} clips |", "|---|---|---|",
        *(f"| {gpu} | {rate:.0f} | {1000 * recipe.batch / rate:.0f} |" for gpu, rate in rates.items()), "",
    ])


if __name__ == "__main__":
    run.main(main)
