"""From a recipe to its processor and its model, and which of its weights are trained."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlamaConfig, PreTrainedConfig, TimmWrapperConfig

from common import run
from common.data import pretrained
from common.data.tiny.scenes import word_tokenizer
from common.run import UserError, model_folder
from papers.vlora import official
from papers.vlora.baseline import VisualTokensForConditionalGeneration
from papers.vlora.configuration import VisualTokensConfig, VLoRAConfig
from papers.vlora.model import VLoRAForConditionalGeneration
from papers.vlora.processing import TEMPLATES, VLoRAProcessor
from papers.vlora.recipes import Recipe
from papers.vlora.vision_language import VisionLanguageModel

METHODS = {
    "vlora": (VLoRAConfig, VLoRAForConditionalGeneration),
    "tokens": (VisualTokensConfig, VisualTokensForConditionalGeneration),
}
INSTALLED = {"smollm2": pretrained.smollm2, "efficientnet-lite0": pretrained.efficientnet_lite0}
# What is between vision tower and LLM, and so what a pre-training leaves behind.
CONNECTION = {"vlora": "generator", "tokens": "projector"}
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TINY_SIDE_PX = 32
TEXT_TOKENS = 32  # of the sample that costs are counted with
_VICUNA = official.config(**official.VARIANTS["vlora_7b"])
# Known without looking anything up, so that a training can be planned offline.
CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=100_000.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "lmsys/vicuna-7b-v1.5": _VICUNA.text_config,
}
TOWERS: dict[str, PreTrainedConfig] = {
    "tiny": CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=TINY_SIDE_PX,
        patch_size=4,
    ),
    "efficientnet-lite0": TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False),
    "openai/clip-vit-large-patch14-336": _VICUNA.vision_config,
}


def folder(name: str) -> str:
    """What from_pretrained takes for a recipe's name of a part."""
    return str(INSTALLED[name]()) if name in INSTALLED else name


def processor(recipe: Recipe) -> VLoRAProcessor:
    """The recipe's image processor and tokenizer, with the chat template of its stage."""
    if recipe.vision == "tiny":
        side = TINY_SIDE_PX
        crop = {"height": side, "width": side}
        images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
    else:
        images = _load(transformers.AutoImageProcessor, recipe.vision, "--vision")
    tokenizer = word_tokenizer() if recipe.llm == "tiny" else _load(AutoTokenizer, recipe.llm, "--llm")
    template = TEMPLATES[recipe.template]
    return VLoRAProcessor(images, tokenizer, chat_template=template, pad_to_square=recipe.pad_to_square)


def config(recipe: Recipe, text: PreTrainedConfig, vision: PreTrainedConfig, image_token_id: int) -> Any:
    """The config of the recipe's model around these parts."""
    fields = {"image_token_id": image_token_id, "standardize": recipe.standardize}
    if vision.model_type == "timm_wrapper":  # a convolutional network: its last map
        fields |= {"visual_layer": None, "class_token": False, **_map_shape(vision)}
    else:
        fields |= {"num_features": (vision.image_size // vision.patch_size) ** 2, "visual_width": vision.hidden_size}
    if recipe.method == "vlora":
        names = ("width", "blocks", "rank", "alpha", "weight_types", "separate", "every")
        fields |= {name: getattr(recipe, name) for name in names}
    kind, _ = METHODS[recipe.method]
    return kind(text_config=text, vision_config=vision, **fields)


def _map_shape(vision: PreTrainedConfig) -> dict[str, int]:
    with torch.device("meta"):
        network = timm.create_model(vision.architecture, num_classes=0)
        features = network.forward_features(torch.empty(1, *network.default_cfg["input_size"]))
    return {"num_features": features[0, 0].numel(), "visual_width": features.shape[1]}


def blueprint(recipe: Recipe, image_token_id: int = 3) -> Any:
    """The config of the recipe's model without its weights."""
    text = CONFIGS.get(recipe.llm) or _load(AutoConfig, recipe.llm, "--llm")
    vision = TOWERS.get(recipe.vision) or _load(AutoConfig, recipe.vision, "--vision")
    return config(recipe, text, getattr(vision, "vision_config", vision), image_token_id)


def _load(kind: Any, name: str, option: str, **kwargs: Any) -> Any:
    return model_folder.load(kind, folder(name), f"; give a local folder with {option}", **kwargs)


def load_vision_tower(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A pretrained vision tower; of a model that also has a text half, such as CLIP, its vision half."""
    whole = model_folder.checked(_load(AutoConfig, name, "--vision"))
    if not hasattr(whole, "vision_config"):
        return _load(transformers.AutoModel, name, "--vision", dtype=dtype)
    kind = transformers.MODEL_MAPPING[type(whole.vision_config)]
    return _load(kind, name, "--vision", config=whole.vision_config, dtype=dtype)


def model(recipe: Recipe, image_token_id: int, dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    """The recipe's model at the start of its training: pretrained parts, or random ones where they are "tiny"."""
    _, kind = METHODS[recipe.method]
    parts = {}
    if recipe.llm != "tiny":
        parts["language_model"] = _load(transformers.AutoModelForCausalLM, recipe.llm, "--llm", **_llm(recipe, dtype))
    if recipe.vision != "tiny":
        parts["vision_tower"] = load_vision_tower(recipe.vision, dtype)
    text = parts["language_model"].config if "language_model" in parts else CONFIGS["tiny"]
    vision = parts["vision_tower"].config if "vision_tower" in parts else TOWERS["tiny"]
    return kind(config(recipe, text, vision, image_token_id), **parts)


def _llm(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """How the language model is loaded in a training whose own weights are of this type."""
    if recipe.tune != "frozen" or dtype != torch.float32:
        return {"dtype": dtype}
    if recipe.llm_dtype != "nf4":
        return {"dtype": getattr(torch, recipe.llm_dtype)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("an LLM in 4 bits needs bitsandbytes: pip install bitsandbytes; or --llm-dtype bfloat16")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"dtype": torch.bfloat16, "quantization_config": four_bits}


def connection(model: VisionLanguageModel, recipe: Recipe) -> torch.nn.Module:
    """VLoRA's generator, or the baseline's projector."""
    return getattr(model, CONNECTION[recipe.method])


def load_init(model: VisionLanguageModel, path: Path, recipe: Recipe) -> None:
    """The pre-trained generator (or projector) from a run folder or file; all of it, and nothing else."""
    weights = run.load_weights(path / "connection.safetensors" if path.is_dir() else path)
    run.fit(connection(model, recipe), weights, f"{path} does not fit this recipe's model")


def choose_trained(model: VisionLanguageModel, recipe: Recipe) -> None:
    """The connection is trained always, the vision tower never, the LLM as the recipe says."""
    model.language_model.requires_grad_(recipe.tune == "full")
    if recipe.tune == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=LORA_LAYERS)
        model.language_model = get_peft_model(model.language_model, lora)


def on_meta(recipe: Recipe) -> tuple[VisionLanguageModel, tuple[torch.Tensor, ...]]:
    """The recipe's model and a sample of an image and `TEXT_TOKENS` of text, without memory: to count with.

    Attention is the eager one, since SDPA's masks look at values, which a meta tensor has not.
    """
    _, kind = METHODS[recipe.method]
    with torch.device("meta"):
        config = copy.deepcopy(blueprint(recipe))
        config.text_config._attn_implementation = "eager"
        model = kind(config)
        choose_trained(model, recipe)
        side = getattr(model.config.vision_config, "image_size", 224)
        return model, (torch.zeros(1, TEXT_TOKENS, dtype=torch.long), torch.empty(1, 3, side, side))
