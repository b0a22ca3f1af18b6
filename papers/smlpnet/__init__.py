"""sMLPNet. Importing this package registers its models with timm: ``timm.create_model("smlpnet_tiny")``."""

from .model import VARIANTS, SMLPNet
from .official import load_official, to_official

__all__ = ["VARIANTS", "SMLPNet", "load_official", "to_official"]
