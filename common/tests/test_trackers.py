"""Running trackers: the loop and its resumption, scores, the benchmarks' files, the baselines."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from common import run
from common.data import tracking as data
from common.metrics import trackers, tracking
from common.metrics.trackers import baselines
from common.metrics.trackers.files import result_path
from common.metrics.trackers.score import sizes_lost
from common.run import UserError, World, drawing
from common.tests.squares import make_sequences

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
SETTINGS = {"tracker": "test"}
GOT10K, OTB = (trackers.Protocol(name, name) for name in ("got10k", "otb"))


class Drift:
    """Moves the first box by 1 px a frame; counts what it is asked."""

    def __init__(self, stop_after=10**9):
        self.inits, self.frames, self.stop_after = 0, 0, stop_after

    def init(self, frame, box):
        self.box, self.inits = np.array(box), self.inits + 1

    def track(self, frame):
        assert frame.dtype == np.uint8 and frame.shape == (60, 80, 3)
        self.frames += 1
        if self.frames > self.stop_after:
            raise KeyboardInterrupt
        self.box = self.box + (1 / 3, 0, 0, 0)
        return self.box, 0.5


def answers(sequences, out):
    return [r.boxes for r in trackers.results(sequences, out)]


# The loop -------------------------------------------------------------------------------------------------


def test_a_result_file_holds_what_the_tracker_said(tmp_path):
    sequences = make_sequences(tmp_path)
    trackers.evaluate(Drift(), sequences, tmp_path / "out", settings=SETTINGS)
    for sequence, result in zip(sequences, trackers.results(sequences, tmp_path / "out")):
        n = len(sequence)
        np.testing.assert_allclose(result.boxes[:, 0], 10 + np.arange(n) / 3, rtol=1e-12)
        np.testing.assert_array_equal(result.boxes[0], sequence.boxes[0])
        assert np.isnan(result.scores[0]) and (result.scores[1:] == 0.5).all()
        assert (result.seconds > 0).all() and (result.read_seconds > 0).all() and result.size == (80, 60)
    assert len(np.genfromtxt(tmp_path / "out" / "got10k" / "s0.csv", delimiter=",")) == 5  # plain to other programs


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    sequences, out = make_sequences(tmp_path), tmp_path / "out"
    trackers.evaluate(Drift(), sequences, tmp_path / "whole", settings=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        trackers.evaluate(Drift(stop_after=11), sequences, out, settings=SETTINGS)  # in the second longest
    assert sorted(p.name for p in out.rglob("*.csv")) == ["s1.csv"]
    second = Drift()
    trackers.evaluate(second, sequences, out, settings=SETTINGS)
    assert (second.inits, second.frames) == (2, 6 + 4)
    for ours, whole in zip(answers(sequences, out), answers(sequences, tmp_path / "whole")):
        np.testing.assert_array_equal(ours, whole)
    trackers.evaluate(third := Drift(), sequences, out, settings=SETTINGS)
    assert third.inits == 0


def test_killed_and_started_again(tmp_path):
    """A real process, killed hard in the middle of a sequence."""
    sequences, out = make_sequences(tmp_path, lengths=(3, 12)), tmp_path / "out"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from common.data import tracking as data
from common.metrics import trackers
from common.metrics.trackers import baselines
import numpy as np
class Slow(baselines.StaticBox):
    def track(self, frame):
        time.sleep(0.05 if len(list(Path({str(out)!r}).rglob("*.csv"))) == 0 else 60)
        return super().track(frame)
sequences = [
    data.Sequence(name, "got10k", [Path({str(tmp_path)!r}) / name / f"{{i}}.png" for i in range(n)],
                  np.tile([10.0, 12, 20, 16], (n, 1)), np.ones(n, bool)) for name, n in (("s0", 3), ("s1", 12))]
trackers.evaluate(Slow(), sequences, Path({str(out)!r}), settings={SETTINGS!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=run.ROOT)
    deadline = time.monotonic() + 60
    while not (out / "got10k" / "s1.csv").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in out.rglob("*.csv")] == ["s1.csv"]
    again = Drift()
    trackers.evaluate(again, sequences, out, settings=SETTINGS)
    assert (again.inits, again.frames) == (1, 2)
    assert [len(boxes) for boxes in answers(sequences, out)] == [3, 12]


def test_a_damaged_or_foreign_result_is_made_anew(tmp_path):
    sequences, out = make_sequences(tmp_path, lengths=(6,)), tmp_path / "out"

    def inits(settings=SETTINGS):
        trackers.evaluate(tracker := Drift(), sequences, out, settings=settings)
        return tracker.inits

    path = out / "got10k" / "s0.csv"
    assert inits() == 1 and inits() == 0
    whole = path.read_bytes()
    for cut in (0, 1, 20, len(whole) // 2, whole.rindex(b"\n#"), len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"no result of s0.*evaluate it again"):
            trackers.results(sequences, out)
        assert inits() == 1, cut
        np.testing.assert_array_equal(trackers.read_result(path).boxes[:, 1:], sequences[0].boxes[:1, 1:].repeat(6, 0))
    path.write_bytes(whole.replace(b"10.0,12.0", b"11.0,12.0", 1))  # another first box
    assert inits() == 1
    path.write_text("[1]\n# end\n")
    assert inits() == 1
    assert inits({"tracker": "another"}) == 1 and inits({"tracker": "another"}) == 0
    assert inits({"sides": (1, 2)}) == 1 and inits({"sides": [1, 2]}) == 0  # as JSON has it
    with pytest.raises(ValueError, match="what the answers depend on"):
        inits({})


def test_what_cannot_be_evaluated(tmp_path):
    sequences, out = make_sequences(tmp_path, lengths=(4, 4)), tmp_path / "out"
    with pytest.raises(UserError, match="no result of s0"):
        trackers.score(sequences, out)
    sequences[1].frames[2].write_bytes(sequences[1].frames[2].read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot evaluate: .*2\.png"):
        trackers.evaluate(Drift(), sequences, out, settings=SETTINGS)
    empty = make_sequences(tmp_path / "e", lengths=(4,))
    empty[0].boxes[0, 2] = 0
    with pytest.raises(UserError, match="starts from the first frame's box"):
        trackers.evaluate(Drift(), empty, out, settings=SETTINGS)
    mixed = [*make_sequences(tmp_path / "a", (2,)), *make_sequences(tmp_path / "b", (2,), "otb")]
    with pytest.raises(UserError, match="not of got10k, otb"):
        trackers.score(mixed, out)


def _process(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sequences = [
        data.Sequence(f"s{k}", "got10k", [folder / f"s{k}" / f"{i}.png" for i in range(n)],
                      np.tile([10.0, 12, 20, 16], (n, 1)), np.ones(n, bool)) for k, n in enumerate((5, 9, 7))]
    tracker = Drift()
    summary, _ = trackers.evaluate_and_score(
        tracker, sequences, folder / "two", protocol=GOT10K, settings=SETTINGS,
        world=World(rank, 2, torch.device("cpu"), None))
    (folder / f"rank{rank}.json").write_text(json.dumps([tracker.frames, summary.scores]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_sequences(tmp_path, free_port):
    sequences = make_sequences(tmp_path)
    mp.spawn(_process, args=(free_port, tmp_path), nprocs=2)
    trackers.evaluate(Drift(), sequences, tmp_path / "one", settings=SETTINGS)
    for two, one in zip(answers(sequences, tmp_path / "two"), answers(sequences, tmp_path / "one")):
        np.testing.assert_array_equal(two, one)
    (frames0, scores0), (frames1, scores1) = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert (frames0, frames1) == (8 + 4, 6) and scores0 == scores1


# Scores and files -----------------------------------------------------------------------------------------


def put(sequences, out, boxes, seconds=0.1, read=0.3, hardware=None):
    """Result files with these boxes."""
    for sequence, its in zip(sequences, boxes):
        n = len(sequence)
        result = trackers.Result(
            np.array(its, float), np.ones(n), np.full(n, seconds), np.full(n, read), (80, 60), {},
            hardware or run.hardware(),
        )
        trackers.write_result(result_path(sequence, out), result)


def test_each_data_set_has_its_rule_and_its_frames(tmp_path):
    (sequence,) = make_sequences(tmp_path, lengths=(5,))
    cover = np.array([8, 8, 0, 8, 8])
    for dataset, rule, more in (
        ("got10k", "got10k", {"cover": cover}), ("otb", "otb", {"offset": 1}), ("lasot", "lasot", {"offset": 1}),
        ("trackingnet", "trackingnet", {}), ("vot", "otb", {}),
    ):
        visible, more = cover > 0, more | ({"absent": cover == 0} if dataset == "lasot" else {})
        one = [data.Sequence("s0", dataset, sequence.frames, sequence.boxes, visible, **more)]
        boxes = sequence.boxes.copy()
        boxes[2] += 500  # lost where the target is hidden; TrackingNet counts IoU 0 at its threshold 0
        put(one, tmp_path, [boxes])
        summary = trackers.score(one, tmp_path)
        assert summary.rule == rule
        whole = {"got10k": 100, "trackingnet": 80.5}.get(dataset, 2000 / 21 * 4 / 5)
        assert summary.scores["ao" if rule == "got10k" else "auc"] == pytest.approx(whole)
    boxes[2] = sequence.boxes[2]  # right, but LaSOT calls the target absent
    lasot = [data.Sequence("s0", "lasot", sequence.frames, sequence.boxes, visible, absent=~visible)]
    put(lasot, tmp_path, [boxes])
    assert trackers.score(lasot, tmp_path, trackers.Protocol("lasot", "otb")).scores["auc"] == pytest.approx(2000 / 21)
    assert trackers.score(lasot, tmp_path).scores["auc"] == pytest.approx(2000 / 21 * 4 / 5)


def test_scores_are_taken_in_the_coordinates_of_the_files(tmp_path):
    """LaSOT's toolkit does not accept a true box at x = 0: in its files, that is, which count from 1."""
    (sequence,) = make_sequences(tmp_path, lengths=(3,))
    boxes = sequence.boxes - (sequence.boxes[0, 0], 0, 0, 0)
    for offset, auc in ((1, 2000 / 21), (0, 2000 / 21 * 2 / 3)):
        one = [data.Sequence("s0", "lasot", sequence.frames, boxes, np.ones(3, bool), offset)]
        put(one, tmp_path, [boxes])
        assert trackers.score(one, tmp_path).scores["auc"] == pytest.approx(auc)


def test_speed_counts_frames_over_all_their_time(tmp_path):
    sequences = make_sequences(tmp_path, lengths=(4, 6))
    put(sequences, tmp_path, [s.boxes for s in sequences], seconds=0.01, read=0.03)
    assert trackers.speed(sequences, tmp_path, run.hardware()) == pytest.approx({"fps": 25, "fps_model": 100})
    put(sequences[:1], tmp_path, [sequences[0].boxes], seconds=9, hardware="another machine")
    kept = trackers.speed(sequences, tmp_path, run.hardware())
    assert kept == pytest.approx({"fps": 25, "fps_model": 100}), "its seconds count"
    assert trackers.speed(sequences[:1], tmp_path, run.hardware()) == {}
    assert trackers.speed(sequences, tmp_path, "another machine")["fps_model"] == pytest.approx(1 / 9)


def test_seconds_are_those_of_the_device_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "hardware", lambda device="auto": {"cpu": "a CPU", "auto": "a GPU"}[device])
    sequences, world = make_sequences(tmp_path, lengths=(3,)), World(0, 1, torch.device("cpu"), None)
    _, speeds = trackers.evaluate_and_score(
        Drift(), sequences, tmp_path / "out", protocol=GOT10K, settings=SETTINGS, world=world
    )
    assert trackers.results(sequences, tmp_path / "out")[0].hardware == "a CPU" and speeds["fps"] > 0


def test_archives_are_the_benchmarks(tmp_path):
    def texts(dataset, offset=0, integers=False):
        sequences = make_sequences(tmp_path / dataset, lengths=(2,), dataset=dataset, offset=offset)
        protocol = trackers.Protocol(dataset, dataset, integers)
        put(sequences, tmp_path, [[[10, 12, 20, 16], [11.98765, 12.4, 20, 16]]], seconds=0.0125)
        with zipfile.ZipFile(trackers.archive(sequences, tmp_path, protocol)) as file:
            return {name: file.read(name).decode() for name in file.namelist()}

    assert texts("got10k") == {
        "s0/s0_001.txt": "10.000,12.000,20.000,16.000\n11.988,12.400,20.000,16.000\n",
        "s0/s0_time.txt": "0.01250000\n0.01250000\n",
    }
    assert texts("trackingnet") == {"s0.txt": "10.000,12.000,20.000,16.000\n11.988,12.400,20.000,16.000\n"}
    assert texts("otb", 1) == {"s0.txt": "11.000,13.000,20.000,16.000\n12.988,13.400,20.000,16.000\n"}
    assert texts("lasot", 1, integers=True) == {"s0.txt": "11,13,20,16\n12,13,20,16\n"}


def test_a_box_that_is_no_number_is_handed_in_empty_and_scored_as_a_failure(tmp_path):
    sequences = make_sequences(tmp_path, lengths=(3,))
    put(sequences, tmp_path, [[[10, 12, 20, 16], [np.nan] * 4, [14, 14, 20, np.inf]]])
    with zipfile.ZipFile(trackers.archive(sequences, tmp_path, GOT10K)) as file:
        assert file.read("s0/s0_001.txt").decode().splitlines()[1:] == ["0.000,0.000,0.000,0.000"] * 2
    assert trackers.score(sequences, tmp_path).scores["ao"] == 0


def test_a_test_set_without_ground_truth_is_run_and_handed_in(tmp_path):
    sequences = make_sequences(tmp_path)
    for sequence in sequences:
        sequence.boxes[1:] = np.nan
    summary, speeds = trackers.evaluate_and_score(
        Drift(), sequences, tmp_path / "out", protocol=GOT10K, settings=SETTINGS
    )
    assert summary is None and speeds["fps"] < speeds["fps_model"]
    with zipfile.ZipFile(tmp_path / "out" / "got10k.zip") as file:
        assert len(file.namelist()) == 6 and len(file.read("s1/s1_001.txt").splitlines()) == 9
    with pytest.raises(UserError, match="no ground truth after its first frame"):
        trackers.score(sequences, tmp_path / "out")


def test_an_evaluation_leaves_scores_and_curves(tmp_path):
    sequences = make_sequences(tmp_path)
    summary, _ = trackers.evaluate_and_score(
        Drift(), sequences, tmp_path / "out", protocol=GOT10K, settings=SETTINGS
    )
    told = json.loads((tmp_path / "out" / "got10k.json").read_text())
    assert told["scores"] == summary.scores and set(told["sequences"]) == {"s0", "s1", "s2"}
    assert Image.open(tmp_path / "out" / "got10k.png").size[0] > 200


def test_curves_show_scores_and_published_ones(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: shown.append(figure))
    truth = np.tile([5.0, 5, 20, 20], (4, 1))
    good, bad = (tracking.lasot([tracking.Track("a", truth, truth + d)]) for d in (0, [30, 0, 0, 0]))
    trackers.plot(tmp_path / "x.png", {"good": good, "bad": bad}, {"SBT, the paper": {"auc": 65.9, "precision": 70.0}})
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in shown[0].axes]
    assert legends[0] == ["good [95.2]", "bad [23.8]", "SBT, the paper [65.9]"]
    assert legends[1] == ["good [100.0]", "bad [25.0]", "SBT, the paper [70.0]"]
    assert legends[2] == ["good [100.0]", "bad [25.0]"]


def test_frames_show_every_box_that_is_a_number(tmp_path, monkeypatch):
    shown, sequences = [], make_sequences(tmp_path)
    monkeypatch.setattr(drawing, "save", lambda figure, path: shown.append(figure))
    boxes = [sequence.boxes + (3, 0, 0, 0) for sequence in sequences]
    boxes[1][-1] = np.nan
    put(sequences, tmp_path / "out", boxes)
    put(sequences, tmp_path / "out" / "static_box", [sequence.boxes + (5, 0, 0, 0) for sequence in sequences])
    trackers.draw_tracks(tmp_path / "x.png", sequences, tmp_path / "out", count=2)
    lefts = [[patch.get_x() for patch in axis.patches] for axis in shown[0].axes]
    assert lefts == [[10, 13, 15], [18, 21, 23], [10, 13, 15], [26, 31], [10, 13, 15], [22, 25, 27]]
    assert shown[0].axes[3].get_title() == "s1, 9"
    assert shown[0].get_suptitle() == "truth: lime, tracker: red, static box: white"


def test_the_window_is_highest_in_the_middle_and_zero_at_the_border():
    window = trackers.hann_window(9).view(9, 9)
    assert window[0].abs().max() == window[:, -1].abs().max() == 0 and window[4, 4] == window.max() == 1
    assert window[4, 2] == window[2, 4] == pytest.approx(0.5)


@pytest.mark.parametrize("box, expected", [
    ((10, 10, 30, 20), (10, 10, 30, 20)),
    ((-5, -5, 30, 20), (0, 0, 25, 15)),
    ((-50, 30, 20, 20), (0, 30, 10, 20)),
    ((155, 90, 40, 60), (150, 90, 10, 30)),
    ((50, 50, 2, 1), (50, 50, 10, 10)),
])
def test_a_box_is_kept_inside(box, expected):
    assert trackers.keep_inside(box, 160, 120) == expected


def test_a_box_may_be_as_small_as_its_margin():
    assert trackers.keep_inside((50, 50, 2, 1), 160, 120, margin=1.5) == (50, 50, 2, 1.5)


# Baselines ------------------------------------------------------------------------------------------------


def test_template_matching_follows_and_a_static_box_does_not(tmp_path):
    sequences = make_sequences(tmp_path, lengths=(15,))
    scores = {
        label: trackers.evaluate_and_score(
            make(), sequences, tmp_path / make.folder, protocol=GOT10K, settings=SETTINGS)[0].scores["ao"]
        for label, make in trackers.BASELINES.items()
    }
    assert scores["template matching (NCC)"] > 95 and scores["static box"] < 45


def test_template_matching_follows_a_change_of_size():
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 255, (30, 40), dtype=np.uint8)).resize((200, 150), Image.BICUBIC)
    tracker = baselines.NCC()
    tracker.init(np.array(scene.convert("RGB")), (80, 55, 40, 40))  # the middle, from which everything grows
    for step in range(1, 9):
        side = (200 * 1.03**step, 150 * 1.03**step)
        left, top = (side[0] - 200) / 2, (side[1] - 150) / 2
        grown = scene.resize((round(side[0]), round(side[1])), Image.BICUBIC).crop((left, top, left + 200, top + 150))
        box, _ = tracker.track(np.array(grown.convert("RGB")))
    true = 40 * 1.03**8
    assert tracking.iou(np.array([box]), np.array([[100 - true / 2, 75 - true / 2, true, true]])) > 0.85


@pytest.mark.parametrize("box", [(-8, -5, 20, 20), (70, 50, 30, 30), (30, 30, 0.4, 0.4), (-40, -40, 500, 500)])
def test_template_matching_stands_odd_boxes(box):
    frame = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    tracker = baselines.NCC()
    tracker.init(frame, box)
    found, score = tracker.track(frame)
    np.testing.assert_allclose(found, box, atol=1)
    assert score > 0.9
    tracker.init(np.zeros_like(frame), box)  # nothing to correlate with
    assert tracker.track(frame) == (pytest.approx(box), 0)


def test_on_real_sequences(tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"no real sequences at {REAL}")
    with tarfile.open(REAL / "tracking" / "tracking_small.tar") as file:
        file.extractall(tmp_path, [m for m in file.getmembers() if "Crossing" in m.name], filter="data")
    sequences = data.open_sequences(next(tmp_path.rglob("OTB")))
    found, static = (
        trackers.evaluate_and_score(
            make(), sequences, tmp_path / make.folder, protocol=OTB, settings=SETTINGS)[0].scores
        for make in (baselines.NCC, baselines.StaticBox)
    )
    assert found["auc"] > 70 and found["precision"] == 100 and static["auc"] < 10


def test_shares_of_data_sets():
    @dataclass
    class Recipe:
        shares: tuple
        datasets: tuple = ("got10k", "coco")

    assert trackers.shares(Recipe(())) is None
    assert trackers.shares(Recipe((3.0, 1.0))) == {"got10k": 3.0, "coco": 1.0}
    for wrong in ((1.0,), (1.0, 0.0), (1.0, 1.0, 1.0)):
        with pytest.raises(UserError, match="for each of got10k, coco"):
            trackers.shares(Recipe(wrong))


def test_a_smoothed_box_keeps_its_center():
    assert trackers.smoothed((10, 20, 40, 80), (0, 0, 20, 60), 1) == (10, 20, 40, 80)
    assert trackers.smoothed((10, 20, 40, 80), (0, 0, 20, 60), 0.25) == (17.5, 27.5, 25, 65)


@pytest.mark.parametrize("kind", [trackers.BASELINES["KCF (OpenCV)"], trackers.BASELINES["CSRT (OpenCV)"]])
def test_opencvs_trackers_follow_and_keep_the_last_box_when_lost(tmp_path, kind):
    (sequence,) = make_sequences(tmp_path, lengths=(5,))
    frames, tracker = [data.read_frame(path) for path in sequence.frames], kind()
    tracker.init(frames[0], tuple(sequence.boxes[0]))
    for frame in frames[1:]:
        box, score = tracker.track(frame)
    assert score == 1 and tracking.iou(np.array([box]), sequence.boxes[-1:])[0] > 0.6
    tracker.tracker = type("Lost", (), {"update": lambda self, frame: (False, (0, 0, 0, 0))})()
    assert tracker.track(frames[0]) == (box, 0.0)
    kind().init(frames[0], (70, 50, 40, 40))  # sticks out


def test_a_missing_tracker_of_opencvs_says_what_to_install(monkeypatch):
    monkeypatch.delattr(baselines.cv2, "TrackerCSRT_create")
    with pytest.raises(UserError, match=r"no CSRT tracker: pip install .* opencv-contrib-python-headless"):
        baselines.CSRT().init(np.zeros((9, 9, 3), np.uint8), (1, 1, 4, 4))


@pytest.mark.parametrize("growth, running, lost", [(4.1, 10, 1), (0.24, 10, 1), (4.1, 9, 0), (3.9, 19, 0)])
def test_a_lost_size_is_one_that_is_wrong_for_ten_frames_running(tmp_path, growth, running, lost):
    """In two stretches, of which neither counts for the other."""
    boxes = np.tile([10.0, 10, 20, 16], (41, 1))
    sequence = data.Sequence("a", "got10k", [tmp_path] * 41, boxes.copy(), np.ones(41, bool))
    for start in (1, 21):
        boxes[start : start + running, 2] *= growth
    rest = np.zeros(41)
    result = trackers.Result(boxes, rest, rest, rest, (80, 60), SETTINGS, "here")
    trackers.write_result(result_path(sequence, tmp_path), result)
    assert sizes_lost([sequence], tmp_path) == lost
