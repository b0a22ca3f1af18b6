"""SPACH. Importing this package registers its models: ``timm.create_model("spach_ms_s_patch4_224_hybrid")``."""

from .model import SPACH, VARIANTS
from .official import load_official, to_official

__all__ = ["SPACH", "VARIANTS", "load_official", "to_official"]
