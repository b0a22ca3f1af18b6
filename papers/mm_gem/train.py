"""Trains MM-GEM: ``python -m papers.mm_gem.train tiny``.

The loop is transformers' Trainer, with DeepSpeed where a recipe asks for it; the same line works under torchrun. The
losses stand in model.py. There is no gradient accumulation, which would leave every chunk with its own few negatives:
--micro-batch sets how many rows the networks see at a time within one exact contrastive loss. A run leaves its folder
under runs/mm_gem/ (see common/run/folder.py).
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import run
from common.data.loader import steps_per_epoch
from common.run import UserError, model_folder
from common.run.hf import Progress, Trainer, arguments, count, deepspeed_config, quiet, shape
from papers.mm_gem import build, features, figures
from papers.mm_gem.data import (
    Rows,
    data_folder,
    describe,
    open_captions,
    open_regions,
    regions_if_there,
    train_loader,
)
from papers.mm_gem.embedder import load
from papers.mm_gem.evaluate import Validation, evaluate
from papers.mm_gem.processing import MMGEMProcessor
from papers.mm_gem.recipes import Recipe


class GemTrainer(Trainer):
    """With the paper's optimizer and loss; it also logs the loss's two terms and the temperature."""

    def __init__(self, *args: Any, recipe: Recipe, chunk: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe, self.chunk = recipe, chunk

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Learning rates of the three parts; no weight decay on norms, biases and the temperature."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.recipe)
            self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, betas=(0.9, self.recipe.beta2))
        return self.optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Checks what it finds on the CPU, and keeps boxes, which hold their images' indices, out of the cast that
        DeepSpeed's trainings get."""
        self.model.check(**inputs)
        rest = super()._prepare_inputs({key: value for key, value in inputs.items() if key != "boxes"})
        return rest | ({"boxes": inputs["boxes"].to(self.args.device, non_blocking=True)} if "boxes" in inputs else {})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, chunk=self.chunk, groups=self.recipe.length_groups, checked=True)
        self.terms = {key: out[key].detach() for key in ("loss_emb", "loss_gen") if out.get(key) is not None}
        return (out.loss, out) if return_outputs else out.loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            logs |= {key: value.item() for key, value in self.terms.items()} | {"tau": self.model.temperature}
        super().log(logs, *args)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """For AdamW: projections, language model and vision encoder, each with and without weight decay."""
    rates = {"language_model": recipe.llm_lr, "vision_tower": recipe.vision_lr}
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = rates.get(name.split(".")[0], recipe.lr), len(shape(parameter)) > 1
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": lr, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (lr, decays), members in groups.items()
    ]


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    quiet()
    if recipe.tune == "lora" and recipe.deepspeed == "zero3":  # peft's token rows then need a GPU: never run
        raise UserError("--tune lora trains with --deepspeed zero2 or '', not zero3")
    if recipe.keep_features and recipe.region_fraction:
        raise UserError("--keep-features keeps maps of whole images; train regions with --no-keep-features")
    root = data_folder(recipe, options.data)
    rows = Rows(open_captions(root, "train"), open_regions(root, "train") if recipe.region_fraction else [])
    held_out = open_captions(root, "val"), regions_if_there(root, "val")
    Validation.of(*held_out, recipe.eval_rows)  # an empty caption is found now, not at the end
    per_epoch = steps_per_epoch(len(rows.images), recipe.batch)
    steps = recipe.steps or recipe.epochs * per_epoch
    run.accumulation(recipe.batch, world, 0)  # the batch must be shared out evenly
    regions = recipe.batch * recipe.region_fraction
    if regions % world.size:
        raise UserError(
            f"a batch of {recipe.batch} has {regions:g} regions: expected a multiple of the {world.size} processes; "
            "change --batch or --region-fraction"
        )
    processor = build.processor(recipe)
    folder = run.open_run("mm_gem", name, recipe, options, world)
    args = arguments(
        folder, options, world, batch=recipe.batch, steps=steps, learning_rate=recipe.lr,
        max_grad_norm=recipe.clip_norm, lr_scheduler_type=recipe.schedule,
        warmup_steps=min(recipe.warmup_steps, steps // 2), gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        deepspeed=deepspeed_config(Path(__file__).parent, recipe.deepspeed),
        ddp_find_unused_parameters=recipe.objectives != "both",
    )
    # After the arguments: with ZeRO-3 the two networks' weights are scattered as they are loaded.
    run.seed_all(options.seed)
    bf16_weights = recipe.deepspeed and world.amp is not None  # DeepSpeed keeps the float32 ones itself
    dtype = torch.bfloat16 if bf16_weights else torch.float32
    model = build.model(recipe, processor, dtype)
    params = count(model.parameters())
    build.choose_trained(model, recipe)
    trained = count(p for p in model.parameters() if p.requires_grad)
    if recipe.keep_features:
        rows.images = features.keep(model.to(world.device), processor, rows.images, options.workers)

    progress = Progress(folder, options, world, batch=recipe.batch, steps=steps, per_epoch=per_epoch)
    per_rank = recipe.batch // world.size
    chunk = options.micro_batch if 0 < options.micro_batch < per_rank else 0
    progress.log.say(
        f"{recipe.llm} with {recipe.vision}: {params:,} parameters, {trained:,} of them trained "
        f"({build.shared_parameters(model):,} of use to both objectives), {recipe.objectives}\n"
        f"{len(rows.images):,} images and {len(rows.regions):,} regions for training from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {per_rank} pairs"
        f"{f', {chunk} at a time' if chunk else ''}, peak learning rate {recipe.lr:.3g}, "
        f"steps {progress.clock.start} to {steps}\nrun folder {folder}"
    )
    batches = train_loader(
        rows, processor, recipe, steps, seed=options.seed, rank=world.rank, world=world.size, workers=options.workers,
        report=folder / "unreadable.txt",
    )
    trainer = GemTrainer(batches, progress, recipe=recipe, chunk=chunk, model=model, args=args)
    if not trainer.run_steps():
        return folder

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights, peak = trainer.whole_weights(), run.peak_memory_bytes()
    del trainer, model, batches, args
    unset_hf_deepspeed_config()  # what is loaded from here on is whole
    gc.collect()
    if not world.is_main:
        return folder
    export(folder, recipe, processor, weights, dtype)
    if recipe.tune == "lora":  # what tools/ship.py takes: all that connects the two networks
        run.save_weights(folder / "connection.safetensors", {name: weights[name] for name in names})
    del weights
    scores, outputs = evaluate(load(folder, world, options.workers), *held_out, recipe)  # what others will load
    scores["training loss"] = [row["loss"] for row in run.read_log(folder) if "loss" in row][-1], "nats"
    run.write_json(folder / "outputs.json", outputs)
    run.finish(
        folder, "mm_gem", name, options,
        data=describe(recipe, options.data, len(rows.images), len(outputs["images"])),
        metrics=[run.metric(key, value, unit) for key, (value, unit) in scores.items()], params=params,
        flops=multiply_adds(recipe), wall_s=progress.clock.wall_s, throughput=progress.clock.rate, peak_mem_bytes=peak,
        then={"pictures": lambda: figures.draw(folder, outputs)},
    )
    return folder


def export(
    folder: Path, recipe: Recipe, processor: MMGEMProcessor, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """``model/`` for from_pretrained, LoRA merged."""
    model = build.model(recipe, processor, dtype)  # whole, where ZeRO-3 has scattered the trained one
    build.choose_trained(model, recipe)
    model.load_state_dict(weights)
    if recipe.tune == "lora":
        model.language_model = model.language_model.merge_and_unload()
    model_folder.save(folder / "model", model, processor)


def multiply_adds(recipe: Recipe) -> int:
    """Of one forward pass for a pair: an image, and a text of `build.TEXT_TOKENS`."""
    model, inputs = build.on_meta(recipe)
    return run.multiply_adds(model, *inputs)


if __name__ == "__main__":
    run.through_the_door(__package__)
