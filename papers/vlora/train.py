"""Trains VLoRA or the token baseline: ``python -m papers.vlora.train tiny``.

The loop is transformers' Trainer, with DeepSpeed where a recipe asks for it; the same line works under torchrun and
deepspeed. The loss is the language model's own: cross-entropy of the learned tokens, averaged over the global batch. A
run leaves its folder under runs/vlora/ (see common/run/folder.py).
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.masking_utils import create_causal_mask

from common import run
from common.data.loader import steps_per_epoch
from common.run import model_folder
from common.run.hf import Progress, Trainer, arguments, count, deepspeed_config, quiet
from papers.vlora import build, figures
from papers.vlora.data import Encoded, data_folder, describe, evenly_spread, open_dataset, open_if_there, train_loader
from papers.vlora.evaluate import evaluate, load, questions
from papers.vlora.features import featured
from papers.vlora.model import VLoRAForConditionalGeneration
from papers.vlora.processing import VLoRAProcessor
from papers.vlora.recipes import Recipe
from papers.vlora.vision_language import positions


class VLoRATrainer(Trainer):
    """Says at full length what is masked: transformers would ask the device, and the host would wait."""

    def compute_loss(self, model, inputs, *args: Any, **kwargs: Any):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        config = self.model.config.text_config
        sliding = getattr(config, "sliding_window", None)
        if ids.is_cuda and isinstance(self.model, VLoRAForConditionalGeneration) and not sliding:
            seen = mask.masked_fill(self.model.placeholders(ids), 0)
            like = ids[..., None].to(self.model.dtype)
            ready = create_causal_mask(config, like, seen, None, allow_is_causal_skip=False)
            inputs = {**inputs, "attention_mask": ready, "position_ids": positions(mask)}
        return super().compute_loss(model, inputs, *args, **kwargs)


VALIDATION_SAMPLES = 256  # of those whose loss is watched during the training


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    quiet()
    root = data_folder(recipe, options.data)
    held_out = open_if_there(root, "val", recipe)
    if held_out:
        questions(held_out, recipe.eval_rows)  # an empty caption is found now, not at the end
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)
    processor = build.processor(recipe)
    if recipe.features and held_out:
        held_out = featured(held_out, recipe, processor, train=False)
    folder = run.open_run("vlora", name, recipe, options, world)
    data = open_dataset(root, "train", recipe, report=folder / "unreadable.txt" if world.is_main else None)
    if recipe.features:
        data = featured(data, recipe, processor, train=True)
    per_epoch = steps_per_epoch(len(data), recipe.batch)
    steps = recipe.steps or recipe.epochs * per_epoch
    args = arguments(
        folder, options, world, batch=recipe.batch, steps=steps, chunks=chunks, per_device_eval_batch_size=16,
        optim="adamw_torch", learning_rate=recipe.lr, weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip_norm,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=round(recipe.warmup_ratio * steps), gradient_checkpointing=recipe.gradient_checkpointing,
        deepspeed=deepspeed_config(Path(__file__).parent, recipe.deepspeed), prediction_loss_only=True,
        ddp_find_unused_parameters=False,
    )
    # After the arguments: with ZeRO-3 the language model's weights are scattered as they are loaded.
    run.seed_all(options.seed)
    bf16_weights = recipe.deepspeed and world.amp is not None  # DeepSpeed keeps the float32 ones itself
    dtype = torch.bfloat16 if bf16_weights else torch.float32
    model = build.model(recipe, processor.image_token_id, dtype)
    if recipe.init:
        build.load_init(model, Path(recipe.init), recipe)
    build.choose_trained(model, recipe)
    params, trained = count(model.parameters()), count(p for p in model.parameters() if p.requires_grad)

    eval_every = (recipe.eval_every or per_epoch) if held_out else 0
    progress = Progress(
        folder, options, world, batch=recipe.batch, steps=steps, per_epoch=per_epoch, eval_every=eval_every
    )
    progress.log.say(
        f"{recipe.method}, {recipe.llm} with {recipe.vision}: {params:,} parameters, {trained:,} of them trained\n"
        f"{len(data):,} training and {len(held_out) if held_out else 0:,} validation samples from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} samples"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, peak learning rate {recipe.lr:.3g}, "
        f"steps {progress.clock.start} to {steps}\nrun folder {folder}"
    )
    batches = train_loader(
        data, processor, recipe, steps, seed=options.seed, rank=world.rank, world=world.size, chunks=chunks,
        workers=options.workers, report=folder / "unreadable.txt",
    )
    watched = None
    if held_out:
        encoded = Encoded(held_out, processor, recipe.max_length, strict=True)
        watched = Subset(encoded, evenly_spread(len(held_out), VALIDATION_SAMPLES))
        for _ in watched:  # what cannot be read is found now, not after an epoch
            pass
    trainer = VLoRATrainer(
        batches, progress, model=model, args=args, data_collator=processor.collate, eval_dataset=watched
    )
    if not trainer.run_steps():
        return folder

    weights, peak = trainer.whole_weights(), run.peak_memory_bytes()
    del trainer, model, batches, args
    unset_hf_deepspeed_config()  # what is loaded from here on is whole on every process
    gc.collect()
    if world.is_main:
        export(folder, recipe, processor, weights, dtype)
    del weights
    world.wait()
    samples, scores = [], {}
    if held_out:  # what others will load is what is evaluated
        scores, samples = evaluate(*load(folder, world.device), held_out, recipe, world, data, options.workers)
    if world.is_main:
        scores["training loss"] = [row["loss"] for row in run.read_log(folder) if "loss" in row][-1], "nats"
        run.finish(
            folder, "vlora", name, options, data=describe(recipe, options.data, len(data), len(samples)),
            metrics=[run.metric(key, value, unit) for key, (value, unit) in scores.items()], params=params,
            flops=multiply_adds(recipe), wall_s=progress.clock.wall_s, throughput=progress.clock.rate,
            peak_mem_bytes=peak, then={
                "answers": lambda: figures.write_answers(folder, samples),
                "pictures": lambda: figures.draw(folder, held_out, samples),
            },
        )
    return folder


def export(
    folder: Path, recipe: Recipe, processor: VLoRAProcessor, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """``model/`` for from_pretrained, LoRA merged, and ``connection.safetensors`` for a second stage."""
    whole = replace(recipe, llm_dtype="bfloat16") if recipe.llm_dtype == "nf4" else recipe
    model = build.model(whole, processor.image_token_id, dtype)  # ZeRO-3 has scattered the trained one
    build.choose_trained(model, recipe)
    if whole is not recipe:  # the language model is as it was, and not in 4 bits
        weights = {k: t for k, t in weights.items() if not k.startswith("language_model.")}
    model.load_state_dict(weights, strict=whole is recipe)
    if recipe.tune == "lora":
        model.language_model = model.language_model.merge_and_unload()
    run.save_weights(folder / "connection.safetensors", build.connection(model, recipe).state_dict())
    model_folder.save(folder / "model", model, processor)


def multiply_adds(recipe: Recipe) -> int:
    """Of one forward pass for a sample: an image and `build.TEXT_TOKENS` of text."""
    model, inputs = build.on_meta(recipe)
    return run.multiply_adds(model, *inputs)


if __name__ == "__main__":
    run.through_the_door(__package__)
