"""Trains VLoRA or the token baseline: ``python -m papers.vlora.train tiny``.

The loop is transformers' Trainer, with DeepSpeed where a recipe asks for it; the same line works under torchrun and
deepspeed. The loss is the language model's own: cross-entropy of the learned tokens, averaged over the global batch. A
run leaves its folder under runs/vlora/ (see common/run.py).
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Subset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import run
from common.data.loader import steps_per_epoch
from common.run.hf import Progress, Trainer, arguments, deepspeed_config
from papers.vlora import figures, parts
from papers.vlora.data import Encoded, data_folder, open_if_there, open_talks, train_loader
from papers.vlora.evaluate import evaluate, load
from papers.vlora.recipes import RECIPES, Recipe
from papers.vlora.vision_language import VisionLanguageModel

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.vlora.train")
    world = run.start_world(options)
    folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = data_folder(recipe, options.data)
    held_out = open_if_there(root, "val", recipe)
    chunks = run.accumulation(recipe.batch, world, options.micro_batch)

    run.seed_all(options.seed)
    processor = parts.processor(recipe)
    folder = run.open_run("vlora", name, recipe, options, world)
    talks = open_talks(root, "train", recipe, report=folder / "unreadable.txt" if world.is_main else None)
    per_epoch = steps_per_epoch(len(talks), recipe.batch)
    steps = recipe.steps or recipe.epochs * per_epoch
    schedule = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    args = arguments(
        folder, options, world, batch=recipe.batch, steps=steps, chunks=chunks, per_device_eval_batch_size=16,
        optim="adamw_torch", learning_rate=recipe.lr, weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip_norm,
        lr_scheduler_type=schedule, warmup_steps=round(recipe.warmup * steps),
        gradient_checkpointing=recipe.gradient_checkpointing,
        deepspeed=deepspeed_config(Path(__file__).parent, recipe.deepspeed), prediction_loss_only=True,
        ddp_find_unused_parameters=False,
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

    progress = Progress(
        folder, options, world, batch=recipe.batch, steps=steps, per_epoch=per_epoch,
        eval_every=recipe.eval_every if held_out else 0,
    )
    progress.log.say(
        f"{recipe.method}, {recipe.llm} with {recipe.vision}: {params:,} parameters, {trained:,} of them trained\n"
        f"{len(talks):,} training and {len(held_out) if held_out else 0:,} validation samples from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {recipe.batch // world.size} samples"
        f"{f' in {chunks} chunks' if chunks > 1 else ''}, peak learning rate {recipe.lr:.3g}, "
        f"steps {progress.start} to {steps}\nrun folder {folder}"
    )
    batches = train_loader(
        talks, processor, recipe, steps, seed=options.seed, rank=world.rank, world=world.size, chunks=chunks,
        workers=options.workers, report=folder / "unreadable.txt",
    )
    trainer = Trainer(
        batches, progress, model=model, args=args, data_collator=processor.collate,
        eval_dataset=_some(Encoded(held_out, processor, recipe.max_length, strict=True), 256) if held_out else None,
    )
    if not trainer.run_steps():
        return folder

    weights = trainer.whole_weights()
    if world.is_main:
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
    if world.is_main:
        scores["training loss"] = [row["loss"] for row in run.read_log(folder) if "loss" in row][-1], "nats"
        run.write_json(folder / "answers.json", samples)
        figures.draw(folder, held_out, samples)
        own_scenes = recipe.dataset == "scenes" and root == options.data
        dataset = root.name if own_scenes else recipe.dataset
        run.write_results(folder, {
            "paper": "vlora", "recipe": name,
            "data": f"{dataset}: {len(talks):,} training, {len(samples):,} validation samples",
            "metrics": [run.metric(key, value, unit) for key, (value, unit) in scores.items()],
            "params": params, "flops": multiply_adds(recipe), "wall_s": wall_s, "peak_mem_bytes": peak,
            "throughput": throughput, "seed": options.seed,
        })
    return folder


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
    from papers.vlora.cases import training_cost

    work = training_cost(recipe)
    return run.multiply_adds(work.model, *work.inputs)


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _some(data: Encoded, most: int) -> Subset:
    count = min(most, len(data))
    return Subset(data, [len(data) * i // count for i in range(count)])


if __name__ == "__main__":
    run.main(main)
