"""The decoders' benchmark times the same clips for each, and none that gives other frames."""

import json

import numpy as np
import pytest

from common.data import bench_video
from common.data.video import write_video
from common.run import UserError


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "squares"
    home.mkdir()
    for i in range(2):
        frames = np.zeros((40, 48, 64, 3), np.uint8)
        for t, frame in enumerate(frames):
            frame[8 + i : 24, t : t + 16] = 255
        write_video(home / f"{i}.mp4", frames, fps=25)
    return home


def test_the_record(folder, tmp_path, monkeypatch):
    readers = {name: bench_video.DECODERS[name] for name in ("PyAV (ours)", "OpenCV")}

    def late(path, choose):
        return readers["PyAV (ours)"](path, lambda total: (choose(total) + 3).clip(0, total - 1))

    def absent(path, choose):
        raise ImportError("no such decoder")

    asked = {name: [] for name in readers}
    monkeypatch.setattr(bench_video, "DECODERS", {
        name: lambda path, choose, name=name: readers[name](path, lambda total: asked[name].append(choose(total)) or
                                                            asked[name][-1])
        for name in readers
    } | {"absent": absent})
    bench_video.main([folder], tmp_path, turns=2)
    (path,) = tmp_path.glob("video_decoding_*.json")
    (record,) = json.loads(path.read_text())["records"]
    assert record["clips"] == 2 and record["case"] == "squares: h264 64x48"
    assert {name: row["right"] for name, row in record["decoders"].items()} == dict.fromkeys(readers, 2)
    timed = [np.concatenate(clips[-3 * 2 :]) for clips in asked.values()]
    assert np.array_equal(*timed), "a warm-up and two turns of two files, the same clips for both"
    assert "absent is not here: no such decoder" in path.with_suffix(".md").read_text()
    monkeypatch.setattr(bench_video, "DECODERS", readers | {"late": late})
    assert bench_video.wrong("OpenCV", readers["OpenCV"], folder / "0.mp4") == ""
    assert "is off by" in bench_video.wrong("late", late, folder / "0.mp4")
    with pytest.raises(UserError, match="no file that all decoders read rightly: late: 0"):
        bench_video.measure("squares", [folder / "0.mp4"], 2)
