"""DualTFR. Importing this package registers its branch with timm: ``timm.create_model("dualtfr")``."""

from .model import VARIANTS, DualTFR, DualTFRBackbone, create_tracker
from .tracker import DualTFRTracker

__all__ = ["VARIANTS", "DualTFR", "DualTFRBackbone", "DualTFRTracker", "create_tracker"]
