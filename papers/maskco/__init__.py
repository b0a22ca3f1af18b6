"""MaskCo: a network that learned without labels, by predicting the features of masked regions."""

from .export import load_backbone
from .model import MaskCo, MoCoV2

__all__ = ["MaskCo", "MoCoV2", "load_backbone"]
