"""Image classification, measured: accuracy exact over any number of processes, of a model, a run or a file of weights.

A paper's ``evaluate.py`` describes itself by a `Paper` and hands it to `main`, its ``demo.py`` to `demo`. A recipe here
is any object with the fields ``model, dataset, input_size_px, eval_crop, paper_top1, paper_source``.
"""

from common.metrics.classification.accuracy import Accuracy, accuracy, data_folder, describe, metrics
from common.metrics.classification.demo import demo
from common.metrics.classification.paper import Paper, main, of_classes
from common.metrics.classification.probe import probe
