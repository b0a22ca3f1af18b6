"""Trains VLoRA or the token baseline: ``python -m papers.vlora.train tiny``.

The loop is transformers' Trainer, with DeepSpeed where a recipe asks for it; the same line works under torchrun and
deepspeed. The loss is the language model's own: cross-entropy of the learned tokens, averaged over the global batch. A
run leaves its folder under runs/vlora/ (see common/run.py).
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader, Subset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import run
from common.data.loader import steps_per_epoch
from papers.vlora import figures, parts
from papers.vlora.data import Encoded, data_folder, has_split, open_talks, train_loader
from papers.vlora.evaluate import evaluate, load
from papers.vlora.recipes import RECIPES, Recipe
from papers.vlora.vision_language import VisionLanguageModel

WHOLE = "whole.json"  # written last: a checkpoint with it is complete
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.vlora.train")
    world = run.start_world(options)
    folder = train(name, recipe, options, world)
    if world.main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


class Trainer(transformers.Trainer):
    """transformers' Trainer, fed in an order that follows from the seed, whose checkpoints hold what is trained."""

    def __init__(self, batches: DataLoader, progress: Progress, **kwargs: Any):
        super().__init__(**kwargs)
        self.batches, self.progress = batches, progress
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(progress)

    def get_train_dataloader(self) -> DataLoader:
        return self.batches  # shared out between the ranks already

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise run.UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the last good checkpoint is in "
                f"{self.args.output_dir}. Lower --lr or --clip-norm"
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

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole, on the main process; ZeRO-3 gathers what it has scattered."""
        if self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.deepspeed)
        return self.model.state_dict()


class Progress(transformers.TrainerCallback):
    """Log, checkpoints and stop of a run, and the seed of every step."""

    def __init__(self, log: run.Log, options: run.Options, recipe: Recipe, world: run.World, *, steps: int, start: int,
                 per_epoch: int, wall_s: float):
        self.log, self.options, self.recipe, self.world = log, options, recipe, world
        self.steps, self.start = steps, start
        self.every = options.checkpoint_every or per_epoch
        self.before, self.began, self.step = wall_s, time.perf_counter(), start

    @property
    def wall_s(self) -> float:
        return self.before + time.perf_counter() - self.began

    @property
    def throughput(self) -> float | None:
        """Samples per second since this process started."""
        return (self.step - self.start) * self.recipe.batch / (self.wall_s - self.before) or None

    def on_step_begin(self, args, state, control, **_):
        run.seed_all(self.options.seed, state.global_step + 1, self.world.rank)

    def on_step_end(self, args, state, control, **_):
        self.step = state.global_step
        last = self.step in (self.steps, self.options.stop_at)
        control.should_log |= last
        control.should_save |= last or self.step % self.every == 0
        control.should_evaluate = self.step % self.recipe.eval_every == 0 or self.step == self.steps
        control.should_training_stop |= last
        self.log.step(self.step)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            values = {"loss": logs["loss"], "lr": logs["learning_rate"], "samples_per_s": self.throughput}
            if logs.get("grad_norm") is not None:
                values["grad_norm"] = logs["grad_norm"]
            self.log.step(self.step, values)
        elif "eval_loss" in logs:
            self.log.step(self.step, {"val/loss": logs["eval_loss"]})


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = data_folder(recipe, options.data)
    talks = open_talks(root, "train", recipe)
    held_out = open_talks(root, "val", recipe) if has_split(root, "val", recipe) else None
    per_epoch = steps_per_epoch(len(talks), recipe.batch)
    steps = recipe.steps or recipe.epochs * per_epoch
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)

    run.seed_all(options.seed)
    processor = parts.processor(recipe)
    folder = run.open_run("vlora", name, recipe, options, world)
    schedule = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    args = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=steps, gradient_accumulation_steps=chunks,
        per_device_train_batch_size=math.ceil(recipe.batch / world.size / chunks), per_device_eval_batch_size=16,
        learning_rate=recipe.lr, lr_scheduler_type=schedule, warmup_steps=round(recipe.warmup * steps),
        optim="adamw_torch",
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip_norm, bf16=world.amp is not None,
        gradient_checkpointing=recipe.gradient_checkpointing, deepspeed=deepspeed_config(recipe),
        use_cpu=world.device.type == "cpu", seed=options.seed, logging_steps=options.log_every,
        logging_nan_inf_filter=False, save_strategy="no", save_total_limit=2, eval_strategy="no",
        prediction_loss_only=True, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_num_workers=options.workers, ddp_find_unused_parameters=False, torch_compile=options.compile,
    )
    # After the arguments: with ZeRO-3 the language model's weights are scattered as they are loaded.
    run.seed_all(options.seed)
    bf16_weights = recipe.deepspeed and world.amp is not None  # DeepSpeed keeps the float32 ones itself
    model = parts.build(recipe, processor.image_token_id, torch.bfloat16 if bf16_weights else torch.float32)
    if recipe.connection:
        load_connection(model, Path(recipe.connection), recipe)
    choose_trained(model, recipe)
    params = sum(_size(p) for p in model.parameters())
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)

    start, wall_s, checkpoint = 0, 0.0, newest_checkpoint(folder) if options.resume else None
    if checkpoint:
        start = int(checkpoint.name.split("-")[1])
        wall_s = json.loads((checkpoint / WHOLE).read_text())["wall_s"]
    log = run.Log(folder, world, steps=steps, start=start)
    log.say(
        f"{recipe.method}, {recipe.llm} with {recipe.vision}: {params:,} parameters, {trained:,} of them trained\n"
        f"{len(talks):,} training and {len(held_out) if held_out else 0:,} validation samples from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} samples"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, peak learning rate {recipe.lr:.3g}, "
        f"steps {start} to {steps}\nrun folder {folder}"
    )
    batches = train_loader(
        talks, processor, recipe, steps, seed=options.seed, rank=world.rank, world=world.size, chunks=chunks,
        workers=options.workers, report=folder / "unreadable.txt",
    )
    progress = Progress(log, options, recipe, world, steps=steps, start=start, per_epoch=per_epoch, wall_s=wall_s)
    trainer = Trainer(
        batches, progress, model=model, args=args, data_collator=processor.collate,
        eval_dataset=_some(Encoded(held_out, processor, recipe.max_length, strict=True), 256) if held_out else None,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log.close()
    if progress.step < steps:
        log.say(f"stopped at step {progress.step} of {steps}; go on with --resume {folder}")
        return folder

    weights = trainer.whole_weights()
    if world.main:
        save_model(model, processor, weights, folder, recipe)
    wall_s, throughput, peak = progress.wall_s, progress.throughput, run.peak_memory_bytes()
    del trainer, model, weights, batches, args
    unset_hf_deepspeed_config()  # what is loaded from here on is whole on every process
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
    samples, scores = [], {}
    model, processor = load(folder, world.device)
    if held_out:
        scores, samples = evaluate(model, processor, held_out, recipe, world, talks)
    if world.main:
        scores["training loss"] = [row["loss"] for row in run.read_log(folder) if "loss" in row][-1], "nats"
        run.write_json(folder / "answers.json", samples)
        figures.draw(folder, held_out, samples)
        run.write_results(folder, {
            "paper": "vlora", "recipe": name,
            "data": f"{recipe.dataset if root != options.data or recipe.dataset != 'scenes' else root.name}: "
                    f"{len(talks):,} training, {len(samples):,} validation samples",
            "metrics": [run.metric(key, value, unit) for key, (value, unit) in scores.items()],
            "params": params, "flops": multiply_adds(recipe), "wall_s": wall_s, "peak_mem_bytes": peak,
            "throughput": throughput, "seed": options.seed,
        })
    return folder


def deepspeed_config(recipe: Recipe) -> str | None:
    if not recipe.deepspeed:
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError:
        message = "this recipe needs deepspeed (make setup PAPER=vlora); to do without: --deepspeed ''"
        raise run.UserError(message) from None
    if dist.is_initialized():
        deepspeed.init_distributed()  # joins our group; else ZeRO-3 takes itself for alone while weights are loaded
    return str(Path(__file__).parent / "scripts" / f"{recipe.deepspeed}.json")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = [path.parent for path in (folder / "checkpoints").glob(f"checkpoint-*/{WHOLE}")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def choose_trained(model: VisionLanguageModel, recipe: Recipe) -> None:
    """The connection is trained always, the vision tower never, the LLM as the recipe says."""
    model.language_model.requires_grad_(recipe.tune == "full")
    if recipe.tune == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=LORA_LAYERS)
        model.language_model = get_peft_model(model.language_model, lora)


def load_connection(model: VisionLanguageModel, path: Path, recipe: Recipe) -> None:
    """The pre-trained generator (or projector) from a run folder or file; all of it, and nothing else."""
    weights = run.load_weights(path / "connection.safetensors" if path.is_dir() else path)
    part = getattr(model, parts.CONNECTION[recipe.method].removesuffix("."))
    try:
        part.load_state_dict(weights)
    except RuntimeError as error:
        raise run.UserError(f"{path} does not fit this recipe's model: {' '.join(str(error).split())}") from None


def save_model(
    model: VisionLanguageModel, processor: Any, weights: dict[str, torch.Tensor], folder: Path, recipe: Recipe
) -> None:
    """``model/`` for from_pretrained, LoRA merged, and ``connection.safetensors`` for a second stage."""
    if recipe.tune == "lora":
        weights = merge_lora(weights, recipe.lora_alpha / recipe.lora_rank)
        model.language_model = model.language_model.get_base_model()
    # DeepSpeed's copies share no memory, by which transformers would know a tied weight.
    weights = {name: w for name, w in weights.items() if name not in model.all_tied_weights_keys}
    prefix = parts.CONNECTION[recipe.method]
    connection = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    run.save_weights(folder / "connection.safetensors", connection)
    model.save_pretrained(folder / "model", state_dict=weights)
    processor.save_pretrained(folder / "model")


def merge_lora(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A state dict with LoRA's low-rank weights added to those they belong to, under the plain model's names."""
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            down, up = (weights[name.replace(".base_layer.", f".lora_{x}.default.")] for x in "AB")
            weight = (weight.float() + scale * up.float() @ down.float()).to(weight.dtype)
        merged[re.sub(r"base_model\.model\.", "", name).replace(".base_layer.", ".")] = weight
    return merged


def multiply_adds(recipe: Recipe) -> int:
    """Of one forward pass for a sample: an image and 32 tokens."""
    from papers.vlora.contract import workload

    work = workload(recipe)
    return run.multiply_adds(work.model, *work.inputs)


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _some(data: Encoded, most: int) -> Subset:
    count = min(most, len(data))
    return Subset(data, [len(data) * i // count for i in range(count)])


if __name__ == "__main__":
    run.main(main)
