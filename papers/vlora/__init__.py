"""VLoRA. Importing this package registers its models, configs and processor with transformers' Auto classes."""

from .baseline import VisualTokensConfig, VisualTokensForConditionalGeneration
from .model import VLoRAConfig, VLoRAForConditionalGeneration
from .processing import VLoRAProcessor

__all__ = [
    "VLoRAConfig", "VLoRAForConditionalGeneration", "VLoRAProcessor", "VisualTokensConfig",
    "VisualTokensForConditionalGeneration",
]
