"""Trackers run, resumed and measured: one interface, one loop over sequences, the benchmarks' files.

A paper's ``evaluate.py`` describes itself by a `Paper` and hands it to `main`, its ``demo.py`` to
`common.metrics.trackers.demo.main`, its ``vot.py`` to `common.metrics.trackers.vot.main`; its ``train.py`` calls
`compare`. A result folder holds::

    <dataset>/<sequence>.csv    x, y, w, h (zero-based), score, seconds, seconds of reading for each frame
    <dataset>.zip               the same as the benchmark wants it handed in
    <protocol>.json, .png       scores of every sequence, and curves; named after data set and rule, see `Protocol`

    protocol   boxes, trackers, how a data set is scored    geometry    windows, boxes kept inside
    files      result files, archives                       loop        a tracker over sequences, resumed
    score      scores, speeds, rows of results.json         draw        curves, frames with boxes
    baselines  trackers that learn nothing                  paper       what a paper tells; comparison after a training
    cli, demo, vot    command lines
"""

from common.metrics.trackers.baselines import BASELINES, FLOOR, OLD_LABELS
from common.metrics.trackers.cli import main
from common.metrics.trackers.draw import COLORS, draw_tracks, plot
from common.metrics.trackers.files import Result, archive, read_result, results, write_result
from common.metrics.trackers.geometry import hann_window, keep_inside, smoothed
from common.metrics.trackers.loop import evaluate
from common.metrics.trackers.paper import (
    Paper,
    compare,
    data_folder,
    evaluate_and_score,
    settings_of,
    shares,
)
from common.metrics.trackers.protocol import RULES, Box, Protocol, Tracker, dataset_of
from common.metrics.trackers.score import metrics, scorable, score, speed
from common.metrics.trackers.tables import real_table
