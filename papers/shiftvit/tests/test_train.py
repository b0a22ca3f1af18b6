"""The trainer: learns, resumes exactly, shares a batch exactly, and stops on bad input with one clear error."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from common import run
from common.data import images
from common.data.tiny.digits import digits
from common.metrics import classification
from common.run import shipped
from common.tests.squares import BROKEN, break_classes, class_folders
from papers.shiftvit.evaluate import PAPER
from papers.shiftvit.recipes import RECIPES
from papers.shiftvit.train import train

WORLD = run.World(0, 1, torch.device("cpu"), None)
# Every kind of randomness: augmentation, mixup, drop path.
LIVELY = dataclasses.replace(
    RECIPES["smoke"], batch=32, epochs=1, warmup_epochs=0.2, policy="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0,
    model_args={"drop_path_rate": 0.3},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A quarter of the digits."""
    whole, part = digits(), tmp_path_factory.mktemp("digits")
    for path in sorted(whole.rglob("*.png"))[::4]:
        target = part / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return part


def _train(tmp_path, data, recipe=LIVELY, **options):
    return train("smoke", recipe, run.Options(data=data, out=tmp_path, log_every=1, **options), WORLD)


def _scores(folder):
    return {m["name"]: m["value"] for m in json.loads((folder / "results.json").read_text())["metrics"]}


def _weights(folder):
    step, weights, _ = run.load_checkpoint(folder)
    return step, weights


def test_overfits_a_batch(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for label, path in enumerate(sorted((digits() / "val").rglob("*.png"))[::22]):
            target = root / split / str(label)
            target.mkdir(parents=True)
            (target / "0.png").symlink_to(path)
    recipe = dataclasses.replace(RECIPES["tiny"], batch=16, epochs=40, crop_scale=(1.0, 1.0), label_smoothing=0.0,
                                 lr=3e-2, eval_every=40, ema_decay=0.0)
    folder = train("tiny", recipe, run.Options(data=root, out=tmp_path), WORLD)
    assert _scores(folder)["top1"] == 100 and _scores(folder)["loss"] < 0.1


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data):
    whole = _train(tmp_path / "whole", data)
    for stop in (3, 7):
        folder = _train(tmp_path / "parts", data, stop_at=stop, resume="auto")
        assert not (folder / "results.json").exists()
    # a kill while the last checkpoint was being written, and a log that ran ahead of it
    torn = folder / "checkpoints" / ".step_00000008.part"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\0" * 9)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 8, "loss": 99.0}\n{"step": 9, "lo')
    parts = _train(tmp_path / "parts", data, resume=str(folder), workers=2)
    assert parts == folder and _scores(parts) == _scores(whole)
    torch.testing.assert_close(_weights(parts), _weights(whole), rtol=0, atol=0)
    losses = [[row["loss"] for row in run.read_log(f)] for f in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 11


def test_two_runs_of_a_seed_are_equal_and_of_two_are_not(tmp_path, data):
    scores = [run.read_log(_train(tmp_path / str(i), data, seed=seed, stop_at=4)) for i, seed in enumerate((0, 0, 1))]
    losses = [[row["loss"] for row in rows] for rows in scores]
    assert losses[0] == losses[1] != losses[2]


def test_accumulation_is_the_whole_batch(tmp_path, data):
    recipe = dataclasses.replace(LIVELY, model_args={})
    rows = [run.read_log(_train(tmp_path / str(n), data, recipe, micro_batch=n, stop_at=4)) for n in (0, 10)]
    for whole, parts in zip(*rows):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, data):
    # Without mixup, which pairs the images of a process, and drop path, which draws on each process.
    overrides = ["--data", data, "--mixup", "0", "--cutmix", "0", "--batch", "32", "--epochs", "1", "--log-every", "1"]
    overrides += ["--device", "cpu"]
    logs = {}
    for processes in (1, 2):
        launch = ["-m"] if processes == 1 else ["-m", "common.run.launch", "2"]
        command = [sys.executable, *launch, "papers.shiftvit.train", "smoke", "--out", tmp_path / str(processes)]
        subprocess.run(
            [str(word) for word in command + overrides], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=run.ROOT, capture_output=True,
        )
        (folder,) = (tmp_path / str(processes)).glob("shiftvit/smoke/*")
        logs[processes] = run.read_log(folder)
    assert len(logs[1]) == len(logs[2]) == 11
    for one, two in zip(logs[1], logs[2]):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert logs[2][-1]["val/top1"] == pytest.approx(logs[1][-1]["val/top1"], abs=2)


def test_a_loss_that_explodes_stops_the_run_before_the_weights_are_touched(tmp_path, data):
    recipe = dataclasses.replace(LIVELY, lr=1e30, warmup_epochs=0.0)
    with pytest.raises(run.UserError, match=r"not finite at step \d+"):
        _train(tmp_path, data, recipe, checkpoint_every=1)
    (folder,) = tmp_path.glob("shiftvit/smoke/*")
    _, weights = _weights(folder)
    assert all(tensor.isfinite().all() for tensor in weights["model"].values())
    assert not (folder / "results.json").exists()


def test_a_run_can_be_evaluated_exported_and_read(tmp_path, data, monkeypatch, capsys):
    folder = _train(tmp_path, data)
    scores = _scores(folder)
    results = json.loads((folder / "results.json").read_text())
    assert not any(m["comparable"] for m in results["metrics"]) and results["params"] == 660_106
    assert {p.name for p in folder.glob("*.png")} == {"curves.png", "predictions.png", "receptive_field.png"}

    argv = ["evaluate", folder, "--data", data, "--out", tmp_path / "scores.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    classification.main(PAPER)
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "scores.json").read_text())["metrics"]}
    assert again == {key: scores[key] for key in again} and again.keys() == {"top1", "top5", "loss"}

    assert {p.name for p in (folder / "model").iterdir()} == {"config.json", "model.safetensors"}
    exported = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert list(exported.pretrained_cfg["input_size"]) == [3, 32, 32]
    assert exported.pretrained_cfg["label_names"] == list("0123456789")
    val = images.open_images(data, "val")
    assert classification.accuracy(exported, val, LIVELY, WORLD)["top1"] == scores["top1"]


def test_demo(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(shipped, "names", lambda _: [])  # with weights that travel along it shows those
    with pytest.raises(run.UserError, match="make reproduce PAPER=shiftvit"):
        classification.demo(PAPER)
    _train(tmp_path / "runs", data)
    classification.demo(PAPER)
    chances = [float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines() if "%  " in line]
    assert len(chances) == 5 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 100.05
    assert Image.open("answer.png").size[0] > 500
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path)])
    with pytest.raises(run.UserError, match="is no picture"):
        classification.demo(PAPER)


@pytest.mark.parametrize("argv, message", [
    (["imagenet_tiny"], "meant for ImageNet-1K: give its folder with --data"),
    (["tiny", "--data", "/nowhere"], "no data folder /nowhere"),
    (["tiny", "--batch", "4000"], "larger than the 1437"),
    (["tiny", "--batch", "31", "--mixup", "0.5"], "even"),
    (["tiny", "--resume", "/nowhere"], "not a run folder"),
    (["tiny", "--device", "cuda"], "no CUDA device"),
    (["tiny", "--model", "shiftvit_huge"], "shiftvit_huge"),
    (["tiny", "--input-size-px", "16"], "--input-size-px 16: shiftvit_micro needs at least 32 px"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        run.door("shiftvit", RECIPES, train)
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_classes_of_the_data_must_be_those_of_the_run(tmp_path, data, monkeypatch):
    folder = _train(tmp_path / "runs", data, stop_at=1)
    other = tmp_path / "other" / "val" / "cat"
    other.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(other / "a.png")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--data", str(tmp_path / "other")])
    with pytest.raises(run.UserError, match="trained on the classes"):
        classification.main(PAPER)


@pytest.mark.parametrize("how, message", BROKEN)
def test_other_classes_in_validation_are_one_line_before_training(tmp_path, how, message):
    root = class_folders(tmp_path / "data")
    break_classes(root, how)
    with pytest.raises(run.UserError, match=message):
        _train(tmp_path / "runs", root)
    assert not (tmp_path / "runs").exists()
    if how == "val lacks one":
        recipe = dataclasses.replace(LIVELY, batch=16)
        folder = _train(tmp_path / "runs", root, recipe, val_classes="subset")
        assert run.load_checkpoint(folder)[2]["classes"] == list("abcd") and 0 <= _scores(folder)["top1"] <= 100


def test_a_hidden_folder_is_no_class(tmp_path):
    break_classes(root := class_folders(tmp_path / "data"), "hidden folder")
    folder = _train(tmp_path / "runs", root, dataclasses.replace(LIVELY, batch=16), stop_at=1)
    assert run.load_checkpoint(folder)[2]["classes"] == list("abcd")


def test_a_run_is_not_resumed_with_other_classes(tmp_path):
    root, recipe = class_folders(tmp_path / "data"), dataclasses.replace(LIVELY, batch=16)
    _train(tmp_path / "runs", root, recipe, stop_at=1)
    for split in ("train", "val"):
        (root / split / "a").rename(root / split / "zz")  # the same number, other labels
    with pytest.raises(run.UserError, match="it learned 'a', the data have 'zz'"):
        _train(tmp_path / "runs", root, recipe, resume="auto")


@pytest.mark.parametrize("args", [{"pretrained": True, "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/y.pth"}},
                                  {"depths": [10**7, 1, 1, 1]}, {"embed_dim": 200_000}, {"embed_dim": 640}])
def test_a_run_folder_of_a_stranger_builds_and_fetches_nothing(tmp_path, data, args):
    folder = _train(tmp_path / "runs", data, stop_at=1)
    config = run.read_json(folder / "config.json")
    config["recipe"]["model_args"] = args
    run.write_json(folder / "config.json", config)
    with pytest.raises(run.UserError, match=r"could fetch|far from what the weights|does not hold what its config"):
        PAPER.load_run(folder)


@pytest.mark.parametrize("closed", ["", "train/c"])
def test_data_without_permission_are_one_line(tmp_path, monkeypatch, closed):
    root, plain = class_folders(tmp_path / "data"), os.scandir

    def scandir(path):  # root may look into any
        if os.fsdecode(path) == str(root / closed) or (not closed and os.fsdecode(path).startswith(str(root))):
            raise PermissionError(13, "Permission denied", os.fsdecode(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(run.UserError, match=f"cannot l.*{closed}.*Permission denied"):
        _train(tmp_path / "runs", root)
