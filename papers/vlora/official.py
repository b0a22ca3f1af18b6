"""The authors' checkpoints -> this model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig
from transformers import initialization as init
from transformers.modeling_utils import local_torch_dtype

from common import run
from common.run import UserError, model_folder
from papers.vlora.configuration import VLoRAConfig
from papers.vlora.model import VLoRAForConditionalGeneration
from papers.vlora.processing import TEMPLATES, VLoRAProcessor

# The released 7B model (feipengma/VLoRA-7b-v1): Vicuna-7B-v1.5 and CLIP ViT-L/14 at 336 px.
VICUNA_7B = {"vocab": 32000, "hidden": 4096, "inter": 11008, "layers": 32, "heads": 32, "rms_eps": 1e-5}
CLIP_L_336 = {"hidden": 1024, "inter": 4096, "layers": 24, "heads": 16, "image": 336, "patch": 14, "select_layer": -2}
GENERATOR_7B = {"dim": 512, "blocks": 8, "rank": 64, "alpha": 64, "types": "qkvom", "separate": True, "every": 4,
                "heads": 16, "mlp_ratio": 4}
VARIANTS = {"vlora_7b": {"llm": VICUNA_7B, "generator": GENERATOR_7B, "vision": CLIP_L_336}}

GENERATOR = "model.mm_projector."
# Names outside the generator, theirs -> ours.
OUTSIDE = [
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"),
]
# Names inside a sub-generator: theirs -> ours, rows of theirs that are ours (thirds: query, key, value).
INSIDE = [
    (r"^decoders\.(\d+)\.self_attn\.in_proj_(weight|bias)$", [(r"blocks.\1.self_qkv.\2", slice(0, 3))]),
    (r"^decoders\.(\d+)\.multihead_attn\.in_proj_(weight|bias)$",
     [(r"blocks.\1.cross_q.\2", slice(0, 1)), (r"blocks.\1.cross_kv.\2", slice(1, 3))]),
    (r"^decoders\.(\d+)\.self_attn\.out_proj\.", [(r"blocks.\1.self_out.", None)]),
    (r"^decoders\.(\d+)\.multihead_attn\.out_proj\.", [(r"blocks.\1.cross_out.", None)]),
    (r"^decoders\.", [("blocks.", None)]),
]
# Buffers that older transformers stored and newer compute.
IGNORED = r"rotary_emb\.inv_freq$|embeddings\.position_ids$"


def config(llm: Mapping[str, Any], generator: Mapping[str, Any], vision: Mapping[str, Any]) -> VLoRAConfig:
    """Our config from the authors' hyper-parameters, under the names the fixtures use."""
    text = LlamaConfig(
        vocab_size=llm["vocab"], hidden_size=llm["hidden"], intermediate_size=llm["inter"],
        num_hidden_layers=llm["layers"], num_attention_heads=llm["heads"], rms_norm_eps=llm["rms_eps"],
        pad_token_id=0, tie_word_embeddings=False,  # so token 0, the placeholder's stand-in too, has no gradient
    )
    tower = CLIPVisionConfig(
        hidden_size=vision["hidden"], intermediate_size=vision["inter"], num_hidden_layers=vision["layers"],
        num_attention_heads=vision["heads"], image_size=vision["image"], patch_size=vision["patch"],
    )
    return VLoRAConfig(
        text_config=text, vision_config=tower, visual_layer=vision["select_layer"], visual_width=vision["hidden"],
        num_features=(vision["image"] // vision["patch"]) ** 2, width=generator["dim"], blocks=generator["blocks"],
        heads=generator["heads"], mlp_ratio=generator["mlp_ratio"], rank=generator["rank"], alpha=generator["alpha"],
        weight_types=generator["types"], separate=generator["separate"], every=generator["every"],
    )


def places(name: str, types: str) -> list[tuple[str, int | None, slice | None]]:
    """Where a tensor of the authors' goes: (our name, sub-generator or None, thirds of its rows or None).

    Their learned factor is one tensor for all types; it goes to as many places, each with its index.
    """
    if not name.startswith(GENERATOR):
        for pattern, ours in OUTSIDE:
            new, found = re.subn(pattern, ours, name)
            if found:
                return [(new, None, None)]
        return [(name, None, None)]
    inner = name.removeprefix(GENERATOR)
    if inner == "Bs":
        return [(f"generator.B_{letter}", t, None) for t, letter in enumerate(types)]
    member = re.match(r"gen\.(?:(\d+)\.)?(.*)", inner)
    if not member:
        return [(f"generator.{inner}", None, None)]
    group, rest = int(member[1] or 0), member[2]
    for pattern, goals in INSIDE:
        if re.search(pattern, rest):
            return [(f"generator.{re.sub(pattern, ours, rest)}", group, rows) for ours, rows in goals]
    return [(f"generator.{rest}", group, None)]


def convert(state_dict: Mapping[str, torch.Tensor], model: VLoRAForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The authors' tensors under our names: sub-generators stacked, the learned factor divided by type."""
    target = model.state_dict()
    types, sites = model.config.weight_types, len(model.config.sites)
    weights: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        if re.search(IGNORED, name):
            continue
        for ours, group, rows in places(name, types):
            part = tensor
            if group is None:
                weights[ours] = part
                continue
            if name == f"{GENERATOR}Bs":  # (1, T S, d r), types before sites; each row is a d x r matrix
                part = tensor[0, group * sites : (group + 1) * sites]
                weights[ours] = part.unflatten(1, (-1, model.config.rank))
                continue
            if rows is not None:
                third = len(tensor) // 3
                part = tensor[rows.start * third : rows.stop * third]
            parts.setdefault(ours, {})[group] = part
    for ours, members in parts.items():
        stacked = torch.stack([members[g] for g in sorted(members)]) if _alike(members.values()) else members[0]
        fits = ours in target and stacked.numel() == target[ours].numel()
        weights[ours] = stacked.view_as(target[ours]) if fits else stacked
    return weights


def _alike(tensors) -> bool:
    return len({tuple(t.shape) for t in tensors}) == 1


def load_official(
    variant: str, state_dict: Mapping[str, torch.Tensor], **overrides: Any
) -> VLoRAForConditionalGeneration:
    """The authors' network with these weights, in their type, in eval mode.

    `variant` is "vlora_7b", or any name if `overrides` give all of ``llm``, ``generator`` and ``vision`` (the authors'
    hyper-parameters: see `VARIANTS`). Unexpected, missing or misshaped tensors are one error that lists them all.
    """
    parts = VARIANTS.get(variant, {}) | overrides
    if missing := {"llm", "generator", "vision"} - set(parts):
        raise UserError(f"no variant {variant!r} (there is {', '.join(VARIANTS)}), and no {', '.join(sorted(missing))}")
    with init.no_init_weights(), local_torch_dtype(next(iter(state_dict.values())).dtype):
        model = VLoRAForConditionalGeneration(config(**parts))
    model.load_state_dict(convert(state_dict, model), strict=True)
    return model.eval()


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of the authors' release: its tokenizer and its *.safetensors, or *.bin read without unpickling code."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write for from_pretrained."""


def main() -> None:
    """Converts the released checkpoint: ``python -m papers.vlora.official VLoRA-7b-v1 OUT``."""
    args = tyro.cli(Arguments, prog="python -m papers.vlora.official", description=main.__doc__)
    files = sorted(args.checkpoint.glob("*.safetensors")) or sorted(args.checkpoint.glob("*.bin"))
    if not files:
        found = "holds neither *.safetensors nor *.bin" if args.checkpoint.is_dir() else "is no folder"
        raise UserError(f"{args.checkpoint} {found}; expected what huggingface.co/feipengma/VLoRA-7b-v1 has")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= run.load_weights(file)
    model = load_official("vlora_7b", weights)
    side = CLIP_L_336["image"]
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = model_folder.load(AutoTokenizer, args.checkpoint)
    processor = VLoRAProcessor(images, tokenizer, chat_template=TEMPLATES["vicuna_v1"])
    model.config.image_token_id = processor.image_token_id
    model_folder.save(args.out, model, processor)
    print(f"{len(weights):,} tensors converted; {args.out} loads with AutoModelForImageTextToText and AutoProcessor")


if __name__ == "__main__":
    run.main(main)
