"""Trains MM-GEM: ``python -m papers.mm_gem.train tiny``.

The loop is transformers' Trainer, with DeepSpeed where a recipe asks for it; the same line works under torchrun. The
losses stand in model.py and losses.py. There is no gradient accumulation, which would leave every chunk with its own
few negatives: --micro-batch sets how many rows the networks see at a time within one exact contrastive loss. A run
leaves its folder under runs/mm_gem/ (see common/run.py).
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import run
from common.data.loader import steps_per_epoch
from common.run.hf import Progress, Trainer, arguments, deepspeed_config
from papers.mm_gem import figures, parts
from papers.mm_gem.data import Rows, data_folder, open_captions, open_regions, train_loader
from papers.mm_gem.evaluate import evaluate, load
from papers.mm_gem.recipes import RECIPES, Recipe


def main() -> None:
    name, recipe, options = run.parse(RECIPES, "papers.mm_gem.train")
    world = run.start_world(options)
    folder = train(name, recipe, options, world)
    if world.is_main and (folder / "results.json").exists():
        print((folder / "report.md").read_text())


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
        """Keeps boxes, which hold their images' indices, out of the cast that DeepSpeed's trainings get."""
        rest = super()._prepare_inputs({key: value for key, value in inputs.items() if key != "boxes"})
        return rest | ({"boxes": inputs["boxes"].to(self.args.device)} if "boxes" in inputs else {})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, chunk=self.chunk)
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
            key = rates.get(name.split(".")[0], recipe.lr), len(_shape(parameter)) > 1
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": lr, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (lr, decays), members in groups.items()
    ]


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # of what ZeRO-3 has scattered, and of what is whole


def train(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one run; returns its folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if recipe.tune == "lora" and recipe.deepspeed == "zero3":  # peft's token rows then need a GPU: never run
        raise run.UserError("--tune lora trains with --deepspeed zero2 or '', not zero3")
    root = data_folder(recipe, options.data)
    rows = Rows(open_captions(root, "train"), open_regions(root, "train") if recipe.region_share else [])
    held_out = open_captions(root, "val"), open_regions(root, "val", needed=False)
    per_epoch = steps_per_epoch(len(rows.images), recipe.batch)
    steps = recipe.steps or recipe.epochs * per_epoch
    run.accumulation(recipe.batch, world, 0)  # the batch must be shared out evenly
    if recipe.region_share and (recipe.batch * recipe.region_share) % world.size:
        raise run.UserError(f"{recipe.batch * recipe.region_share:g} regions of a batch for {world.size} processes")

    run.seed_all(options.seed)
    processor = parts.processor(recipe)
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
    model = parts.build(recipe, processor, dtype)
    params = sum(_shape(p).numel() for p in model.parameters())
    parts.choose_trained(model, recipe)
    trained = sum(_shape(p).numel() for p in model.parameters() if p.requires_grad)

    progress = Progress(folder, options, world, batch=recipe.batch, steps=steps, per_epoch=per_epoch)
    share = recipe.batch // world.size
    chunk = options.micro_batch if 0 < options.micro_batch < share else 0
    progress.log.say(
        f"{recipe.llm} with {recipe.vision}: {params:,} parameters, {trained:,} of them trained, {recipe.objectives}\n"
        f"{len(rows.images):,} images and {len(rows.regions):,} regions for training from {root}\n"
        f"global batch {recipe.batch} = {world.size} processes x {share} pairs"
        f"{f', {chunk} at a time' if chunk else ''}, peak learning rate {recipe.lr:.3g}, "
        f"steps {progress.start} to {steps}\nrun folder {folder}"
    )
    batches = train_loader(
        rows, processor, recipe, steps, seed=options.seed, rank=world.rank, world=world.size, workers=options.workers,
        report=folder / "unreadable.txt",
    )
    trainer = GemTrainer(batches, progress, recipe=recipe, chunk=chunk, model=model, args=args)
    if not trainer.run_steps():
        return folder

    wall_s, throughput, peak = progress.wall_s, progress.throughput, run.peak_memory_bytes()
    weights = trainer.whole_weights()
    del trainer, model, batches, args
    unset_hf_deepspeed_config()  # what is loaded from here on is whole
    gc.collect()
    if not world.is_main:
        return folder

    model = parts.build(recipe, processor, dtype)
    parts.choose_trained(model, recipe)
    model.load_state_dict(weights)
    parts.merge(model, recipe)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    del model, weights
    scores, said = evaluate(load(folder, world), *held_out, recipe)
    scores["training loss"] = [row["loss"] for row in run.read_log(folder) if "loss" in row][-1], "nats"
    run.write_json(folder / "said.json", {key: value for key, value in said.items() if key != "similarity"})
    figures.draw(folder, said)
    own_scenes = recipe.dataset == "scenes" and root == options.data
    dataset = root.name if own_scenes else recipe.dataset
    run.write_results(folder, {
        "paper": "mm_gem", "recipe": name,
        "data": f"{dataset}: {len(rows.images):,} training, {len(said['images']):,} validation images",
        "metrics": [run.metric(key, value, unit) for key, (value, unit) in scores.items()],
        "params": params, "flops": multiply_adds(recipe), "wall_s": wall_s, "peak_mem_bytes": peak,
        "throughput": throughput, "seed": options.seed,
    })
    return folder


def multiply_adds(recipe: Recipe) -> int:
    """Of one forward pass for a pair: an image, and a text of `cases.TEXT_TOKENS`."""
    from papers.mm_gem.cases import training_cost

    work = training_cost(recipe)
    return run.multiply_adds(work.model, *work.inputs)


if __name__ == "__main__":
    run.main(main)
