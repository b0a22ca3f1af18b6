"""From a recipe to its processor and its model, and which of its weights are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlamaConfig, PreTrainedConfig, TimmWrapperConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from common.data import pretrained
from common.data.tiny.scenes import word_tokenizer
from common.run import UserError, model_folder
from common.run.hf import shape
from papers.mm_gem.configuration import MMGEMConfig
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.processing import MMGEMProcessor
from papers.mm_gem.recipes import Recipe

INSTALLED = {"smollm2": pretrained.smollm2, "efficientnet-lite0": pretrained.efficientnet_lite0}
TINY_SIDE_PX = 64
_LLAMA = {"num_key_value_heads": 4, "intermediate_size": 5632, "hidden_size": 2048, "num_hidden_layers": 22}
# Known without looking anything up, so that a training can be planned offline.
CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=len(word_tokenizer()), hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.125,  # 0.02 is for wide models
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=100_000.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": LlamaConfig(
        vocab_size=32000, num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-5, **_LLAMA
    ),
}
_VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWERS: dict[str, PreTrainedConfig] = {
    "tiny": CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=TINY_SIDE_PX,
        patch_size=8,
    ),
    "efficientnet-lite0": TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False),
    "openai/clip-vit-large-patch14": CLIPVisionConfig(image_size=224, patch_size=14, **_VIT_L),
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(image_size=336, patch_size=14, **_VIT_L),
}
WIDTHS = {"efficientnet-lite0": 1280}
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TEXT_TOKENS = 32  # of the sample that costs are counted with


def folder(name: str) -> str:
    """What from_pretrained takes for a recipe's name of a part."""
    return str(INSTALLED[name]()) if name in INSTALLED else name


def processor(recipe: Recipe) -> MMGEMProcessor:
    """The recipe's image processor and tokenizer."""
    if recipe.vision == "tiny":
        side = {"height": TINY_SIDE_PX, "width": TINY_SIDE_PX}
        images = transformers.CLIPImageProcessor(size=side, crop_size=side)
    else:
        images = _load(transformers.AutoImageProcessor, recipe.vision, "--vision")
    tokenizer = word_tokenizer() if recipe.llm == "tiny" else _load(AutoTokenizer, recipe.llm, "--llm")
    return MMGEMProcessor(images, tokenizer, max_text_length=recipe.max_text_length)


def config(
    recipe: Recipe, text: PreTrainedConfig, vision: PreTrainedConfig, processor: MMGEMProcessor | None
) -> MMGEMConfig:
    """The config of the recipe's model around these parts; without a processor, with the ids that follow the LLM's."""
    emb, cap, end = text.vocab_size, text.vocab_size + 1, text.eos_token_id
    if processor is not None:
        emb, cap, end = processor.emb_token_id, processor.cap_token_id, processor.tokenizer.eos_token_id
    return MMGEMConfig(
        text_config=text, vision_config=vision, emb_token_id=emb, cap_token_id=cap, end_token_id=end,
        visual_width=WIDTHS.get(recipe.vision) or vision.hidden_size, standardize=recipe.standardize,
        grid=recipe.grid, joint_width=recipe.joint_width, max_text_length=recipe.max_text_length,
        objectives=recipe.objectives, duplicates=recipe.duplicates, cap_position=recipe.cap_position,
    )


def blueprint(recipe: Recipe) -> MMGEMConfig:
    """The config of the recipe's model without weights, the two special tokens counted."""
    text = CONFIGS.get(recipe.llm) or _load(AutoConfig, recipe.llm, "--llm")
    vision = TOWERS.get(recipe.vision) or _load(AutoConfig, recipe.vision, "--vision")
    found = config(recipe, text, getattr(vision, "vision_config", vision), None).to_dict()
    found["text_config"]["vocab_size"] += 2
    return MMGEMConfig(**found)


def model(recipe: Recipe, processor: MMGEMProcessor, dtype: torch.dtype = torch.float32) -> MMGEMModel:
    """The recipe's model at the start of its training: pretrained parts, or random ones where they are "tiny"; or the
    whole model that `recipe.init` names."""
    if recipe.init:
        return continued(recipe, processor, dtype)
    # Random parts by their classes: from_config scatters them for ZeRO-3, and then initializes CLIP's wrongly.
    llm = (
        transformers.LlamaForCausalLM(copy.deepcopy(CONFIGS["tiny"])) if recipe.llm == "tiny"
        else _load(transformers.AutoModelForCausalLM, recipe.llm, "--llm", dtype=dtype)
    )
    vision = (
        transformers.CLIPVisionModel(copy.deepcopy(TOWERS["tiny"])) if recipe.vision == "tiny"
        else load_vision_tower(recipe.vision, dtype)
    )
    add_tokens(llm, len(processor.tokenizer))
    return MMGEMModel(config(recipe, llm.config, vision.config, processor), vision, llm)


def continued(recipe: Recipe, processor: MMGEMProcessor, dtype: torch.dtype) -> MMGEMModel:
    """Stage 1's model, whole, with this recipe's objectives. `UserError` if its shape is not the recipe's, or a tensor
    or a special token differs."""
    path = Path(recipe.init)
    path = path / "model" if (path / "model").is_dir() else path
    if not (path / "config.json").is_file():
        raise UserError(f"--init {path} holds no model: expected config.json and model.safetensors of a finished run")
    model, info = model_folder.load(MMGEMModel, path, dtype=dtype, output_loading_info=True)
    if wrong := {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}:
        raise UserError(f"--init {path} does not fit: {wrong}")
    for name in ("grid", "joint_width", "standardize", "cap_position"):
        if (found := getattr(model.config, name)) != getattr(recipe, name):
            raise UserError(f"--init {path} was made with {name}={found}, not {getattr(recipe, name)}")
    ids = (model.config.emb_token_id, model.config.cap_token_id)
    if ids != (processor.emb_token_id, processor.cap_token_id):
        raise UserError(f"--init {path} was trained with another tokenizer: its [EMB] and [CAP] are {ids}")
    model.config.objectives, model.config.duplicates = recipe.objectives, recipe.duplicates
    return model


def add_tokens(llm: transformers.PreTrainedModel, vocabulary: int) -> None:
    """Room for the special tokens: new rows start as the mean of the old ones [ours]."""
    before = llm.get_input_embeddings().num_embeddings
    if vocabulary <= before:  # some LLMs have spare rows
        return
    llm.resize_token_embeddings(vocabulary, mean_resizing=False)
    tables = [llm.get_input_embeddings().weight, llm.get_output_embeddings().weight]
    with torch.no_grad(), _gathered(tables):
        for table in tables:
            table[before:] = table[:before].float().mean(0).to(table.dtype)


def _gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager:
    """In it they are whole where ZeRO-3 has scattered them; what the first process writes is kept."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def load_vision_tower(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A pretrained vision encoder; of a model that also has a text half, such as CLIP, its vision half."""
    whole = model_folder.checked(_load(AutoConfig, name, "--vision"))
    if not hasattr(whole, "vision_config"):
        return _load(transformers.AutoModel, name, "--vision", dtype=dtype)
    kind = transformers.MODEL_MAPPING[type(whole.vision_config)]
    return _load(kind, name, "--vision", config=whole.vision_config, dtype=dtype)


def choose_trained(model: MMGEMModel, recipe: Recipe) -> None:
    """All of the model, or with tune=lora the projections, the two new token rows and LoRA on the LLM's attention."""
    if recipe.tune == "full":
        return
    from peft import LoraConfig, get_peft_model

    model.vision_tower.requires_grad_(False)
    tokens = {"embed_tokens": [model.config.emb_token_id, model.config.cap_token_id]}
    lora = LoraConfig(
        r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, lora_dropout=0.0, target_modules=LORA_LAYERS,
        trainable_token_indices=tokens,
    )
    model.language_model = get_peft_model(model.language_model, lora)


def shared_parameters(model: MMGEMModel) -> int:
    """How many of the trained parameters both objectives train: those of the two networks, but of LoRA's token rows,
    of which [EMB] serves the one and [CAP] the other."""
    return sum(
        shape(parameter).numel() for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.startswith(("language_model.", "vision_tower."))
        and "trainable_tokens" not in name
    )


def assembled(recipe: Recipe, processor: MMGEMProcessor, weights: Mapping[str, Tensor]) -> MMGEMModel:
    """The recipe's model with what `choose_trained` trains of it from `weights`, LoRA merged. `UserError` if they are
    others."""
    whole = model(replace(recipe, init=None), processor)
    choose_trained(whole, recipe)
    trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    if differ := trained ^ weights.keys():
        parts = f"{recipe.llm} with {recipe.vision}"
        raise UserError(f"these are not the weights that {parts} lacks: {min(differ)} differs")
    whole.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    if recipe.tune == "lora":
        whole.language_model = whole.language_model.merge_and_unload()
    return whole.eval()


class Pass(nn.Module):
    """Both paths of a pair, without the checks and the pooling, which look at values: a meta tensor has none."""

    def __init__(self, model: MMGEMModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        end = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        g = self.model.config.grid
        cells = self.model.feature_map(pixel_values)[:, :, :1, :1].expand(-1, -1, g, g)
        v, t = self.model._image_embedding(cells), self.model._text_embedding(input_ids, end)
        return v, t, self.model._caption_loss(cells, input_ids, end)


def on_meta(recipe: Recipe) -> tuple[Pass, tuple[Tensor, ...]]:
    """The recipe's model and a pair of an image and `TEXT_TOKENS` of text, without memory: to count with. The text
    passes the LLM twice, once with the visual tokens.

    Attention is the eager one, since SDPA's masks look at values.
    """
    with torch.device("meta"):
        model = MMGEMModel._from_config(blueprint(recipe), attn_implementation="eager")
        choose_trained(model, recipe)
        side = getattr(model.config.vision_config, "image_size", 224)
        return Pass(model), (torch.zeros(1, TEXT_TOKENS, dtype=torch.long), torch.empty(1, 3, side, side))


def _load(kind: Any, name: str, option: str, **kwargs: Any) -> Any:
    return model_folder.load(kind, folder(name), f"; give a local folder with {option}", **kwargs)
