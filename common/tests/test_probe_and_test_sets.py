"""ImageNet's other test sets, and linear probes: evaluate's --test-set and --probe."""

import json
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import run
from common.metrics import classification
from common.metrics.classification.test_sets import Among, open_test_set, synsets

NAMES = synsets()


@dataclass(frozen=True)
class Recipe:
    about: str = ""
    model: str = "brightest"
    dataset: str = "ImageNet-1K"
    input_size_px: int = 4
    eval_crop: float = 1.0
    paper_top1: float | None = 79.4
    paper_source: str | None = "Table 1"


class Network(torch.nn.Module):
    """Its features are each channel's mean and its square, its classes' logits a linear function of them."""

    def __init__(self, classes):
        super().__init__()
        self.head = torch.nn.Linear(6, classes)

    def forward_features(self, x):
        mean = x.mean((2, 3))
        return torch.cat([mean, mean.square()], 1)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


PAPER = classification.Paper("nobody", {"plain": Recipe()}, lambda recipe, n: Network(n), lambda weights, _: weights)


def paint(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)


def evaluate(monkeypatch, tmp_path, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, argv), "--out", str(tmp_path / "scores.json")])
    classification.main(PAPER)
    return {row["name"]: row for row in json.loads((tmp_path / "scores.json").read_text())["metrics"]}


@pytest.fixture
def weights(tmp_path):
    """A network that always says class 7, then 5, then 2: of the thousand."""
    network = Network(1000)
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.full((1000,), -9.0)
    network.head.bias.data[[7, 5, 2]] = torch.tensor([3.0, 2.0, 1.0])
    run.save_weights(tmp_path / "w.safetensors", network.state_dict())
    return tmp_path / "w.safetensors"


def test_the_lists_are_imagenets():
    assert len(NAMES) == 1000 == len({*NAMES}) and sorted(NAMES) == NAMES and NAMES[0] == "n01440764"
    for name in ("imagenet-a", "imagenet-r"):
        assert len(synsets(name)) == 200 and {*synsets(name)} < {*NAMES}
    assert synsets("imagenet-v2") == synsets("imagenet-sketch") == NAMES


def test_v2_has_numbers_for_folders(tmp_path, monkeypatch, weights, capsys):
    for number in (0, 2, 5, 7, 10, 999):  # sorted as texts they stand otherwise
        paint(tmp_path / "v2" / str(number) / "a.png", (1, 2, 3))
    data = open_test_set("imagenet-v2", tmp_path / "v2")
    assert sorted(data.labels) == [0, 2, 5, 7, 10, 999]
    scores = evaluate(monkeypatch, tmp_path, weights, "--recipe", "plain", "--data", tmp_path / "v2", "--test-set",
                      "imagenet-v2")
    assert scores["top1"]["value"] == pytest.approx(100 / 6) and scores["top5"]["value"] >= 50
    assert scores["top1"]["paper_value"] is None and not scores["top1"]["comparable"]
    assert "6 of imagenet-v2's 1000 classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r", "imagenet-sketch"])
def test_among_a_sets_classes_alone(tmp_path, monkeypatch, weights, name):
    own = synsets(name)
    place = {synset: i for i, synset in enumerate(NAMES)}
    logits = torch.arange(1000.0)[None]
    assert Among(torch.nn.Identity(), name)(logits)[0].tolist() == [place[synset] for synset in own]
    folder = tmp_path / name
    for synset in own[:4]:
        paint(folder / synset / "a.png", (1, 2, 3))
    scores = evaluate(monkeypatch, tmp_path, weights, "--recipe", "plain", "--data", folder, "--test-set", name)
    likeliest = next((NAMES[i] for i in (7, 5, 2) if NAMES[i] in own), None)
    if likeliest in own[:4]:
        assert scores["top1"]["value"] == 25
    assert scores["top1"]["value"] in (0, 25)


def test_mistakes(tmp_path, monkeypatch, weights):
    paint(tmp_path / "a" / "cat" / "a.png", (1, 2, 3))
    with pytest.raises(run.UserError, match=r"is not imagenet-r: expected folders of its 200 classes.*found 1.*cat"):
        open_test_set("imagenet-r", tmp_path / "a")
    with pytest.raises(run.UserError, match="imagenet-a: give its folder"):
        open_test_set("imagenet-a", None)
    with pytest.raises(run.UserError, match="exclude one another"):
        evaluate(monkeypatch, tmp_path, weights, "--recipe", "plain", "--probe", "--test-set", "imagenet-a")
    run.write_json(tmp_path / "config.json", {"recipe_name": "plain", "recipe": vars(Recipe())})
    run.save_checkpoint(tmp_path, 1, {"model": Network(2).state_dict()}, {"classes": ["cat", "dog"]})
    paint(tmp_path / "s" / NAMES[0] / "a.png", (1, 2, 3))
    with pytest.raises(run.UserError, match="imagenet-sketch tests networks of ImageNet-1K's classes"):
        evaluate(monkeypatch, tmp_path, tmp_path, "--data", tmp_path / "s", "--test-set", "imagenet-sketch")


def test_a_probe_reads_other_classes_than_were_trained(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for name, color in (("red", (200, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 200))):
            for i in range(count):
                shade = tuple(int(c + rng.integers(-15, 16)) for c in color)
                paint(tmp_path / "data" / split / name / f"{i}.png", shade)
    run.write_json(tmp_path / "config.json", {"recipe_name": "plain", "recipe": vars(Recipe())})
    run.save_checkpoint(tmp_path, 1, {"model": Network(2).state_dict()}, {"classes": ["cat", "dog"]})
    scores = evaluate(monkeypatch, tmp_path, tmp_path, "--data", tmp_path / "data", "--probe")
    assert scores["probe_top1"]["value"] == 100 and not scores["probe_top1"]["comparable"]
    assert "untrained_probe_top1" in scores
    monkeypatch.setattr(Network, "forward_features", lambda self, x: torch.zeros(len(x), 6))
    blind = evaluate(monkeypatch, tmp_path, tmp_path, "--data", tmp_path / "data", "--probe")
    assert blind["probe_top1"]["value"] == pytest.approx(100 / 3)


def test_a_probe_runs_in_one_process(tmp_path):
    world = replace(run.World(0, 1, torch.device("cpu"), None), size=2)
    with pytest.raises(run.UserError, match="one process"):
        classification.probe({"x": Network(2)}, None, None, Recipe(), world)
