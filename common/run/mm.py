"""Detection and segmentation of a paper's backbone in mmengine's Runner, for papers/<name>/downstream/train.py.

The configurations are mmengine's, in ``configs/`` beside that file; under torchrun the same line trains on several
GPUs. Run ``tools/mm.sh`` once before: it adds mmcv and its family to the environment.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from common import run
from common.run import UserError


@dataclass
class Arguments:
    config: Annotated[str, tyro.conf.Positional]
    """Name of a file in configs/."""
    data: Path
    """Folder of the data set the configuration is for, in its usual layout."""
    checkpoint: str = ""
    """Weights of the backbone, as the paper's README says; without, it starts from nothing."""
    out: Path = Path("runs")
    seed: int = 0
    resume: str = ""
    """A run folder to go on with, from its last checkpoint."""
    change: list[str] = field(default_factory=list)
    """Settings in mmengine's notation, such as optim_wrapper.optimizer.lr=5e-5."""


def main(paper: str, configs: Path, checkpoint: str) -> None:
    """Command line of a paper. `checkpoint`: the setting that takes the weights' file, such as
    "model.backbone.checkpoint"; a configuration's `checkpoint_in` lists others."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper}.downstream.train", description=__doc__)
    try:
        from mmengine.runner import Runner
    except ImportError:
        raise UserError("detection and segmentation need mmcv and its family: run tools/mm.sh once") from None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(args.resume) if args.resume else args.out / paper / f"downstream_{args.config}" / stamp
    config = load(args, folder, configs, checkpoint)
    runner = Runner.from_cfg(config)
    params = sum(p.numel() for p in runner.model.parameters())
    if runner.rank == 0:
        run.write_json(folder / "environment.json", run.environment())
    began = time.perf_counter()
    runner.train()
    wall_s = time.perf_counter() - began
    scores = runner.test()
    if runner.rank == 0:
        run.write_results(folder, {
            "paper": paper, "recipe": f"downstream_{args.config}", "data": config.about,
            "metrics": metrics(scores), "params": params, "flops": None, "wall_s": wall_s,
            "peak_mem_bytes": run.peak_memory_bytes(), "throughput": None, "seed": args.seed,
        })
        print((folder / "report.md").read_text())


def load(args: Arguments, folder: Path, configs: Path, checkpoint: str):
    """mmengine's configuration, with its data where `args` says and everything it writes in `folder`."""
    from mmengine.config import Config, DictAction, utils

    utils.MODULE2PACKAGE["mmseg"] = "mmseg"  # mmengine looks for a distribution that the fork has renamed
    path = configs / f"{args.config}.py"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in configs.glob("*.py")))
        raise UserError(f"no configuration {args.config!r}; there are {there}")
    if not args.data.is_dir():
        raise UserError(f"no data folder {args.data}")
    config = Config.fromfile(path)
    root = config.data_root.rstrip("/")
    moved = _moved(config.to_dict(), root, str(args.data.resolve()))
    config = Config(moved, format_python_code=False)  # laying out the copies it writes would take half a minute
    if wrong := [change for change in args.change if "=" not in change]:
        raise UserError(f"--change takes setting=value, got {wrong[0]!r}")
    changes = dict(change.split("=", 1) for change in args.change)
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in changes.items()})
    if args.checkpoint:
        config.merge_from_dict(dict.fromkeys(config.get("checkpoint_in", [checkpoint]), args.checkpoint))
    if config.get("pictures"):
        _first_pictures(config, folder)
    config.work_dir, config.resume = str(folder), bool(args.resume)
    config.randomness = {"seed": args.seed}
    config.launcher = "pytorch" if "RANK" in os.environ else "none"
    return config


def _moved(value: Any, root: str, data: str) -> Any:
    """Every path under `root` as one under `data`."""
    if isinstance(value, dict):
        return {key: _moved(each, root, data) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, root, data) for each in value)
    if isinstance(value, str) and (value.rstrip("/") == root or value.startswith(root + "/")):
        return data + value[len(root):]
    return value


def _first_pictures(config, folder: Path) -> None:
    """COCO annotations of the first training pictures alone, for training and for the test on the same ones."""
    source = Path(config.data_root, config.train_dataloader.dataset.ann_file)
    if not source.is_file():
        raise UserError(f"no {source}: expected COCO's annotations/ beside train2017/ and val2017/")
    whole = json.loads(source.read_text())
    boxes = [box for box in whole["annotations"] if not box["iscrowd"]]
    wanted = sorted({box["image_id"] for box in boxes})[: config.pictures]
    part = whole | {"images": [i for i in whole["images"] if i["id"] in wanted],
                    "annotations": [box for box in boxes if box["image_id"] in wanted]}
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "annotations.json").resolve()
    path.write_text(json.dumps(part))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.ann_file = str(path)
    config.val_evaluator.ann_file = config.test_evaluator.ann_file = str(path)


def metrics(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of results.json, in percent; of COCO's and VOC's many AP the three that papers print."""
    found = {name.split("/")[-1]: float(value) * (100 if "AP" in name else 1) for name, value in scores.items()}
    left_out = re.compile(r".*_[sml]|AP(?!50|75)\d\d")
    return [run.metric(name, value, "%") for name, value in found.items() if not left_out.fullmatch(name)]
