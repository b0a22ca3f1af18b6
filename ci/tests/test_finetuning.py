"""Every classifier can be fine-tuned on somebody's own few pictures: --init, twenty pictures, two classes."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import run

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSIFIERS = [("shiftvit", "tiny"), ("smlpnet", "tiny"), ("spach", "tiny"), ("sbt", "pretrain_tiny"),
               ("dualtfr", "pretrain_tiny")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eight pictures of each class to learn from and two to judge by: dark ones with a bright part left or right."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for side, name in enumerate(("left", "right")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (48, 48, 3), dtype=np.uint8)
                pixels[:, side * 24 : side * 24 + 24] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def _paper(paper: str):
    name = "evaluate" if paper in ("shiftvit", "smlpnet", "spach") else "pretrain"
    return importlib.import_module(f"papers.{paper}.{name}").PAPER


@pytest.mark.parametrize(("paper", "recipe"), CLASSIFIERS)
def test_all_but_the_classifier_is_taken_over(paper, recipe, tmp_path, capsys):
    known = _paper(paper)
    recipe = known.recipes[recipe]
    torch.manual_seed(0)
    ten, two = known.build(recipe, 10), known.build(recipe, 2)
    run.save_weights(tmp_path / "ten.safetensors", ten.state_dict())
    known.start_from(str(tmp_path / "ten.safetensors"), two)
    found, before = two.state_dict(), ten.state_dict()
    differ = {name for name, tensor in found.items() if not torch.equal(tensor, before[name])}
    last = {id(p) for p in two.get_classifier().parameters()}
    assert differ <= {name for name, p in two.named_parameters() if id(p) in last} and differ
    assert "at random stay" in capsys.readouterr().out
    again = known.build(recipe, 10)
    known.start_from(str(tmp_path / "ten.safetensors"), again)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(run.UserError, match="does not fit this model"):
        known.start_from(str(tmp_path / "ten.safetensors"), known.build(replace(recipe, model_args=_OTHER[paper]), 2))


_OTHER = {  # networks that differ in more than their classes
    "shiftvit": {"embed_dim": 24}, "smlpnet": {"embed_dim": 64}, "spach": {"embed_dim": 64},
    "sbt": {"mlp_ratios": (3, 3, 3, 3)}, "dualtfr": {"mlp_ratio": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(("paper", "recipe"), CLASSIFIERS[:3])
def test_twenty_pictures_of_two_classes(paper, recipe, pictures, tmp_path):
    """The command of the papers' READMEs."""
    known = _paper(paper)
    run.save_weights(tmp_path / "ten.safetensors", known.build(known.recipes[recipe], 10).state_dict())
    words = f"{recipe} --init {tmp_path}/ten.safetensors --data {pictures} --batch 8 --epochs 10 --warmup-epochs 1"
    done = subprocess.run(
        [sys.executable, "-m", f"papers.{paper}", *words.split(), "--device", "cpu", "--out", str(tmp_path / "runs")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "starts from" in done.stdout and len(list(tmp_path.glob(f"runs/{paper}/{recipe}/*/results.json"))) == 1
