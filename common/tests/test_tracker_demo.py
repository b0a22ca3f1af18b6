"""A demo's camera and its several targets."""

import numpy as np
import pytest

from common.metrics.trackers import baselines, demo
from common.run import UserError


class Camera:
    """cv2.VideoCapture, of a picture that never changes."""

    def __init__(self, number):
        self.number, self.left = number, 7

    def isOpened(self):
        return self.number == 0

    def get(self, _property):
        return 12.0

    def read(self):
        self.left -= 1
        blue = np.zeros((60, 80, 3), np.uint8)
        blue[..., 0] = 200  # OpenCV's order is blue, green, red
        return self.left >= 0, blue

    def release(self):
        pass


def test_a_demo_follows_several_targets_of_a_camera(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    monkeypatch.setattr(demo.cv2, "VideoCapture", Camera)
    seen = []

    class Runner(baselines.StaticBox):
        """Each target walks on by its own height."""

        def track(self, frame):
            seen.append(frame[0, 0].tolist())
            x, y, w, h = self.box
            self.box = x + h, y, w, h
            return self.box, 1.0

    first, second = (2, 10, 20, 2), (2, 30, 20, 6)
    assert demo.annotate(Runner(), 0, first, tmp_path / "a.mp4", more=[second]) == 7
    assert seen == [[0, 0, 200]] * 12  # RGB
    with av.open(str(tmp_path / "a.mp4")) as video:
        last = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)][-1]
    red, blue = last[8:14, :40], last[34:38]
    assert (red[..., 0] - red[..., 2]).max() > 60 and (blue[..., 1] - blue[..., 0]).max() > 60
    assert demo.annotate(Runner(), 0, first, tmp_path / "b.mp4", limit=3) == 3
    with pytest.raises(UserError, match="there is no camera 3 here"):
        demo.annotate(Runner(), 3, first, tmp_path / "c.mp4")
    assert not (tmp_path / "c.mp4").exists()
