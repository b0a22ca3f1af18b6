"""What trackers offer on the command line: evaluate, comparison at the end of a training, demo."""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import run
from common.data import tracking as data
from common.metrics import trackers
from common.metrics.trackers import baselines, demo
from common.run import UserError, World, drawing
from common.tests.squares import make_sequences

CPU = World(0, 1, torch.device("cpu"), None)

# Evaluation and demo --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    dataset: str = "OTB-100"
    speed_px: float = 2.0
    paper_scores: dict[str, float] = field(default_factory=lambda: {"otb auc": 71.2, "otb fps": 40.0})
    paper_source: str | None = "Table 1"
    sides: tuple[int, ...] = (1, 2)


class Linear:
    """Moves the box by the network's bias every frame."""

    def __init__(self, network, recipe, world):
        assert not network.training
        self.step = network.bias.tolist()

    def init(self, frame, box):
        self.box = np.array(box)

    def track(self, frame):
        self.box = self.box + (*self.step, 0, 0)
        return tuple(self.box), 1.0


def rename(weights, network):
    """As the authors of nobody call their tensors."""
    return {name.removeprefix("linear."): tensor for name, tensor in weights.items()}


PAPER = trackers.Paper(
    name="nobody", recipes={"plain": Recipe()}, build=lambda recipe: torch.nn.Linear(1, 2), make_tracker=Linear,
    convert_weights=rename,
)
WEIGHTS = {"weight": torch.zeros(2, 1), "bias": torch.tensor([2.0, 1.0])}
AUTHORS_WEIGHTS = {f"linear.{name}": tensor for name, tensor in WEIGHTS.items()}


@pytest.fixture
def otb(tmp_path):
    """An OTB folder with one sequence, boxes from 1."""
    (sequence,) = make_sequences(tmp_path / "made", lengths=(6,))
    img = tmp_path / "OTB" / "Square" / "img"
    img.mkdir(parents=True)
    for i, path in enumerate(sequence.frames, 1):
        Image.open(path).save(img / f"{i:04d}.jpg", quality=95)
    np.savetxt(img.parent / "groundtruth_rect.txt", sequence.boxes + (1, 1, 0, 0), fmt="%d", delimiter="\t")
    return img.parent.parent


def evaluate_line(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, argv)])
    trackers.main(PAPER)


def test_evaluate_of_a_file(tmp_path, otb, monkeypatch, capsys):
    run.save_weights(weights := tmp_path / "w.safetensors", WEIGHTS)
    evaluate_line(monkeypatch, weights, "--recipe", "plain", "--data", otb, "--baselines", "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = {row["name"]: row for row in told["metrics"]}
    assert rows["otb auc"]["value"] == pytest.approx(2000 / 21)
    assert (rows["otb auc"]["paper_value"], rows["otb auc"]["paper_source"]) == (71.2, "Table 1")
    assert not any(row["comparable"] for row in rows.values())  # one sequence is not OTB-100
    assert rows["otb auc, static box"]["paper_value"] is None and rows["otb auc, static box"]["value"] < 80
    assert rows["otb auc, template matching (NCC)"]["value"] > 80
    assert "the paper: 71.2 (not comparable)" in capsys.readouterr().out
    for state_dict, published in ((WEIGHTS, False), (AUTHORS_WEIGHTS, True)):  # of files, the authors' alone
        run.save_weights(weights, state_dict)
        assert PAPER.load(weights, "plain", CPU).published == published
    results = run.metric("x", 1, "%").keys()
    assert all(row.keys() == results for row in rows.values())


def test_baselines_are_scored_without_a_checkpoint(tmp_path, otb, monkeypatch, capsys):
    """All four in one table, and beside a tracker's weights."""
    monkeypatch.chdir(tmp_path)
    words = ["static", "ncc", "kcf", "csrt"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--tracker", *words, "--data", str(otb)])
    trackers.main(PAPER)
    (told,) = tmp_path.glob("runs/*/baselines/tracking/evaluation.json")
    aucs = {row["name"]: row["value"] for row in json.loads(told.read_text())["metrics"] if "auc" in row["name"]}
    assert list(aucs) == [f"otb auc, {label}" for label in trackers.BASELINES]
    assert aucs["otb auc, static box"] < min(aucs["otb auc, template matching (NCC)"], aucs["otb auc, CSRT (OpenCV)"])
    run.save_weights(weights := tmp_path / "w.safetensors", WEIGHTS)
    line = ["evaluate", "--weights", str(weights), "--recipe", "plain", "--data", str(otb), "--tracker", "csrt"]
    monkeypatch.setattr(sys, "argv", line)
    trackers.main(PAPER)
    rows = json.loads((tmp_path / "tracking" / "evaluation.json").read_text())["metrics"]
    assert [row["name"] for row in rows if " auc" in row["name"]] == ["otb auc", "otb auc, CSRT (OpenCV)"]
    for wrong, message in (
        (["evaluate"], "nothing to evaluate"), (["evaluate", str(weights), *line[1:]], "one checkpoint is evaluated"),
    ):
        monkeypatch.setattr(sys, "argv", wrong)
        with pytest.raises(UserError, match=message):
            trackers.main(PAPER)


def test_a_papers_figures_have_their_rule(tmp_path, otb, monkeypatch):
    """Scored by another rule, a metric has another name and stands beside no figure of the paper."""
    run.save_weights(weights := tmp_path / "w.safetensors", AUTHORS_WEIGHTS)
    monkeypatch.setitem(data.LISTS, "otb", [s.name for s in data.open_sequences(otb)])
    for rules, asked, rule, name, published in (
        ({}, [], "otb", "otb auc", 71.2), ({"otb": "lasot"}, [], "lasot", "otb-lasot auc", 71.2),
        ({"otb": "lasot"}, ["--rule", "otb"], "otb", "otb auc", None),
        ({}, ["--rule", "lasot"], "lasot", "otb-lasot auc", None),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate", str(weights), "--recipe", "plain", "--data", str(otb), *asked])
        trackers.main(replace(PAPER, rules=rules))
        told = json.loads((tmp_path / "tracking" / "evaluation.json").read_text())
        first = told["metrics"][0]
        assert (told["rule"], first["name"], first["paper_value"]) == (rule, name, published)
        assert first["comparable"] == (published is not None)
    assert {p.name for p in (tmp_path / "tracking").glob("otb*.json")} == {"otb.json", "otb-lasot.json"}


def test_a_training_and_an_evaluation_score_by_the_same_rule(tmp_path, monkeypatch):
    """LaSOT with half of the true boxes at x = 0, which its toolkit does not accept and PyTracking does."""
    (sequence,) = make_sequences(tmp_path / "made", lengths=(1,))
    boxes = np.tile([9.0, 12, 16, 16], (50, 1))
    boxes[:25, 0] = -1  # 0 in the files, which count from 1
    lasot = [data.Sequence("s0", "lasot", sequence.frames * 50, boxes, np.ones(50, bool), 1)]

    class OnePixelOff:
        def init(self, frame, box):
            self.rest = iter(boxes[1:])

        def track(self, frame):
            return next(self.rest) + (1, 0, 0, 0), 1.0

    run.write_json(tmp_path / "config.json", {"recipe_name": "plain", "recipe": {}})
    run.save_checkpoint(tmp_path, 5, {"model": WEIGHTS}, {})
    monkeypatch.setattr(data, "open_sequences", lambda root, split: lasot)
    for rules, name, auc in (({}, "lasot auc", 42.9), ({"lasot": "lasot_wh_valid"}, "lasot-wh_valid auc", 85.9)):
        paper = replace(PAPER, rules=rules, make_tracker=lambda *_: OnePixelOff())
        first = trackers.compare(paper, tmp_path, lasot, CPU, baselines=False)[0]
        monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path), "--data", str(tmp_path)])
        trackers.main(paper)
        told = json.loads((tmp_path / "tracking" / "evaluation.json").read_text())
        assert told["metrics"][0] == first
        assert first["name"] == name and first["value"] == pytest.approx(auc, abs=0.05)


def test_evaluate_of_a_run(tmp_path, otb, monkeypatch):
    config = {"paper": "nobody", "recipe_name": "plain", "recipe": {"speed_px": 3.0}}
    run.write_json(tmp_path / "config.json", config)
    run.save_checkpoint(tmp_path, 5, {"model": WEIGHTS}, {"step": 5})
    evaluate_line(monkeypatch, tmp_path, "--data", otb)
    result = trackers.read_result(tmp_path / "tracking" / "otb" / "Square.csv")
    assert result.settings["recipe"]["speed_px"] == 3.0 and result.settings["paper"] == "nobody"
    before = result.settings["weights"]
    run.save_checkpoint(tmp_path, 6, {"model": WEIGHTS | {"bias": torch.zeros(2)}}, {"step": 6})
    evaluate_line(monkeypatch, tmp_path, "--data", otb)  # other weights: tracked anew
    result = trackers.read_result(tmp_path / "tracking" / "otb" / "Square.csv")
    assert result.settings["weights"] != before and (result.boxes == result.boxes[0]).all()


def test_a_finished_run_is_compared_with_the_baselines(tmp_path, otb):
    run.write_json(tmp_path / "config.json", {"recipe": {}})
    run.save_checkpoint(tmp_path, 5, {"model": WEIGHTS}, {})
    moving, resting = make_sequences(tmp_path / "got10k", lengths=(6, 9))
    resting.boxes[:] = resting.boxes[0]
    sequences = [*data.open_sequences(otb), moving, resting]
    rows = trackers.compare(PAPER, tmp_path, sequences, CPU, each=True)
    found = {row["name"]: row["value"] for row in rows}
    assert list(found)[:10] == [
        f"{score}{label}" for score in ("otb auc", "got10k ao")
        for label in ("", ", static box", ", template matching (NCC)", ", KCF (OpenCV)", ", CSRT (OpenCV)")]
    assert list(found)[-4:] == [f"{name} {fps}" for name in ("otb", "got10k") for fps in ("fps", "fps_model")]
    assert len(found) == 10 + 15 + 10 + 4 and found["otb fps"] < found["otb fps_model"]
    assert rows[0]["paper_value"] == 71.2 and not any(row["comparable"] for row in rows)
    assert found["got10k/s0 ao"] == pytest.approx(100) and found["got10k/s1 ao, static box"] == pytest.approx(100)
    assert found["got10k ao"] == pytest.approx((5 * 100 + 8 * found["got10k/s1 ao"]) / 13)  # a mean over frames
    (alone, *_, speed) = trackers.compare(PAPER, tmp_path, sequences[:1], CPU, baselines=False)
    assert (alone, speed["name"]) == (rows[0], "otb fps_model")


OTB = data.LISTS["otb"]


@pytest.mark.parametrize("changes, names, comparable", [
    ({}, OTB, True), ({"speed_px": 3.0}, OTB, False), ({}, OTB[:99], False), ({}, [*OTB[:99], "Mine"], False),
], ids=["whole", "another recipe", "one missing", "one replaced"])
def test_only_the_whole_test_set_and_an_untouched_recipe_are_comparable(
    tmp_path, otb, monkeypatch, changes, names, comparable
):
    """In the report of a training as in an evaluation."""
    (one,) = data.open_sequences(otb)
    many = [data.Sequence(name, "otb", one.frames[:2], one.boxes[:2], one.visible[:2], 1) for name in names]
    monkeypatch.setattr(data, "open_sequences", lambda root, split: many)
    recipe = json.loads(json.dumps(asdict(Recipe(**changes))))
    run.write_json(tmp_path / "config.json", {"recipe_name": "plain", "recipe": recipe})
    run.save_checkpoint(tmp_path, 5, {"model": WEIGHTS}, {})
    evaluate_line(monkeypatch, tmp_path, "--data", otb)
    told = json.loads((tmp_path / "tracking" / "evaluation.json").read_text())
    found = {row["name"]: row["comparable"] for row in told["metrics"]}
    assert found == {"otb auc": comparable, "otb precision": False, "otb fps": False, "otb fps_model": False}
    trained = {row["name"]: row["comparable"] for row in trackers.compare(PAPER, tmp_path, many, CPU, baselines=False)}
    assert trained == {"otb auc": comparable, "otb fps": False, "otb fps_model": False}


def test_earlier_results_are_told_and_can_be_left_aside(tmp_path, otb, monkeypatch, capsys):
    run.save_weights(weights := tmp_path / "w.safetensors", WEIGHTS)
    line = [weights, "--recipe", "plain", "--data", otb]
    evaluate_line(monkeypatch, *line)
    honest = capsys.readouterr().out
    assert "earlier results" not in honest
    (file,) = (tmp_path / "tracking" / "otb").glob("*.csv")
    header, *rows, end = file.read_text().splitlines()
    forged = [",".join(["0", "0", "1", "1", *row.split(",")[4:]]) for row in rows[1:]]
    file.write_text("\n".join([header, rows[0], *forged, end, ""]))
    evaluate_line(monkeypatch, *line)
    forged = capsys.readouterr().out
    assert "1 of 1 sequences taken from earlier results in" in forged
    evaluate_line(monkeypatch, *line, "--fresh")
    fresh = capsys.readouterr().out

    def auc(printed):
        return next(row for row in printed.splitlines() if "otb auc" in row)

    assert "earlier results" not in fresh and auc(fresh) == auc(honest) != auc(forged)


def test_data_are_looked_at_before_the_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no data folder"):
        evaluate_line(monkeypatch, tmp_path / "none.pth", "--data", tmp_path / "nowhere")


@pytest.mark.parametrize("argv, message", [
    (["missing.pth"], "no checkpoint at missing.pth"),
    (["w.safetensors"], "a file of weights needs --recipe, one of plain"),
    (["w.safetensors", "--recipe", "plain"], "meant for OTB-100: give its folder with --data"),
    (["w.safetensors", "--recipe", "plain", "--rule", "vot"], "no rule 'vot'; there are otb, lasot"),
    (["bad.safetensors", "--recipe", "plain"], "does not fit the recipe plain"),
    (["."], "is no run folder with a whole checkpoint"),
    (["pretrained"], "pretrained is no run of this version: .*'classes'"),
])
def test_mistakes_in_an_evaluation(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    run.save_weights(Path("w.safetensors"), WEIGHTS)
    run.save_weights(Path("bad.safetensors"), {"weight": torch.zeros(2, 1)})
    Path("pretrained").mkdir()
    run.write_json(Path("pretrained/config.json"), {"recipe": {"classes": 10}})
    run.save_checkpoint(Path("pretrained"), 5, {"model": WEIGHTS}, {})
    with pytest.raises(UserError, match=message):
        evaluate_line(monkeypatch, *argv)


@pytest.mark.parametrize("out", ["answer.mp4", "answer.gif"])
def test_demo_on_a_folder(tmp_path, otb, monkeypatch, out):
    av = pytest.importorskip("av")
    run.save_weights(weights := tmp_path / "w.safetensors", WEIGHTS)
    monkeypatch.setattr(sys, "argv", [
        "demo", str(otb / "Square" / "img"), "--checkpoint", str(weights), "--recipe", "plain",
        "--out", str(tmp_path / out)])
    demo.main(PAPER)
    with av.open(str(tmp_path / out)) as video:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    assert len(frames) == 6 and frames[0].shape == (60, 80, 3)
    edge = frames[5][25:32, 19:25]  # the left side of the box, 10 + 5 * 2 + 1 in OTB's count, is red
    redness = edge[..., 0] - edge[..., 1:].mean(-1)
    assert redness.mean(0).max() > 60
    assert Image.open((tmp_path / out).with_suffix(".png")).size[0] > 100


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


def test_demo_on_a_video_and_a_strip_of_a_long_one(tmp_path, otb, monkeypatch):
    av = pytest.importorskip("av")
    rng, path = np.random.default_rng(0), tmp_path / "long.mp4"
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10, width=80, height=60, pix_fmt="yuv420p")
        for _ in range(40):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))))
        video.mux(stream.encode())
    shown = {}
    monkeypatch.setattr(drawing, "gallery", lambda path, _pictures, captions, *_, **__: shown.update({path: captions}))
    assert demo.annotate(baselines.StaticBox(), path, (10, 10, 20, 20), tmp_path / "a.mp4") == 40
    (captions,) = shown.values()
    assert [caption.split(":")[0] for caption in captions] == [str(i) for i in range(1, 41, 4)]
    assert demo.annotate(baselines.StaticBox(), path, (10, 10, 20, 20), tmp_path / "b.gif", limit=3) == 3
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == 10


def test_where_the_target_is(tmp_path):
    (tmp_path / "img").mkdir()
    with pytest.raises(UserError, match="Give --box"):
        demo.first_box(tmp_path / "img", None)
    (tmp_path / "groundtruth.txt").write_text("1,2,11,2,11,22,1,22\n5,5,5,5,5,5,5,5\n")
    assert demo.first_box(tmp_path / "img", None) == (1, 2, 11, 21)
    assert demo.first_box(tmp_path, "3, 4 ,5,6") == (3, 4, 5, 6)
    (tmp_path / "tabs.txt").write_text("1\t2\t3\t4\n")
    assert demo.first_box(tmp_path / "video.mp4", str(tmp_path / "tabs.txt")) == (1, 2, 3, 4)
    for files in (("groundtruth_rect.txt",), ("groundtruth.txt", "full_occlusion.txt")):  # OTB, LaSOT
        folder = tmp_path / files[-1].removesuffix(".txt")
        (folder / "img").mkdir(parents=True)
        for file in files:
            (folder / file).write_text("11,21,5,6\n")
        assert demo.first_box(folder / "img", None) == (10, 20, 5, 6)
    absurd = ("m0,0,99999999,99999999,1,1", "1,2,3," + "9" * 30, "9" * 5000, "m" + "1," * 5000 + "1", "1,2,1e9,4")
    for wrong in ("1,2,3", "1,2,0,4", "a,b,c,d", "nan,1,2,3", str(tmp_path / "missing.txt"), *absurd):
        with pytest.raises(UserError, match="--box is x,y,w,h"):
            demo.first_box(tmp_path, wrong)
    (tmp_path / "tabs.txt").write_bytes(b"1,2,3,\xff")
    with pytest.raises(UserError, match=r"tabs\.txt is not in UTF-8"):
        demo.first_box(tmp_path, str(tmp_path / "tabs.txt"))


def test_a_sequence_of_otb_that_is_a_part_of_its_folder(tmp_path, otb):
    """BlurCar3 begins with the third frame; Human4's box is in its second file."""
    folder = (otb / "Square").rename(otb / "BlurCar3")
    (folder / "groundtruth_rect.1.txt").write_text("")
    for source in (folder, folder / "img"):
        assert demo.first_box(source, None) == (10, 12, 20, 16)
        with demo.open_frames(source) as (frames, _):
            np.testing.assert_array_equal(next(frames), data.read_frame(folder / "img" / "0003.jpg"))


def test_mistakes_in_a_demo(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    (cut,) = make_sequences(tmp_path / "cut", lengths=(3,))
    cut.frames[1].write_bytes(cut.frames[1].read_bytes()[:200])
    for source, out, message in (
        ("none", "a.mp4", "holds no frames"), ("none", "a.avi", "an .mp4 or a .gif"),
        ("text.mp4", "a.mp4", "cannot make .*a.mp4 from .*text.mp4: .*Invalid data"),
        ("missing", "a.mp4", "No such file"), ("cut/s0", "a.mp4", r"cannot read .*1\.png"),
    ):
        with pytest.raises(UserError, match=message):
            demo.annotate(baselines.StaticBox(), tmp_path / source, (1, 1, 2, 2), tmp_path / out)
        assert not list(tmp_path.glob(".*part*")) and not (tmp_path / out).exists()
