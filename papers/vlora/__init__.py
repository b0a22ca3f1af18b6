"""VLoRA. Importing this package registers its models, configs and processor with transformers' Auto classes."""

from .baseline import VisualTokensForConditionalGeneration
from .configuration import VisualTokensConfig, VLoRAConfig
from .model import VLoRAForConditionalGeneration
from .processing import VLoRAProcessor

__all__ = [
    "VLoRAConfig", "VLoRAForConditionalGeneration", "VLoRAProcessor", "VisualTokensConfig",
    "VisualTokensForConditionalGeneration",
]
