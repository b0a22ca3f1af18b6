"""SPACH's trainer: learns, resumes exactly, averages shared mixers rightly, follows the image size, and fights."""

import dataclasses
import itertools
import json
import math
import sys

import pytest
import timm
import torch

from common import run
from common.data import images
from common.data.tiny.digits import digits
from common.metrics import classification
from common.tests.squares import class_folders
from papers.spach import cases, compare, figures
from papers.spach.evaluate import PAPER, build
from papers.spach.model import VARIANTS, SpatialMLP
from papers.spach.recipes import RECIPES
from papers.spach.train import train

DOOR = lambda: run.door("spach", RECIPES, train, compare.compare)  # noqa: E731
WORLD = run.World(0, 1, torch.device("cpu"), None)
# Every kind of randomness (augmentation, mixup, drop path) and every kind of state (conv4's BatchNorm), at a size that
# is not the model's.
SMALL = {"embed_dim": 8, "patch_size": 2, "stages": ((("conv", 1),), (("attn", 1), ("mlp", 1)))}
LIVELY = dataclasses.replace(
    RECIPES["smoke"], batch=32, epochs=1, warmup_epochs=0.2, policy="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0,
    input_size_px=24, model_args={**SMALL, "stem": "conv4", "drop_path_rate": 0.3}, ema_decay=0.9,
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


@pytest.mark.parametrize("mixer", ["conv", "attn", "mlp"])
def test_overfits_a_batch(tmp_path, mixer):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for label, path in enumerate(sorted((digits() / "val").rglob("*.png"))[::22]):
            target = root / split / str(label)
            target.mkdir(parents=True)
            (target / "0.png").symlink_to(path)
    recipe = dataclasses.replace(compare.member(RECIPES["battle"], mixer, 8), batch=16, epochs=40, label_smoothing=0.0,
                                 lr=0.1, eval_every=40)
    folder = train("tiny", recipe, run.Options(data=root, out=tmp_path, log_every=1), WORLD)
    results = _results(folder)
    assert run.read_log(folder)[0]["loss"] == pytest.approx(math.log(17), abs=1e-4)  # the head starts at zero
    assert results["top1"] == results["train_top1"] == 100 and results["gap"] == 0 and results["loss"] < 1


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data):
    whole = _train(tmp_path / "whole", data)
    for stop in (3, 7):
        parts = _train(tmp_path / "parts", data, stop_at=stop, resume="auto")
        assert not (parts / "results.json").exists()
    assert _train(tmp_path / "parts", data, resume=str(parts), workers=2) == parts
    (_, ours, _), (_, theirs, _) = run.load_checkpoint(whole), run.load_checkpoint(parts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [row["loss"] for row in run.read_log(whole)] == [row["loss"] for row in run.read_log(parts)]


def test_the_average_moves_shared_mixers_once_a_step(tmp_path, data):
    stages = ((("conv", 1),), (("attn", 3),))
    recipe = dataclasses.replace(LIVELY, ema_decay=0.75, warmup_epochs=0.0,
                                 model_args={**SMALL, "stages": stages, "share_mixers": True})
    weights = []
    for stop in (1, 2, 3):
        folder = _train(tmp_path, data, recipe, stop_at=stop, resume="auto", checkpoint_every=1)
        weights.append(run.load_checkpoint(folder)[1])
    assert torch.equal(weights[0]["ema"]["head.fc.weight"], weights[0]["model"]["head.fc.weight"])
    for before, now in itertools.pairwise(weights):
        for name, tensor in now["ema"].items():
            expected = 0.75 * before["ema"][name] + 0.25 * now["model"][name]
            torch.testing.assert_close(tensor, expected, msg=lambda text, name=name: f"{name}: {text}")
    mixer = "stages.1.blocks.{}.mixer.qkv.weight"
    assert torch.equal(*(weights[2]["ema"][mixer.format(block)] for block in (0, 2)))
    assert not torch.equal(weights[2]["ema"][mixer.format(0)], weights[2]["model"][mixer.format(0)])


def test_the_image_size_is_the_recipes_everywhere(tmp_path, data, monkeypatch):
    recipe = dataclasses.replace(LIVELY, model_args={**LIVELY.model_args, "stages": ((("conv", 1),), (("mlp", 2),)),
                                                     "share_mixers": True})
    folder = _train(tmp_path, data, recipe)
    results = _results(folder)
    assert {p.name for p in folder.glob("*.png")} == {"curves.png", "predictions.png", "receptive_field.png"}
    assert not any(m["comparable"] for m in results["metrics"])

    argv = ["evaluate", folder, "--data", data, "--out", tmp_path / "scores.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    classification.main(PAPER)
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "scores.json").read_text())["metrics"]}
    assert again == {key: results[key] for key in ("top1", "top5", "loss")}

    exported = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert classification.accuracy(exported, images.open_images(data, "val"), recipe, WORLD)["top1"] == results["top1"]


@pytest.mark.parametrize("main, argv, message", [
    (DOOR, ["tiny", "--input-size-px", "8"], "cannot build spach_ms_micro_patch4_attn for 8 px"),
    (DOOR, ["tiny", "--model", "resnet18"], "cannot build resnet18 for 32 px"),
    (DOOR, ["tiny", "--model", "spach_huge"], "knows no model 'spach_huge'"),
    (DOOR, ["battle", "--compare", "conv", "conv_bare"], "no member 'conv_bare'"),
    (lambda: classification.main(PAPER), ["WEIGHTS", "--recipe", "tiny"], "does not fit spach_ms_micro"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, main, argv, message):
    if "WEIGHTS" in argv:  # of a model for larger images
        model = build(dataclasses.replace(RECIPES["tiny"], input_size_px=64), 10)
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


def test_what_each_mixing_sees():
    torch.manual_seed(0)
    stages = ((("conv", 1),), (("conv", 1),), (("attn", 1),), (("mlp", 1),))
    model = timm.create_model("spach_ms_micro_patch4_attn", img_size=64, stages=stages, patch_size=2, embed_dim=8)
    seen = list(figures.receptive_field(model, torch.randn(3, 3, 64, 64)))
    assert [figures.describe(block).split(",")[0] for _, block, _ in seen] == ["conv", "conv", "attn", "mlp"]
    near = seen[0][0].nonzero()  # 3x3 tokens of two pixels around token 16, 16
    assert near.min() == 30 and near.max() == 35 and len(near) == 36
    assert all(energy.ne(0).all() for energy, _, _ in seen[2:])
    conv, attention, mlp = (weight for _, _, weight in seen[1:])
    assert conv.nonzero().tolist() == [[y, x] for y in (7, 8, 9) for x in (7, 8, 9)]
    assert attention.shape == (8, 8) and attention.sum().item() == pytest.approx(1)
    assert mlp.shape == (4, 4)


def test_a_battle_goes_on_where_it_was_killed(tmp_path, data):
    recipe = dataclasses.replace(RECIPES["battle"], epochs=1, batch=96, widths=(8, 16),
                                 compare=("conv", "mlp", "mlp_shared"), input_size_px=16)
    options = run.Options(data=data, out=tmp_path, seeds=(5, 6))
    folder = compare.compare("battle", recipe, dataclasses.replace(options, stop_at=2), WORLD, train)
    assert not (folder / "results.json").exists()
    assert compare.compare("battle", recipe, dataclasses.replace(options, resume="auto"), WORLD, train) == folder
    every = sorted(folder.glob("seed*/spach/*/*"))
    assert len(every) == 12 and all((home / "results.json").exists() for home in every)

    results = _results(folder)
    one = [_results(home) for home in sorted(folder.glob("seed*/spach/mlp-16/*"))]
    assert [r["seed"] for r in one] == [5, 6] == results["metrics"][0]["seeds"]
    for key in ("top1", "train_top1", "gap"):
        assert results[f"mlp-16 {key}"] == pytest.approx(sum(r[key] for r in one) / 2)
    assert results["mlp-8 params"] < results["mlp-16 params"] == results["params"]
    assert run.table(results["metrics"], compare.COLUMNS, "network-width") in (folder / "report.md").read_text()
    assert {p.name for p in folder.glob("*.png")} == {"battle.png", "receptive_field.png"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_training_can_be_planned(name):
    work, size = cases.training_cost(RECIPES[name]), RECIPES[name].input_size_px
    mixers = {type(block.mixer) for stage in work.model.stages for block in stage.blocks}
    assert work.model(*work.inputs).shape[0] == 1 and work.inputs[0].shape[2:] == (size, size)
    assert work.model.stem.img_size == ((size, size) if SpatialMLP in mixers else None)


def test_there_is_a_recipe_for_every_network_of_the_paper():
    models = {recipe.model for name, recipe in RECIPES.items() if name.startswith("imagenet_")}
    assert models == {name for name in VARIANTS if "micro" not in name and "mini" not in name}
    assert all(recipe.model_args["drop_path_rate"] == 0.1 for name, recipe in RECIPES.items() if "imagenet_" in name)


def test_an_unreadable_training_picture_is_left_out_of_the_accuracy_on_them(tmp_path, capsys):
    root = class_folders(tmp_path / "data")
    (root / "train" / "c" / "3.png").write_bytes(b"damaged")
    folder = _train(tmp_path / "runs", root, dataclasses.replace(LIVELY, batch=16, train_accuracy=True))
    scores = {m["name"]: m["value"] for m in run.read_json(folder / "results.json")["metrics"]}
    assert "1 of 32 images cannot be read, and are left out" in capsys.readouterr().err
    assert scores["train_top1"] * 31 / 100 == pytest.approx(round(scores["train_top1"] * 31 / 100), abs=1e-6)
