"""MM-GEM. Importing this package registers its model, config and processor with transformers' Auto classes."""

from .configuration import MMGEMConfig
from .model import MMGEMModel
from .pooling import PoolAggregator
from .processing import MMGEMProcessor

__all__ = ["MMGEMConfig", "MMGEMModel", "MMGEMProcessor", "PoolAggregator"]
