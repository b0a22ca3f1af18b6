"""Tracking sequences from the folders people have on disk, and COCO's objects.

    sequence     a sequence, its frames            files        tables, flags, lists, numbered frames
    layouts      whose layout a folder has, and how its sequences are opened      benchmarks   further benchmarks
    opening      all sequences of a folder         look         ``python -m common.data.tracking FOLDER``
"""

from common.data.tracking.benchmarks import LISTS, is_whole
from common.data.tracking.files import box_around
from common.data.tracking.layouts import EXPECTED, OTB_RANGES, otb_part
from common.data.tracking.look import main
from common.data.tracking.opening import folders, open_coco, open_sequences, split_in
from common.data.tracking.sequence import MAX_SIDE_PX, Frames, Sequence, read_frame
