"""CtP: a video network that learned to track patches, and the classifier that reuses it."""

from .model import Backbone, CtP, Recognizer
from .official import load_official

__all__ = ["Backbone", "CtP", "Recognizer", "load_official"]
