"""sMLPNet's trainer: learns, resumes exactly, follows the image size, and compares mixings."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import timm
import torch

from common import run
from common.data import images
from common.data.tiny.digits import digits
from common.metrics import classification
from common.tests.squares import class_folders
from papers.smlpnet import cases, compare, figures
from papers.smlpnet.evaluate import PAPER, build
from papers.smlpnet.recipes import RECIPES
from papers.smlpnet.train import train

DOOR = lambda: run.door("smlpnet", RECIPES, train, compare.compare)  # noqa: E731
WORLD = run.World(0, 1, torch.device("cpu"), None)
# Every kind of randomness (augmentation, mixup, drop path) and every kind of state, at a size that is not the model's.
LIVELY = dataclasses.replace(
    RECIPES["smoke"], batch=32, epochs=1, warmup_epochs=0.2, policy="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0,
    input_size_px=24, model_args={"embed_dim": 8, "patch_size": 2, "drop_path_rate": 0.3}, ema_decay=0.9,
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


def _results(folder):
    results = json.loads((folder / "results.json").read_text())
    return results | {m["name"]: m["value"] for m in results["metrics"]}


def test_overfits_a_batch(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for label, path in enumerate(sorted((digits() / "val").rglob("*.png"))[::22]):
            target = root / split / str(label)
            target.mkdir(parents=True)
            (target / "0.png").symlink_to(path)
    recipe = dataclasses.replace(RECIPES["sharing"], compare=(), batch=16, epochs=40, label_smoothing=0.0,
                                 lr=3e-2, eval_every=40)
    results = _results(train("tiny", recipe, run.Options(data=root, out=tmp_path), WORLD))
    assert results["top1"] == results["train_top1"] == 100 and results["gap"] == 0 and results["loss"] < 0.2


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data):
    whole = _train(tmp_path / "whole", data)
    for stop in (3, 7):
        parts = _train(tmp_path / "parts", data, stop_at=stop, resume="auto")
        assert not (parts / "results.json").exists()
    assert _train(tmp_path / "parts", data, resume=str(parts), workers=2) == parts
    (_, ours, _), (_, theirs, _) = run.load_checkpoint(whole), run.load_checkpoint(parts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours["ema"]["norm.running_mean"].ne(ours["model"]["norm.running_mean"]).all()  # averaged, and resumed
    assert [row["loss"] for row in run.read_log(whole)] == [row["loss"] for row in run.read_log(parts)]
    assert {p.name: p.read_bytes() for p in whole.glob("mix*.png")} == {
        p.name: p.read_bytes() for p in parts.glob("mix*.png")}


def test_the_image_size_is_the_recipes_everywhere(tmp_path, data, monkeypatch):
    folder = _train(tmp_path, data)
    results = _results(folder)
    assert {p.name for p in folder.glob("*.png")} == {"curves.png", "predictions.png", "mixing_matrices.png"}
    assert not any(m["comparable"] for m in results["metrics"])

    argv = ["evaluate", folder, "--data", data, "--out", tmp_path / "scores.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    classification.main(PAPER)
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "scores.json").read_text())["metrics"]}
    assert again == {key: results[key] for key in ("top1", "top5", "loss")}

    exported = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert classification.accuracy(exported, images.open_images(data, "val"), LIVELY, WORLD)["top1"] == results["top1"]


@pytest.mark.parametrize("main, argv, message", [
    (DOOR, ["tiny", "--input-size-px", "33"], "cannot build smlpnet_micro for 33 px"),
    (DOOR, ["tiny", "--model", "resnet18"], "cannot build resnet18 for 32 px"),
    (DOOR, ["tiny", "--model", "smlpnet_huge"], "knows no model 'smlpnet_huge'"),
    (DOOR, ["sharing", "--compare", "sparse", "diagonal"], "no member 'diagonal'"),
    (lambda: classification.main(PAPER), ["WEIGHTS", "--recipe", "tiny"], "does not fit smlpnet_micro"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, main, argv, message):
    if "WEIGHTS" in argv:  # of a model for larger images
        model = timm.create_model("smlpnet_micro", img_size=64, num_classes=10, **RECIPES["tiny"].model_args)
        run.save_weights(tmp_path / "weights.safetensors", model.state_dict())
        argv = [str(tmp_path / "weights.safetensors"), *argv[1:]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main", *argv])
    with pytest.raises(SystemExit) as exit:
        run.main(main)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and message in line
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run behind"


def test_a_row_matrix_is_drawn_as_one(data):
    model = build(LIVELY, 10)
    first = model.stages[0].blocks[0].smlp
    torch.nn.init.eye_(first.mix_row.weight)
    found = figures.mixing_matrices(model)
    assert list(found) == [f"stage {s}, block {b}" for s, b in ((1, 1), (2, 1), (3, 1), (3, 3), (4, 1))]
    row, column = found["stage 1, block 1"]
    assert torch.equal(row, torch.eye(12)) and torch.equal(column, first.mix_col.weight)
    assert not figures.mixing_matrices(timm.create_model("smlpnet_micro", mixing="dense"))


def test_sharing_goes_on_where_it_was_killed(tmp_path, data):
    recipe = dataclasses.replace(RECIPES["sharing"], epochs=1, batch=96, 
                                 model_args={"embed_dim": 4, "patch_size": 2})
    options = run.Options(data=data, out=tmp_path, seeds=(5, 6))
    folder = compare.compare("sharing", recipe, dataclasses.replace(options, stop_at=2), WORLD, train)
    assert not (folder / "results.json").exists()
    assert compare.compare("sharing", recipe, dataclasses.replace(options, resume="auto"), WORLD, train) == folder
    every = list(folder.glob("seed*/smlpnet/*/*"))
    assert len(every) == 6 and all((home / "results.json").exists() for home in every)

    results = _results(folder)
    one = [_results(p.parent) for p in sorted(folder.glob("seed*/smlpnet/dense/*/results.json"))]
    for key in ("top1", "train_top1", "gap"):
        assert results[f"dense {key}"] == pytest.approx(sum(r[key] for r in one) / 2)
    assert one[0]["seed"] == 5 and results["metrics"][0]["seeds"] == [5, 6] and results["metrics"][0]["spread"] >= 0
    assert results["sparse params"] < results["unshared params"] < results["dense params"]
    assert results["sparse flops"] == results["unshared flops"] < results["dense flops"]
    table = run.table(results["metrics"], compare.COLUMNS, "mixing")
    assert (folder / "sharing.png").exists() and table in (folder / "report.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_training_can_be_planned(name):
    work, size = cases.training_cost(RECIPES[name]), RECIPES[name].input_size_px
    assert work.model(*work.inputs).shape[0] == 1 and work.model.patch_embed.img_size == (size, size)


@pytest.mark.slow
def test_processes_average_their_running_statistics(tmp_path, data):
    key, means = "stages.0.blocks.0.local.norm.running_mean", []
    for processes in (1, 2):
        launch = ["-m"] if processes == 1 else ["-m", "common.run.launch", "2"]
        command = [sys.executable, *launch, "papers.smlpnet.train", "smoke", "--out", tmp_path / str(processes),
                   "--data", data, "--batch", "32", "--stop-at", "1", "--device", "cpu"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([str(word) for word in command], check=True, env=one_thread, cwd=run.ROOT, capture_output=True)
        (folder,) = (tmp_path / str(processes)).glob("smlpnet/smoke/*")
        means.append(run.load_checkpoint(folder)[1]["model"][key])
    # the mean over the whole batch, not over the first process's half of it
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-6)


def test_an_unreadable_training_picture_is_left_out_of_the_accuracy_on_them(tmp_path, capsys):
    root = class_folders(tmp_path / "data")
    (root / "train" / "c" / "3.png").write_bytes(b"damaged")
    folder = _train(tmp_path / "runs", root, dataclasses.replace(LIVELY, batch=16, train_accuracy=True))
    scores = {m["name"]: m["value"] for m in run.read_json(folder / "results.json")["metrics"]}
    assert "1 of 32 images cannot be read, and are left out" in capsys.readouterr().err
    assert scores["train_top1"] * 31 / 100 == pytest.approx(round(scores["train_top1"] * 31 / 100), abs=1e-6)
