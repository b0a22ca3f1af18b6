"""The claim in miniature: shift, no shift and attention under one recipe; accuracy over epochs and CPU seconds."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from common import run
from common.data.tiny.digits import digits
from common.kernels.shift import shift
from papers.shiftvit import cases, compare, figures
from papers.shiftvit.evaluate import build
from papers.shiftvit.recipes import RECIPES
from papers.shiftvit.train import train

WORLD = run.World(0, 1, torch.device("cpu"), None)


def test_members_differ_in_what_the_claim_is_about_alone():
    recipe = RECIPES["attention"]
    members = {name: compare.member(recipe, name) for name in recipe.compare}
    same = {"model", "model_args", "compare"}
    for one in members.values():
        for field in {f.name for f in dataclasses.fields(recipe)} - same:
            assert getattr(one, field) == getattr(recipe, field), f"one schedule, one augmentation: {field}"
        assert not one.compare
    with torch.device("meta"):
        networks = {name: build(one, 100) for name, one in members.items()}
    params = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert params["shift"] == params["no_shift"] == pytest.approx(params["swin"], rel=0.02)
    x = torch.randn(1, 256, 3, 3)
    for block in (networks["no_shift"].stages[0].blocks[0], networks["no_shift"].stages[3].blocks[0]):
        assert torch.equal(shift(x, block.n_div), x)
    assert not torch.equal(shift(x, networks["shift"].stages[3].blocks[0].n_div), x)
    assert cases.training_cost(recipe).epochs == 9 * recipe.epochs


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    swin = RECIPES["cifar10_cpu_swin"]  # what is cut for the comparison, smaller here
    tiny = swin.model_args | {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
    monkeypatch.setitem(RECIPES, "cifar10_cpu_swin", dataclasses.replace(swin, model_args=tiny))
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "patch_size": 2}
    recipe = dataclasses.replace(
        RECIPES["attention"], model_args=small, dataset="digits", input_size_px=32, epochs=2, warmup_epochs=1,
        batch=480,
    )
    options = run.Options(data=digits(), out=tmp_path, seeds=(5, 6), log_every=1)
    folder = compare.compare("attention", recipe, dataclasses.replace(options, stop_at=3), WORLD, train)
    assert not (folder / "results.json").exists()
    assert compare.compare("attention", recipe, dataclasses.replace(options, resume="auto"), WORLD, train) == folder
    results = json.loads((folder / "results.json").read_text())
    rows = run.by_member(results["metrics"], compare.COLUMNS)
    assert rows.keys() == {"shift", "no_shift", "swin"} and (folder / "attention.png").exists()
    assert results["metrics"][0]["seeds"] == [5, 6] and all(row["cpu_s"]["value"] > 0 for row in rows.values())
    assert rows["shift"]["top1"]["value"] != rows["no_shift"]["top1"]["value"]

    (home,) = folder.glob("seed5/shiftvit/shift/*/")
    steps, seconds, top1 = figures.learning(run.read_log(home))
    assert steps.tolist() == [2, 4] and len(top1) == 2, "an evaluation after every epoch"
    assert 0 < seconds[0] < seconds[1] == json.loads((home / "scores.json").read_text())["cpu_s"]


def test_seconds_between_rows_of_the_log_are_interpolated():
    rows = [{"step": 10, "cpu_s": 1.0}, {"step": 15, "val/top1": 20.0}, {"step": 20, "cpu_s": 3.0, "val/top1": 30.0}]
    np.testing.assert_array_equal(figures.learning(rows), [[15, 20], [2, 3], [20, 30]])


def test_members_that_there_are_not():
    recipe = dataclasses.replace(RECIPES["attention"], compare=("convolution",), dataset="digits")
    with pytest.raises(run.UserError, match=r"no member 'convolution'.*shift, no_shift, swin"):
        compare.compare("attention", recipe, run.Options(), WORLD, train)
