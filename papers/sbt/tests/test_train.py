"""The trainer: learns, resumes exactly, shares a batch exactly, and stops on bad input with one clear error."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import run
from common.data import pairs, tracking
from common.data.tiny.digits import digits
from common.data.tiny.sequences import sequences
from common.metrics import trackers
from common.metrics.trackers import demo
from common.tests.squares import BROKEN, break_classes, class_folders
from papers.sbt import compare, figures, loss, pretrain, train
from papers.sbt.data import validation_pairs
from papers.sbt.evaluate import PAPER, build, validate
from papers.sbt.recipes import RECIPES

WORLD = run.World(0, 1, torch.device("cpu"), None)
# Every kind of randomness, drop path among it, and a pair of epochs.
LIVELY = dataclasses.replace(RECIPES["smoke"], model_args={"drop_path_rate": 0.3}, gray=0.3, val_pairs=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four training sequences and one, cut short, to validate on and track."""
    whole, part = sequences(), tmp_path_factory.mktemp("sequences")
    for split, count in (("train", 4), ("val", 1)):
        names = (whole / split / "list.txt").read_text().split()[:count]
        (part / split).mkdir()
        (part / split / "list.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (part / split / name).symlink_to(whole / split / name)
    return part


@pytest.fixture
def pictures():
    """Asked for by a test whose runs draw theirs."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda *_: None)


def _train(tmp_path, data, recipe=LIVELY, **options):
    return train.train("smoke", recipe, run.Options(data=data, out=tmp_path, log_every=1, **options), WORLD)


def _steps(folder):
    """The log's rows of training steps; those of evaluations stand by themselves."""
    return [row for row in run.read_log(folder) if "loss" in row]


def _scores(folder):
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    return {m["name"]: m["value"] for m in metrics if "fps" not in m["name"]}


def _weights(folder):
    step, weights, _ = run.load_checkpoint(folder)
    return step, weights


@pytest.mark.slow
def test_overfits_a_batch(tmp_path, data):
    """Four pairs of one sequence, without augmentation: the boxes of the target's tokens come to lie on the target."""
    one = tmp_path / "one"
    name = (data / "train" / "list.txt").read_text().split()[0]
    for split in ("train", "val"):
        (one / split).mkdir(parents=True)
        (one / split / "list.txt").write_text(name + "\n")
        (one / split / name).symlink_to((data / "train" / name).resolve())
    recipe = dataclasses.replace(
        RECIPES["tiny"], pairs_per_epoch=8, batch=8, epochs=160, milestones=(140,), warmup_steps=5, gray=0.0,
        brightness=0.0, flip=0.0, center_jitter=0.5, scale_jitter=0.0, eval_every=160, val_pairs=8,
    )
    folder = _train(tmp_path / "runs", one, recipe)
    rows = _steps(folder)
    assert rows[-1]["iou"] > 0.75 and rows[-1]["ce"] < 0.2 < rows[0]["ce"]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data):
    whole = _train(tmp_path / "whole", data)
    for stop in (3, 11):
        folder = _train(tmp_path / "parts", data, stop_at=stop, resume="auto")
        assert not (folder / "results.json").exists()
    # a kill while the last checkpoint was being written, and a log that ran ahead of it
    torn = folder / "checkpoints" / ".step_00000012.part"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\0" * 9)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 12, "loss": 99.0}\n{"step": 13, "lo')
    parts = _train(tmp_path / "parts", data, resume=str(folder), workers=2)
    assert parts == folder and _scores(parts) == _scores(whole)
    torch.testing.assert_close(_weights(parts), _weights(whole), rtol=0, atol=0)
    losses = [[row["loss"] for row in _steps(f)] for f in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 16
    evaluations = [
        [row | {"samples_per_s": 0} for row in run.read_log(f) if "val/iou" in row] for f in (whole, parts)
    ]
    assert evaluations[0] == evaluations[1] and [row["step"] for row in evaluations[0]] == [8, 16]
    assert evaluations[0][-1]["val/iou"] > 0


def test_two_runs_of_a_seed_are_equal_and_of_two_are_not(tmp_path, data):
    runs = [_steps(_train(tmp_path / str(i), data, seed=seed, stop_at=3)) for i, seed in enumerate((0, 0, 1))]
    losses = [[row["loss"] for row in rows] for rows in runs]
    assert losses[0] == losses[1] != losses[2]


def test_accumulation_is_the_whole_batch(tmp_path, data):
    recipe = dataclasses.replace(LIVELY, model_args={"drop_path_rate": 0.0})
    rows = [_steps(_train(tmp_path / str(n), data, recipe, micro_batch=n, stop_at=3)) for n in (0, 3)]
    for whole, parts in zip(*rows):
        for key in ("loss", "ce", "l1", "giou", "iou"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-7)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, data):
    # no drop path, which draws on each process
    overrides = ["--data", data, "--log-every", "1", "--epochs", "1", "--device", "cpu"]
    logs, scores = {}, {}
    for processes in (1, 2):
        launch = ["-m"] if processes == 1 else ["-m", "common.run.launch", "2"]
        command = [sys.executable, *launch, "papers.sbt.train", "smoke", "--out", tmp_path / str(processes)]
        subprocess.run(
            [str(word) for word in command + overrides], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=run.ROOT, capture_output=True,
        )
        (folder,) = (tmp_path / str(processes)).glob("sbt/smoke/*")
        logs[processes], scores[processes] = run.read_log(folder), _scores(folder)
    assert len(logs[1]) == len(logs[2]) == 8  # the last with what validation says
    for one, two in zip(logs[1][:8], logs[2][:8]):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert logs[2][-1]["val/loss"] == pytest.approx(logs[1][-1]["val/loss"], rel=1e-2)
    assert scores[1].keys() == scores[2].keys()
    for name in ("got10k ao, static box", "got10k ao, template matching (NCC)"):
        assert scores[1][name] == scores[2][name]


def test_the_learning_rate_warms_up_and_drops(tmp_path, data):
    rows = _steps(_train(tmp_path, data))
    rates = [row["lr"] for row in rows]
    top = LIVELY.lr
    assert rates == pytest.approx([top / 2, *[top] * 7, *[top / 10] * 8])


def test_validation_pairs_whose_targets_lie_outside_are_scored(monkeypatch, data):
    samples = validation_pairs(LIVELY, pairs.open_data(LIVELY, data))
    monkeypatch.setattr(loss, "assign", lambda box, grid, *_: torch.zeros(len(box), grid**2, dtype=torch.bool))
    scores = validate(build(LIVELY), samples, LIVELY, WORLD)
    assert scores["iou"] == scores["l1"] == 0 < scores["loss"] < 1000


def test_a_loss_that_explodes_stops_the_run_before_the_weights_are_touched(tmp_path, data):
    recipe = dataclasses.replace(LIVELY, lr=1e30, warmup_steps=0)
    with pytest.raises(run.UserError, match=r"not finite at step \d+"):
        _train(tmp_path, data, recipe, checkpoint_every=1)
    (folder,) = tmp_path.glob("sbt/smoke/*")
    _, weights = _weights(folder)
    assert all(tensor.isfinite().all() for tensor in weights["model"].values())
    assert not (folder / "results.json").exists()


def test_a_run_can_be_evaluated_and_drawn(tmp_path, data, monkeypatch, capsys, pictures):
    draw, training = figures.draw_scores, []
    monkeypatch.setattr(figures, "draw_scores", lambda path, model, *rest: (
        training.append(model.training), draw(path, model, *rest)))
    folder = train.train("smoke", LIVELY, run.Options(data=data, out=tmp_path / "runs"), WORLD)
    scores = _scores(folder)
    assert training == [False]
    results = json.loads((folder / "results.json").read_text())
    iou = next(row["val/iou"] for row in run.read_log(folder)[::-1] if "val/iou" in row)
    assert scores.pop("pairs iou") == 100 * iou
    assert set(scores) == {"got10k ao", "got10k ao, static box", "got10k ao, template matching (NCC)"}
    assert not any(m["comparable"] for m in results["metrics"]) and len(results["metrics"]) == 6
    assert {p.name for p in folder.glob("*.png")} == {"curves.png", "tracks.png", "scores.png"}
    assert "![tracks](tracks.png)" in (folder / "report.md").read_text()

    out = tmp_path / "again"
    argv = ["evaluate", folder, "--data", data, "--split", "val", "--out", out, "--baselines"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    trackers.main(PAPER)
    again = {m["name"]: m["value"] for m in json.loads((out / "evaluation.json").read_text())["metrics"]}
    assert {key: again[key] for key in scores} == scores

    # the file of weights alone, too
    weights = tmp_path / "weights.safetensors"
    run.save_weights(weights, _weights(folder)[1]["model"])
    argv = ["evaluate", weights, "--recipe", "smoke", "--data", data, "--split", "val", "--out", tmp_path / "file"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    trackers.main(PAPER)
    of_file = json.loads((tmp_path / "file" / "evaluation.json").read_text())["metrics"]
    assert next(m["value"] for m in of_file if m["name"] == "got10k ao") == scores["got10k ao"]

    monkeypatch.chdir(tmp_path)
    source = tracking.open_sequences(data, "val")[0].frames[0].parent
    monkeypatch.setattr(sys, "argv", ["demo", str(source), "--frames", "4"])
    demo.main(PAPER)
    assert (tmp_path / "answer.mp4").stat().st_size > 1000 and Image.open(tmp_path / "answer.png").size[0] > 200


@pytest.mark.slow
def test_pretraining_gives_weights_for_a_tracker(tmp_path, data):
    small = tmp_path / "digits"
    for path in sorted(digits().rglob("*.png"))[::6]:
        target = small / path.relative_to(digits())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    recipe = dataclasses.replace(RECIPES["pretrain_tiny"], epochs=2, batch=64)
    options = run.Options(data=small, out=tmp_path / "runs", log_every=1)
    whole = pretrain.train("pretrain_tiny", recipe, options, WORLD)
    options = dataclasses.replace(options, out=tmp_path / "parts", resume="auto")
    pretrain.train("pretrain_tiny", recipe, dataclasses.replace(options, stop_at=3), WORLD)
    parts = pretrain.train("pretrain_tiny", recipe, options, WORLD)
    torch.testing.assert_close(_weights(parts), _weights(whole), rtol=0, atol=0)
    assert _scores(whole) == _scores(parts)

    tracker = dataclasses.replace(LIVELY, init=str(whole))
    folder = _train(tmp_path / "runs", data, tracker, stop_at=1, checkpoint_every=1)
    for name, tensor in _weights(folder)[1]["model"].items():
        if name.startswith("backbone.stages.2.blocks") and name.endswith("fc1.weight"):
            before = _weights(whole)[1]["model"][name.removeprefix("backbone.")]
            assert 0 < (tensor - before).abs().max() <= 1.1 * LIVELY.lr  # one step of Adam away


@pytest.mark.slow
def test_a_comparison_resumes_and_reports_all_members(tmp_path, data):
    recipe = dataclasses.replace(
        LIVELY, compare=("none", "interleaved", "correlation_sbt"), epochs=1, pairs_per_epoch=16, val_pairs=4,
    )
    options = run.Options(data=data, out=tmp_path, resume="auto", log_every=1, seeds=(0, 1))
    stopped = compare.compare("ablation", recipe, dataclasses.replace(options, stop_at=1), WORLD, train.train)
    assert not (stopped / "results.json").exists()
    folder = compare.compare("ablation", recipe, options, WORLD, train.train)
    assert folder == stopped
    results = json.loads((folder / "results.json").read_text())
    rows = {m["name"]: m for m in results["metrics"]}
    assert list(rows)[:2] == ["none ao", "none iou"] and len(rows) == 12
    assert rows["none params"]["value"] == rows["interleaved params"]["value"]
    assert rows["none ao"]["seeds"] == [0, 1] and (folder / "compare.png").exists()
    home = next(folder.glob("seed1/sbt/none/*"))
    assert json.loads((home / "scores.json").read_text())["ao"] == _scores(home)["got10k ao"]
    assert "| interleaved |" in (folder / "report.md").read_text()


def test_a_training_without_a_validation_split_ends_and_ends_again(tmp_path, data):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train").symlink_to(data / "train")
    recipe = dataclasses.replace(LIVELY, epochs=1, pairs_per_epoch=8)
    folder = _train(tmp_path / "runs", alone, recipe)
    scores = _scores(folder)
    assert set(scores) == {"loss"} and scores["loss"] == run.read_log(folder)[-1]["loss"]
    (folder / "results.json").unlink()  # killed after the last step
    assert _train(tmp_path / "runs", alone, recipe, resume="auto") == folder and _scores(folder) == scores
    with pytest.raises(run.UserError, match="scored on a validation split"):
        compare.compare("ablation", RECIPES["ablation"], run.Options(data=alone, out=tmp_path), WORLD, train.train)


@pytest.mark.parametrize("shares, first", [((1.0, 3.0), 0.25), ((), 0.5)])
def test_data_sets_are_drawn_by_their_shares(tmp_path, data, monkeypatch, shares, first):
    root, seen = tmp_path / "two", []
    root.mkdir()
    for name in ("got10k", "lasot"):  # another folder of the same kind will do
        (root / name).symlink_to(data)
    keep = pairs.pairs_loader
    monkeypatch.setattr(pairs, "pairs_loader", lambda samples, *a, **k: seen.append(samples) or keep(samples, *a, **k))
    recipe = dataclasses.replace(LIVELY, datasets=("got10k", "lasot"), shares=shares)
    _train(tmp_path, root, recipe, stop_at=1)
    assert seen[0].probabilities.tolist() == [first, 1 - first]


def test_members_are_what_they_are_called():
    recipe = dataclasses.replace(RECIPES["ablation"], model="sbt_base")
    members = compare.members(recipe)
    blocks = {label: member.model_args.get("cross_blocks") for label, member in members.items()}
    assert blocks["none"][2] == () and blocks["one"][2] == (2,) and blocks["interleaved"] is None
    assert blocks["early"][2] == (1, 2, 3, 4, 5) and blocks["late"][2] == (6, 7, 8, 9, 10)
    assert not any(member.compare for member in members.values())
    with pytest.raises(run.UserError, match="no member 'both' in --compare; there are none, one"):
        compare.members(dataclasses.replace(recipe, compare=("both",)))


def test_the_readmes_table_of_a_comparison():
    metrics = [
        run.metric("none iou", 50.0, "%") | {"seeds": [3]}, run.metric("none ao", 20.0, "%") | {"seeds": [3]},
        run.metric("none params", 1234, "parameters"), run.metric("none flops", 2e6, "multiply-adds"),
    ]
    records = [{"recipe": name, "data": f"data of {name}", "metrics": metrics} for name in ("ablation", "tiny")]
    text = compare.README_PARTS["compare"](records)
    assert "| none | 20.0 | 50.0 | 1,234 | 2.0 |" in text and "One run of each, seed 3" in text
    assert "data of ablation:" in text and "data of tiny" not in text


def test_held_out_data_sets_train_nothing(tmp_path, data):
    """A folder of data sets without splits: what is tested on is not trained on."""
    root = tmp_path / "real"
    (root / "GOT-10k").mkdir(parents=True)
    (root / "GOT-10k" / "train").symlink_to(data / "train")
    source = tracking.open_sequences(data, "val")[0]
    folder = root / "OTB" / "Thing"
    (folder / "img").mkdir(parents=True)
    for i, path in enumerate(source.frames[:22], 1):
        (folder / "img" / f"{i:04d}.jpg").symlink_to(path.resolve())
    np.savetxt(folder / "groundtruth_rect.txt", source.boxes[:22] + (1, 1, 0, 0), fmt="%.3f", delimiter=",")
    recipe = dataclasses.replace(LIVELY, datasets=("got10k",), held_out=("otb",))
    opened = pairs.open_data(recipe, root)
    assert {s.dataset for found in opened.train.values() for s in found} == {"got10k"}
    assert [s.name for s in opened.test] == ["Thing"] and not opened.val
    scores = _scores(_train(tmp_path / "runs", root, recipe, stop_at=0))
    assert {name for name in scores if "," not in name} == {"otb auc", "otb/Thing auc", "otb sizes lost"}
    with pytest.raises(run.UserError, match="no folder for vot; it has got10k, otb"):
        pairs.open_data(dataclasses.replace(recipe, held_out=("vot",)), root)


@pytest.mark.parametrize("argv, message", [
    (["got10k"], "meant for GOT-10k: give its folder with --data"),
    (["tiny", "--data", "/nowhere"], "no data folder /nowhere"),
    (["tiny", "--batch", "4000"], "larger than the 3200"),
    (["tiny", "--resume", "/nowhere"], "not a run folder"),
    (["tiny", "--device", "cuda"], "no CUDA device"),
    (["tiny", "--model", "sbt_giant"], "no variant 'sbt_giant'; there are sbt_light"),
    (["tiny", "--search-px", "100"], "search_size 100 is not a multiple of the stride 8"),
    (["tiny", "--head", "correlation", "--model", "no_such_net"], "cannot build no_such_net"),
    (["tiny", "--val-pairs", "0"], "0 samples of val are asked for: expected at least 1"),
    (["tiny", "--init", "/nowhere.pth"], "no checkpoint at /nowhere.pth"),
    (["tiny", "--shares", "0.5", "0.5"], "expected a probability above 0 for each of got10k"),
    (["pretrain"], "meant for ImageNet-1K"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("papers.sbt", run_name="__main__")
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


@pytest.mark.parametrize("how, message", BROKEN)
def test_other_classes_in_the_pretrainings_validation_are_one_line(tmp_path, how, message):
    break_classes(root := class_folders(tmp_path / "data"), how)
    with pytest.raises(run.UserError, match=message):
        pretrain.train("pretrain_tiny", RECIPES["pretrain_tiny"], run.Options(data=root, out=tmp_path / "runs"), WORLD)
    assert not (tmp_path / "runs").exists()


def test_data_are_looked_at_before_weights_are_sought(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "init_weights", lambda *_: pytest.fail("weights first"))
    with pytest.raises(run.UserError, match=r"no data folder|has no folder for"):
        _train(tmp_path / "runs", tmp_path / "nowhere", RECIPES["got10k"])
    assert not (tmp_path / "runs").exists()
