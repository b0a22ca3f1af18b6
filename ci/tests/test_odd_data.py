"""Folders of pictures as they come, through every trainer that takes them."""

import dataclasses
import os

import pytest
import torch
from PIL import Image

from common import run
from common.tests.squares import BROKEN, break_classes, class_folders
from papers.dualtfr import pretrain as dualtfr
from papers.dualtfr.recipes import RECIPES as DUALTFR
from papers.sbt import pretrain as sbt
from papers.sbt.recipes import RECIPES as SBT
from papers.shiftvit import train as shiftvit
from papers.shiftvit.recipes import RECIPES as SHIFTVIT
from papers.smlpnet import train as smlpnet
from papers.smlpnet.recipes import RECIPES as SMLPNET
from papers.spach import train as spach
from papers.spach.recipes import RECIPES as SPACH

WORLD = run.World(0, 1, torch.device("cpu"), None)
TRAINERS = {
    "shiftvit": (shiftvit.train, SHIFTVIT["smoke"]), "smlpnet": (smlpnet.train, SMLPNET["smoke"]),
    "spach": (spach.train, SPACH["smoke"]), "sbt": (sbt.train, SBT["pretrain_tiny"]),
    "dualtfr": (dualtfr.train, DUALTFR["pretrain_tiny"]),
}


def _train(paper, out, data, **options):
    train, recipe = TRAINERS[paper]
    recipe = dataclasses.replace(recipe, batch=16, epochs=2)
    return train("smoke", recipe, run.Options(data=data, out=out, log_every=1, **options), WORLD)


@pytest.mark.parametrize("paper", TRAINERS)
@pytest.mark.parametrize("how, message", BROKEN)
def test_other_classes_in_validation_are_one_line_before_training(tmp_path, paper, how, message):
    break_classes(root := class_folders(tmp_path / "data"), how)
    with pytest.raises(run.UserError, match=message):
        _train(paper, tmp_path / "runs", root)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("paper", TRAINERS)
def test_a_damaged_validation_picture_costs_no_step(tmp_path, paper):
    """It is met where the first epoch is evaluated, and the epoch has been saved by then."""
    root = class_folders(tmp_path / "data")
    whole = (root / "val/a/0.png").read_bytes()
    (root / "val/a/0.png").write_bytes(whole[:40])
    with pytest.raises(run.UserError, match=r"cannot evaluate: .*0\.png is unreadable"):
        _train(paper, tmp_path / "runs", root)
    (folder,) = (tmp_path / "runs").glob("*/smoke/*")
    assert run.load_checkpoint(folder)[0] == 2 and not run.finished(folder)
    (root / "val/a/0.png").write_bytes(whole)
    assert _train(paper, tmp_path / "runs", root, resume="auto") == folder and run.finished(folder)
    assert [row["step"] for row in run.read_log(folder) if "val/top1" in row] == [2, 4]


def test_odd_names_of_classes_and_of_damaged_files(tmp_path):
    """Drawn as they are written; and a line of unreadable.txt is one, whatever the file is called."""
    root = class_folders(tmp_path / "data", train=30)
    for split in ("train", "val"):
        (root / split / "a").rename(root / split / "under_$10_or_$20_each")
        (root / split / "b").rename(os.fsdecode(os.fsencode(root / split) + b"/caf\xe9"))
    damaged = root / "train/c" / os.fsdecode(b"caf\xe9\nssh-ed25519 AAAA evil\n.png")
    damaged.write_bytes(b"no picture")
    folder = _train("shiftvit", tmp_path / "runs", root)
    assert run.finished(folder)
    with Image.open(folder / "predictions.png") as drawn:
        assert drawn.width > 500
    (line,) = (folder / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert r"caf\xe9\nssh-ed25519 AAAA evil\n.png" in line
    assert sorted(run.load_checkpoint(folder)[2]["classes"]) == [r"caf\xe9", "c", "d", "under_$10_or_$20_each"]
