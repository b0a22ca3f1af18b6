"""Retina-MAML and FCOS-MAML; `MAML` takes any other detector as well (any_detector.py)."""

from .evaluate import build
from .maml import MAML, multi_step_weights
from .model import Crops, Detector
from .tracker import MAMLTracker

__all__ = ["MAML", "Crops", "Detector", "MAMLTracker", "build", "multi_step_weights"]
