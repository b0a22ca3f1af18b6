"""Videos from the layouts people have on disk: which there are (lists.py), and their frames (files.py, frames.py).

``python -m common.data.video check FOLDER`` looks through a folder of them (check.py).
"""

from common.data.video.files import SLACK, SUFFIXES, VideoFile, open_video, write_video
from common.data.video.frames import FrameFolder
from common.data.video.lists import Clips, Videos, open_videos

__all__ = [
    "SLACK", "SUFFIXES", "Clips", "FrameFolder", "VideoFile", "Videos", "open_video", "open_videos", "write_video",
]
