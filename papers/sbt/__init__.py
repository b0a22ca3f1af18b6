"""SBT. Importing this package registers its backbones with timm: ``timm.create_model("sbt_base")``."""

from .model import SBT, VARIANTS, SBTBackbone, create_tracker
from .official import load_official
from .tracker import SBTTracker

__all__ = ["SBT", "VARIANTS", "SBTBackbone", "SBTTracker", "create_tracker", "load_official"]
