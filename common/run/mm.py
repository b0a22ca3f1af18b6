"""Detection and segmentation of a paper's backbone in mmengine's Runner, for papers/<name>/downstream/train.py.

The configurations are mmengine's, in ``configs/`` beside that file; under torchrun the same line trains on several
GPUs. Run ``tools/mm.sh`` once before: it adds mmcv and its family to the environment.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
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
    """A run folder to go on with, from its last checkpoint; 'auto': the newest unfinished run of these settings."""
    change: list[str] = field(default_factory=list)
    """Settings in mmengine's notation, such as optim_wrapper.optimizer.lr=5e-5."""


def main(paper: str, configs: Path, checkpoint: str) -> None:
    """Command line of a paper. `checkpoint`: the setting that takes the weights' file, such as
    "model.backbone.checkpoint"; a configuration's `checkpoint_in` lists others."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper}.downstream.train", description=__doc__)
    try:
        from mmengine.hooks import Hook
        from mmengine.runner import Runner
    except ImportError:
        raise UserError("detection and segmentation need mmcv and its family: run tools/mm.sh once") from None

    class Checkpoints(Hook):
        """What is written is read again without unpickling code, and knows how long training took."""

        def before_train(self, runner) -> None:
            self.began = time.perf_counter() - runner.message_hub.get_info("wall_s", 0.0)

        def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
            hub = checkpoint["message_hub"]
            hub["log_scalars"] = {}  # objects, for the log's running means only
            plain = {k: v for k, v in hub["runtime_info"].items() if type(v) in (str, int, float, list)}  # no numpy
            hub["runtime_info"] = plain | {"wall_s": self.wall_s()}

        def wall_s(self) -> float:
            return time.perf_counter() - self.began

    found(args, configs)
    name = f"downstream_{args.config}"
    options = run.Options(data=args.data, out=args.out, resume=args.resume or None, seed=args.seed, threads=0)
    world = run.start_world(options)
    settings = {"checkpoint": args.checkpoint, "change": args.change}
    folder = run.open_run(paper, name, settings, options, world)
    config = load(args, folder, configs, checkpoint)
    config.launcher = "pytorch" if world.size > 1 else "none"
    runner = Runner.from_cfg(config)
    checkpoints = Checkpoints()
    runner.register_hook(checkpoints)
    params = sum(p.numel() for p in runner.model.parameters())
    runner.train()
    wall_s = checkpoints.wall_s()
    scores, note = runner.test(), ""
    if not scores:
        scores, note = nothing_found(config.test_evaluator), "Nothing was found in any picture, which counts as 0.\n"
    if world.is_main:
        run.finish(
            folder, paper, name, options, data=config.about, metrics=metrics(scores), params=params, flops=None,
            wall_s=wall_s, throughput=None, table=note,
        )
        print((folder / "report.md").read_text(encoding="utf-8"))


def found(args: Arguments, configs: Path) -> Path:
    """The configuration's file; `UserError` for what can be told before anything is made."""
    path = configs / f"{args.config}.py"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in configs.glob("*.py")))
        raise UserError(f"no configuration {args.config!r}; there are {there}")
    if not args.data.is_dir():
        raise UserError(f"no data folder {args.data}")
    if wrong := [change for change in args.change if "=" not in change]:
        raise UserError(f"--change takes setting=value, got {wrong[0]!r}")
    return path


def load(args: Arguments, folder: Path, configs: Path, checkpoint: str):
    """mmengine's configuration, with its data where `args` says and everything it writes in `folder`."""
    from mmengine.config import Config, DictAction, utils

    utils.MODULE2PACKAGE["mmseg"] = "mmseg"  # mmengine looks for a distribution that the fork has renamed
    config = Config.fromfile(found(args, configs))
    root = config.data_root.rstrip("/")
    moved = _moved(config.to_dict(), root, str(args.data.resolve()))
    config = Config(moved, format_python_code=False)  # laying out the copies it writes would take half a minute
    changes = dict(change.split("=", 1) for change in args.change)
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in changes.items()})
    if args.checkpoint:
        config.merge_from_dict(dict.fromkeys(config.get("checkpoint_in", [checkpoint]), args.checkpoint))
    if config.get("pictures"):
        _first_pictures(config, folder)
    last = last_checkpoint(folder) if args.resume else None
    config.work_dir, config.load_from, config.resume = str(folder), last and str(last), last is not None
    config.randomness = {"seed": args.seed}
    return config


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; None before the first. mmengine would run the code in a file that is not only
    tensors, and would follow the name in last_checkpoint anywhere: so it is read here first, and in `folder`."""
    try:
        name = (folder / "last_checkpoint").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'last_checkpoint'} cannot be read: {error}") from None
    path = folder / Path(name).name
    run.load_weights(path)
    return path


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
    try:
        whole = run.read_json(source)
        boxes = [box for box in whole["annotations"] if not box["iscrowd"]]
        wanted = sorted({box["image_id"] for box in boxes})[: config.pictures]
        part = whole | {"images": [i for i in whole["images"] if i["id"] in wanted],
                        "annotations": [box for box in boxes if box["image_id"] in wanted]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is not COCO's JSON of instances: {type(error).__name__} {error}") from None
    path = (folder / "annotations.json").resolve()
    run.write_text(path, json.dumps(part))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.ann_file = str(path)
    config.val_evaluator.ann_file = config.test_evaluator.ann_file = str(path)


def nothing_found(evaluator: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of a detector that found nothing at all, of which mmdetection's COCO metric says nothing."""
    every = [evaluator] if isinstance(evaluator, Mapping) else evaluator
    asked = [each["metric"] for each in every]
    kinds = [kind for each in asked for kind in ([each] if isinstance(each, str) else each)]
    return {f"coco/{kind}_{name}": 0.0 for kind in kinds for name in ("mAP", "mAP_50", "mAP_75")}


def metrics(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of results.json, in percent; of COCO's and VOC's many AP the three that papers print."""
    found = {name.split("/")[-1]: float(value) * (100 if "AP" in name else 1) for name, value in scores.items()}
    left_out = re.compile(r".*_[sml]|AP(?!50|75)\d\d")
    return [run.metric(name, value, "%") for name, value in found.items() if not left_out.fullmatch(name)]
