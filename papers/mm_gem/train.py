"""Trains MM-GEM: ``python -m papers.mm_gem.train tiny``.

The loop is transformers' Trainer, with DeepSpeed where a recipe asks for it; the same line works under torchrun. The
losses stand in model.py and losses.py. There is no gradient accumulation, which would leave every chunk with its own
few negatives: --micro-batch sets how many rows the networks see at a time within one exact contrastive loss. A run
leaves its folder under runs/mm_gem/ (see common/run.py).
"""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import run
from common.data.loader import steps_per_epoch
from papers.mm_gem import figures, parts
from papers.mm_gem.data import Rows, data_folder, open_captions, open_regions, train_loader
from papers.mm_gem.evaluate import evaluate, load
from papers.mm_gem.recipes import RECIPES, Recipe

WHOLE = "whole.json"  # written last: a checkpoint with it is complete


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.mm_gem.train")
    world = run.start_world(options)
    folder = train(name, recipe, options, world)
    if world.main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


class Trainer(transformers.Trainer):
    """transformers' Trainer, fed in an order that follows from the seed, whose checkpoints hold what is trained."""

    def __init__(self, batches: DataLoader, progress: Progress, recipe: Recipe, chunk: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.batches, self.progress, self.recipe, self.chunk = batches, progress, recipe, chunk
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(progress)

    def get_train_dataloader(self) -> DataLoader:
        return self.batches  # shared out between the ranks already

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Learning rates of the three parts; no weight decay on norms, biases and the temperature."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.recipe)
            self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, betas=(0.9, self.recipe.beta2))
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, chunk=self.chunk)
        self.progress.terms = {
            key: out[f"loss_{key}"].detach() for key in ("emb", "gen") if out.get(f"loss_{key}") is not None
        }
        return (out.loss, out) if return_outputs else out.loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise run.UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the last good checkpoint is in "
                f"{self.args.output_dir}. Lower --lr, --llm-lr or --clip-norm"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        weights = self.model.state_dict() if state_dict is None else state_dict
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        trained = {name: weights[name] for name, p in self.model.named_parameters() if p.requires_grad}
        run.save_weights(Path(output_dir) / "model.safetensors", trained)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = run.load_weights(Path(resume_from_checkpoint) / "model.safetensors")
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if unexpected or trained & set(missing):
            raise run.UserError(f"{resume_from_checkpoint} holds other weights than this recipe trains")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if dist.is_initialized():
            dist.barrier()  # every rank has written its part
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            run.write_json(folder / WHOLE, {"wall_s": self.progress.wall_s})


class Progress(transformers.TrainerCallback):
    """Log, checkpoints and stop of a run, and the seed of every step."""

    def __init__(self, log: run.Log, options: run.Options, recipe: Recipe, world: run.World, *, steps: int, start: int,
                 per_epoch: int, wall_s: float):
        self.log, self.options, self.recipe, self.world = log, options, recipe, world
        self.steps, self.start = steps, start
        self.every = options.checkpoint_every or per_epoch
        self.before, self.began, self.step = wall_s, time.perf_counter(), start
        self.terms: dict[str, torch.Tensor] = {}

    @property
    def wall_s(self) -> float:
        return self.before + time.perf_counter() - self.began

    @property
    def throughput(self) -> float | None:
        """Pairs per second since this process started."""
        return (self.step - self.start) * self.recipe.batch / (self.wall_s - self.before) or None

    def on_step_begin(self, args, state, control, **_):
        run.seed_all(self.options.seed, state.global_step + 1, self.world.rank)

    def on_step_end(self, args, state, control, **_):
        self.step = state.global_step
        last = self.step in (self.steps, self.options.stop_at)
        control.should_log |= last
        control.should_save |= last or self.step % self.every == 0
        control.should_training_stop |= last
        self.log.step(self.step)

    def on_log(self, args, state, control, logs=None, model=None, **_):
        if "loss" in logs:
            values = {"loss": logs["loss"], "lr": logs["learning_rate"], "samples_per_s": self.throughput}
            values |= {f"loss_{key}": value.item() for key, value in self.terms.items()}
            values["tau"] = getattr(model, "module", model).temperature
            if logs.get("grad_norm") is not None:
                values["grad_norm"] = float(logs["grad_norm"])
            self.log.step(self.step, values)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """For AdamW: projections, language model and vision encoder, each with and without weight decay."""
    rates = {"language_model": recipe.llm_lr, "vision_tower": recipe.vision_lr}
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = rates.get(name.split(".")[0], recipe.lr), parameter.dim() > 1
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": lr, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (lr, decays), members in groups.items()
    ]


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = data_folder(recipe, options.data)
    rows = Rows(open_captions(root, "train"), open_regions(root, "train") if recipe.region_share else [])
    per_epoch = steps_per_epoch(len(rows.images), recipe.batch)
    steps = recipe.steps or recipe.epochs * per_epoch
    run.accumulation(recipe.batch, world, 0)  # the batch must be shared out evenly
    if recipe.region_share and (recipe.batch * recipe.region_share) % world.size:
        raise run.UserError(f"{recipe.batch * recipe.region_share:g} regions of a batch for {world.size} processes")

    run.seed_all(options.seed)
    processor = parts.processor(recipe)
    folder = run.open_run("mm_gem", name, recipe, options, world)
    args = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=steps, gradient_accumulation_steps=1,
        per_device_train_batch_size=recipe.batch // world.size, learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule, warmup_steps=min(recipe.warmup_steps, steps // 2),
        max_grad_norm=recipe.clip_norm, bf16=world.amp is not None,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        deepspeed=deepspeed_config(recipe), use_cpu=world.device.type == "cpu", seed=options.seed,
        logging_steps=options.log_every, logging_nan_inf_filter=False, save_strategy="no", save_total_limit=2,
        report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_num_workers=options.workers,
        ddp_find_unused_parameters=recipe.objectives != "both", torch_compile=options.compile,
    )
    run.seed_all(options.seed)
    bf16_weights = recipe.deepspeed and world.amp is not None  # DeepSpeed keeps the float32 ones itself
    model = parts.build(recipe, processor, torch.bfloat16 if bf16_weights else torch.float32)
    params = sum(p.numel() for p in model.parameters())
    parts.choose_trained(model, recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    start, wall_s, checkpoint = 0, 0.0, newest_checkpoint(folder) if options.resume else None
    if checkpoint:
        start = int(checkpoint.name.split("-")[1])
        wall_s = json.loads((checkpoint / WHOLE).read_text())["wall_s"]
    log = run.Log(folder, world, steps=steps, start=start)
    share = recipe.batch // world.size
    chunk = options.micro_batch if 0 < options.micro_batch < share else 0
    log.say(
        f"{recipe.llm} with {recipe.vision}: {params:,} parameters, {trained:,} of them trained, {recipe.objectives}\n"
        f"{len(rows.images):,} images and {len(rows.regions):,} regions for training from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {share} pairs"
        f"{f', {chunk} at a time' if chunk else ''}, peak learning rate {recipe.lr:.3g}, steps {start} to {steps}\n"
        f"run folder {folder}"
    )
    batches = train_loader(
        rows, processor, recipe, steps, seed=options.seed, rank=world.rank, world=world.size, workers=options.workers,
        report=folder / "unreadable.txt",
    )
    progress = Progress(log, options, recipe, world, steps=steps, start=start, per_epoch=per_epoch, wall_s=wall_s)
    trainer = Trainer(batches, progress, recipe, chunk, model=model, args=args)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log.close()
    if progress.step < steps:
        log.say(f"stopped at step {progress.step} of {steps}; go on with --resume {folder}")
        return folder

    wall_s, throughput, peak = progress.wall_s, progress.throughput, run.peak_memory_bytes()
    if world.main:
        parts.merge(model, recipe)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
    del trainer, model, batches, args
    unset_hf_deepspeed_config()
    gc.collect()
    if world.main:
        report(name, recipe, options, world, folder, root, {
            "params": params, "wall_s": wall_s, "peak_mem_bytes": peak, "throughput": throughput,
        })
    if dist.is_initialized():
        dist.barrier()
    return folder


def report(name: str, recipe: Recipe, options: run.Options, world: run.World, folder: Path, root: Path,
           measured: dict[str, Any]) -> None:
    """Evaluates the saved model on the validation split, on the main process, and writes results and pictures."""
    tools = load(folder, world)
    images, regions = open_captions(root, "val"), open_regions(root, "val", needed=False)
    scores, said = evaluate(tools, images, regions, recipe)
    scores["training loss"] = [row["loss"] for row in run.read_log(folder) if "loss" in row][-1], "nats"
    run.write_json(folder / "said.json", {key: value for key, value in said.items() if key != "similarity"})
    figures.draw(folder, said)
    own = root == options.data and recipe.dataset == "scenes"
    run.write_results(folder, {
        "paper": "mm_gem", "recipe": name,
        "data": f"{root.name if own else recipe.dataset}: {len(open_captions(root, 'train')):,} training, "
                f"{len(said['images']):,} validation images",
        "metrics": [run.metric(key, value, unit) for key, (value, unit) in scores.items()],
        "flops": multiply_adds(recipe), "seed": options.seed, **measured,
    })


def deepspeed_config(recipe: Recipe) -> str | None:
    if not recipe.deepspeed:
        return None
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise run.UserError("this needs deepspeed (make setup PAPER=mm_gem); without it: --deepspeed ''") from None
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    return str(Path(__file__).parent / "scripts" / f"{recipe.deepspeed}.json")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = [path.parent for path in (folder / "checkpoints").glob(f"checkpoint-*/{WHOLE}")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def multiply_adds(recipe: Recipe) -> int:
    """Of one forward pass for a pair: an image, and a text of `contract.TEXT_TOKENS`."""
    from papers.mm_gem.contract import workload

    work = workload(recipe)
    return run.multiply_adds(work.model, *work.inputs)


if __name__ == "__main__":
    run.main(main)
