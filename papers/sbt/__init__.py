"""SBT. Importing this package registers its backbones with timm: ``timm.create_model("sbt_base")``."""

from .model import SBT, VARIANTS, SBTBackbone, tracker
from .official import load_official

__all__ = ["SBT", "VARIANTS", "SBTBackbone", "load_official", "tracker"]
