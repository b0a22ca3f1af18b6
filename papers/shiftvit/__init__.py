"""ShiftViT. Importing this package registers its models with timm: ``timm.create_model("shiftvit_r2_tiny")``."""

from .model import VARIANTS, ShiftViT
from .official import load_official, to_official

__all__ = ["VARIANTS", "ShiftViT", "load_official", "to_official"]
