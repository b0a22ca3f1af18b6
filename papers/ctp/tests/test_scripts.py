"""Preparing data: what is encoded once more keeps its frames, labels and classes, and is quicker to start from."""

import json

import av
import numpy as np
import pytest

from common.data import video
from common.data.tiny.clips import clips
from common.run import UserError
from papers.ctp.scripts import reencode_videos, shrink_videos


@pytest.fixture
def data(tmp_path):
    """Two classes; frame i of 70 is grey level 3 i + 20; one video cannot be read, one is listed twice."""
    frames = [np.full((90, 120, 3), 20 + 3 * i, np.uint8) for i in range(70)]
    for name in ("a.mp4", "b.avi", "c.mp4"):
        video.write_video(tmp_path / name, frames, fps=24)
    (tmp_path / "d.mp4").write_bytes(b"x" * 99)
    (tmp_path / "classes.txt").write_text("zero\none\n")
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.avi 1\nd.mp4 1\nb.avi 1\n")
    (tmp_path / "val.txt").write_text("c.mp4 1\n")
    return tmp_path


def test_videos_are_encoded_once_more(data, tmp_path, capsys):
    out = tmp_path / "out"
    reencode_videos.main(data, out, short_side_px=48, key_every=16)
    train = video.open_videos(out, "train")
    assert train.labels.tolist() == [0, 1, 1] and train.classes == ["zero", "one"]
    assert [path.name for path in train.paths] == ["a.mp4", "b.mp4", "b.mp4"]
    for path in {*train.paths, *video.open_videos(out, "val").paths}:
        with video.open_video(path) as opened:
            assert len(opened) == 70 and opened.rate == 24
            seen = opened.read(range(70))
            assert seen.shape[1:3] == (48, 64)
            assert np.abs(seen.mean((1, 2, 3)) - 20 - 3 * np.arange(70)).mean() < 1.5, "3 where all are a frame off"
        with av.open(str(path)) as container:
            keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
            assert max(np.diff([*keys, 70])) <= 16
    assert "d.mp4" in (out / "left_out.txt").read_text() and "train: 3 of 4 videos" in capsys.readouterr().out


def test_what_was_stopped_goes_on_and_other_settings_are_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    reencode_videos.main(data, out)
    (out / "videos/val/0001/c.mp4").unlink()
    (out / "videos/val/0001/.c.mp4").write_bytes(b"half a video")
    written = []
    monkeypatch.setattr(
        reencode_videos, "write_video", lambda path, *args, **options: written.append(path) or video.write_video(
            path, *args, **options
        ),
    )
    reencode_videos.main(data, out)
    assert [path.name for path in written] == [".c.mp4"] and len(video.open_videos(out, "val")) == 1
    assert json.loads((out / "settings.json").read_text()) == {"short_side_px": 0, "key_every": 32, "crf": 18}
    with pytest.raises(UserError, match="was made with"):
        reencode_videos.main(data, out, short_side_px=48)


def test_videos_are_shrunk(tmp_path):
    sources = video.open_videos(clips(), "val").paths[:4]
    shrink_videos.main(tmp_path / "small", tuple(sources))
    train_videos, val = (video.open_videos(tmp_path / "small", split) for split in ("train", "val"))
    assert len(set(train_videos.paths)) == 3 and len(set(val.paths)) == 1 and len(val) == 16
    with video.open_video(val.paths[0]) as small, video.open_video(sources[3]) as source:
        assert len(small) == len(source) and small.read([0]).shape == (1, 48, 58, 3)
    with pytest.raises(UserError, match="3 sources, and every fourth is held out"):
        shrink_videos.main(tmp_path / "few", tuple(sources[:3]))
    assert not (tmp_path / "few").exists()
    shrink_videos.main(tmp_path / "named", tuple(sources[:1]), val=tuple(sources[1:3]), times=1)
    assert [len(video.open_videos(tmp_path / "named", split)) for split in ("train", "val")] == [1, 2]
