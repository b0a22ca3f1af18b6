"""Runs that lose nothing: odd boxes, phrases and captions, damaged indices and model folders."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from common import run
from common.data.loader import Augmented, identity
from common.data.picture import Unreadable
from common.data.tiny.scenes import scenes
from common.run import ROOT, UserError
from papers.mm_gem import build, train
from papers.mm_gem.data import Rows, corners, open_captions, open_regions
from papers.mm_gem.embedder import Embedder, Files, load
from papers.mm_gem.evaluate import Validation
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.recipes import RECIPES

WORLD = run.World(0, 1, torch.device("cpu"), None)
SMOKE = dataclasses.replace(RECIPES["smoke"], batch=16, steps=2, image_steps=1, eval_rows=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(train=64, val=16, root=tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def embedder():
    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    return Embedder(build.model(RECIPES["tiny"], processor).eval(), processor)


def _changed(root, kind, split, change):
    """The annotations of the second image of a split, as `change` makes them."""
    path = root / "annotations" / f"{kind}_{split}.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        if entry["image_id"] == content["images"][1]["id"]:
            entry |= change
    path.write_text(json.dumps(content))
    return f"{split}/{content['images'][1]['file_name']}"


@pytest.mark.parametrize("change, message", [
    ({"bbox": [5000, 0, 40, 40]}, r"box \[5000, 0, 5040, 40\] holds nothing of the image of 64 x 64 px"),
    ({"bbox": [0, -90, 40, 40]}, r"box \[0, -90, 40, -50\] holds nothing of the image of 64 x 64 px"),
    ({"phrase": " "}, "an empty phrase"),
])
def test_a_region_of_nothing_is_a_bad_sample(tmp_path, data, embedder, change, message):
    root = shutil.copytree(data, tmp_path / "data")
    name = _changed(root, "instances", "train", change)
    regions = open_regions(root, "train")
    rows = Rows(open_captions(root, "train"), regions)
    bad = next(i for i, region in enumerate(regions) if str(region.image).endswith(name)) + len(rows.images)
    with pytest.raises(Unreadable, match=message):
        rows[bad]
    (image, box, _), _ = Augmented(rows, identity, report=tmp_path / "unreadable.txt", limit=0.1)[bad, 1]
    assert image.size == (64, 64) and box[0] < 64, "its neighbor"
    (line, *_) = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert re.search(rf"{name} \(box .*\)\t{message}", line)

    name = _changed(root, "instances", "val", change)
    with pytest.raises(UserError, match=name):
        shown = Validation.of(open_captions(root, "val"), open_regions(root, "val"), 16)
        embedder.regions(Files(shown.files, shown.boxes), shown.boxes)


def test_a_run_passes_over_such_regions(tmp_path):
    root = scenes(train=64, val=16, root=tmp_path / "scenes")
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [5000, 0, 40, 40]
    path.write_text(json.dumps(content))
    recipe = dataclasses.replace(SMOKE, image_steps=0, steps=len(content["annotations"]) // 8)
    folder = train.train("smoke", recipe, run.Options(data=root, out=tmp_path), WORLD)
    assert "box [5000, 0, 40, 40]" in (folder / "unreadable.txt").read_text()
    assert len({path.stat().st_mode for path in (folder / "model").iterdir()}) == 1


def test_an_empty_caption_is_found_before_the_training(tmp_path, data):
    root = shutil.copytree(data, tmp_path / "data")
    name = _changed(root, "captions", "val", {"caption": " \n"})
    with pytest.raises(UserError, match=rf"cannot evaluate: .*{name} has an empty caption"):
        train.train("smoke", dataclasses.replace(SMOKE, eval_rows=16), run.Options(data=root, out=tmp_path), WORLD)
    assert not (tmp_path / "mm_gem").exists()


def test_boxes_of_a_file_are_looked_at_as_it_is_opened(data):
    region = open_regions(data, "val")[0]
    assert Files([region.image], [[corners(region)]])[0].size == (64, 64)
    with pytest.raises(UserError, match=rf"{region.image}: box \[64, 0, 99, 9\] holds nothing of the image"):
        Files([region.image], [[corners(region), (64, 0, 99, 9)]])[0]


@pytest.mark.parametrize("part, message", [
    ({"model_type": "timm_wrapper", "architecture": "hf-hub:attacker/model", "num_classes": 2}, "hf-hub:attacker"),
    ({"model_type": "no_such"}, "model_type 'no_such'"),
])
def test_a_config_that_names_what_is_not_here_is_refused(embedder, tmp_path, monkeypatch, part, message):
    embedder.model.save_pretrained(tmp_path)
    embedder.processor.save_pretrained(tmp_path)
    assert isinstance(load(tmp_path, WORLD).model, MMGEMModel)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": part}))
    monkeypatch.setattr("timm.create_model", None)
    with pytest.raises(UserError, match=message):
        load(tmp_path, WORLD)
    with pytest.raises(UserError, match=message):
        build.continued(dataclasses.replace(SMOKE, init=str(tmp_path)), embedder.processor, torch.float32)


def _command(out, data, *words, processes=1, switches=()):
    launch = ["-m", "common.run.launch", str(processes)] if processes > 1 else [*switches, "-m"]
    fields = ["--device", "cpu", "--log-every", "1", "--batch", "16", "--eval-rows", "4", "--steps", "4",
              "--image-steps", "2", "--checkpoint-every", "1", "--resume", "auto"]
    command = [sys.executable, *launch, "papers.mm_gem", "smoke", "--data", str(data), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *fields, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((out / "mm_gem" / "smoke").iterdir()), done.stderr


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, data):
    alone, _ = _command(tmp_path / "alone", data)
    for stop, processes in ((1, 1), (2, 2), (3, 2), (0, 1)):
        folder, _ = _command(tmp_path / "parts", data, "--stop-at", str(stop), processes=processes)
    assert len(list((tmp_path / "parts" / "mm_gem" / "smoke").iterdir())) == 1
    losses = [[row["loss"] for row in run.read_log(each) if "loss" in row] for each in (alone, folder)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.long
def test_a_deepspeed_recipe_runs_without_a_launcher(tmp_path, data):
    folder, _ = _command(tmp_path, data, "--deepspeed", "zero2", "--stop-at", "1")
    assert _command(tmp_path, data, "--deepspeed", "zero2")[0] == folder and (folder / "results.json").exists()


@pytest.mark.long
def test_no_file_is_read_or_written_in_the_locales_encoding(tmp_path, data):
    """Of this repository; packages have such warnings of their own."""
    _, said = _command(tmp_path, data, switches=["-X", "warn_default_encoding"])
    assert not [line for line in said.splitlines() if re.search(r"(common|papers)/.*EncodingWarning", line)]
