"""What a run folder of others may say: its recipe is checked before a network is built from it."""

import dataclasses
import json
from typing import Any, Literal

import pytest
import torch

from common import run
from common.run import recorded


@dataclasses.dataclass(frozen=True)
class Recipe:
    """For the tests."""

    about: str
    lr: float = 0.1
    epochs: int = 3
    mirror: bool = True
    policy: str | None = None
    kind: Literal["a", "b"] = "a"
    scale: tuple[float, float] = (0.1, 1.0)
    milestones: tuple[int, ...] = ()
    head_depth: int = 2
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_a_recipe_of_ours_is_read_back():
    ours = Recipe("x", lr=1, milestones=(3, 4), scores={"a": 1.5}, model_args={"depths": (2, 6), "norm": "bn"})
    read = recorded.recipe(Recipe, json.loads(json.dumps(dataclasses.asdict(ours))))
    assert json.dumps(dataclasses.asdict(read)) == json.dumps(dataclasses.asdict(ours))


@pytest.mark.parametrize("fields, message", [
    ([], "is a list, not an object"),
    (None, "is a NoneType"),
    ({"about": "x", "url": "http://host/x"}, "has a field 'url'"),
    ({"about": 1}, "about is 1, expected"),
    ({"about": "x", "lr": "0.1"}, "lr is '0.1'"),
    ({"about": "x", "epochs": 1.5}, "epochs is 1.5"),
    ({"about": "x", "epochs": True}, "epochs is True"),
    ({"about": "x", "mirror": 1}, "mirror is 1"),
    ({"about": "x", "policy": ["a"]}, "policy is"),
    ({"about": "x", "kind": "c"}, "kind is 'c'"),
    ({"about": "x", "kind": []}, "kind is"),
    ({"about": "x", "scale": [0.1]}, r"scale is \[0.1\]"),
    ({"about": "x", "scale": 1}, "scale is 1"),
    ({"about": "x", "milestones": [1, "2"]}, "milestones is"),
    ({"about": "x", "scores": {"a": "1"}}, "scores is"),
    ({"about": "x", "model_args": {"pretrained": True}}, "'pretrained', which could fetch"),
    ({"about": "x", "model_args": {"pretrained_cfg_overlay": {"url": "http://host/y.pth"}}}, "could fetch"),
    ({"about": "x", "model_args": {"a": {"checkpoint_path": "/x"}}}, "'checkpoint_path'"),
    ({"about": "x", "model_args": {"hf_hub_id": "x/y"}}, "'hf_hub_id'"),
    ({"about": "x", "model_args": {"depths": [10**7, 1]}}, r"model_args.depths is 10000000, far"),
    ({"about": "x", "model_args": {"embed_dim": 200_000}}, "200000, far from what the weights show"),
    ({"about": "x", "head_depth": 10**9}, "head_depth is 1000000000"),
])
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        recorded.recipe(Recipe, fields)


def test_a_network_that_is_not_that_of_the_weights_takes_no_memory():
    weights = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}
    with pytest.raises(run.UserError, match=r"R: weight \[2, 3\], expected \[2, 1000000000000\]; more \[1\], expected"):
        run.built(lambda: torch.nn.Linear(10**12, 2), weights, "R")
    del weights["more"]
    assert not run.built(lambda: torch.nn.Linear(3, 2), weights, "R").training


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"recipe": null}', '{"recipe": {"about": 1}}', "[" * 100_000])
def test_a_damaged_config_is_one_line(tmp_path, text):
    run.save_checkpoint(tmp_path, 1, {"model": {"weight": torch.zeros(1)}}, {"classes": ["a"]})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(run.UserError, match=r"no run of this version: its config.json does not fit"):
        run.load_run(tmp_path, Recipe)


@pytest.mark.parametrize("weights, state", [("other", {}), ("model", {"classes": 3}), ("model", {"classes": [1]})])
def test_so_are_checkpoints_of_others(tmp_path, weights, state):
    run.save_checkpoint(tmp_path, 1, {weights: {"weight": torch.zeros(1)}}, state)
    run.write_json(tmp_path / "config.json", {"recipe": {"about": "x"}})
    with pytest.raises(run.UserError, match="no run of this version"):
        run.load_run(tmp_path, Recipe)


def test_resuming_with_other_classes_is_refused(tmp_path):
    model = torch.nn.Linear(1, 1)
    run.save_checkpoint(tmp_path, 1, {"model": model.state_dict()}, {"classes": ["a", "b", "c"]})
    resume = run.Options(resume=str(tmp_path))
    assert run.restore(tmp_path, resume, classes=["a", "b", "c"], model=model)[0] == 1
    with pytest.raises(run.UserError, match="it learned 'b', the data have 'zz'; give the folder"):
        run.restore(tmp_path, resume, classes=["a", "c", "zz"], model=model)
    with pytest.raises(run.UserError, match="another order"):
        run.restore(tmp_path, resume, classes=["c", "b", "a"], model=model)
