"""Accuracy by hand, and over two processes; what an evaluation calls comparable."""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import run
from common.data import images
from common.data.tiny.digits import digits
from common.metrics import classification
from common.metrics.classification import Accuracy, paper

LOGITS = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1, 0]])
TARGET = torch.tensor([0, 1, 1])  # first; beaten by five; second


def test_by_hand():
    accuracy = Accuracy()
    accuracy.update(LOGITS, TARGET)
    scores = accuracy.compute(3)
    assert scores["top1"] == pytest.approx(100 / 3) and scores["top5"] == pytest.approx(200 / 3)
    loss = -LOGITS.log_softmax(1)[range(3), TARGET].mean().item()
    assert math.isclose(scores["loss"], loss, rel_tol=1e-6)


def test_outputs_that_are_not_finite_count_as_wrong():
    accuracy = Accuracy()
    accuracy.update(torch.full((2, 10), torch.nan), torch.tensor([0, 3]))
    assert accuracy.compute(2)["top1"] == accuracy.compute(2)["top5"] == 0


def test_fewer_than_five_classes():
    accuracy = Accuracy()
    accuracy.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert accuracy.compute(1)["top1"] == 0 and accuracy.compute(1)["top5"] == 100


def test_missing_samples_are_an_error():
    accuracy = Accuracy()
    accuracy.update(LOGITS, TARGET)
    with pytest.raises(RuntimeError, match="3 samples, but the data hold 4"):
        accuracy.compute(4)


def _process(rank, port, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    accuracy = Accuracy()
    accuracy.update(LOGITS[rank::2], TARGET[rank::2])  # two samples and one: nothing is padded
    queue.put(accuracy.compute(3))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, args=(free_port, queue), nprocs=2)
    accuracy = Accuracy()
    accuracy.update(LOGITS, TARGET)
    assert queue.get() == queue.get() == pytest.approx(accuracy.compute(3))


# Evaluation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    about: str = ""
    model: str = "linear"
    dataset: str = "digits"
    input_size_px: int = 8
    eval_crop: float = 1.0
    epochs: int = 300
    sides: tuple[int, ...] = (1, 2)
    paper_top1: float | None = 79.4
    paper_source: str | None = "Table 1"


def build(recipe, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * recipe.input_size_px**2, classes))


def rename(weights, model):
    """As the authors call their tensors."""
    return {name.replace("head.", "1."): tensor for name, tensor in weights.items()}


PAPER = classification.Paper("nobody", {"plain": Recipe()}, build, rename)
WEIGHTS = build(Recipe(), 10).state_dict()


@pytest.fixture
def sizes(monkeypatch):
    """The digits pass for ImageNet."""
    train, val = (images.open_images(digits(), split) for split in ("train", "val"))
    monkeypatch.setattr(paper, "IMAGENET", (len(train), len(val)))
    return train, val


def evaluated(monkeypatch, folder, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, argv), "--out", str(folder / "scores.json")])
    classification.main(PAPER)
    return json.loads((folder / "scores.json").read_text())["metrics"][0]["comparable"]


@pytest.mark.parametrize("changes, fewer, comparable", [
    ({}, 0, True), ({"epochs": 1}, 0, False), ({}, 1, False), ({"paper_top1": None}, 0, False),
])
def test_an_evaluation_of_a_run_asks_what_its_training_asked(
    tmp_path, monkeypatch, sizes, changes, fewer, comparable
):
    train, val = sizes
    recipe = replace(Recipe(), **changes)
    run.write_json(tmp_path / "config.json", {"recipe_name": "plain", "recipe": asdict(recipe)})
    run.save_checkpoint(tmp_path, 5, {"model": WEIGHTS}, {"classes": list(val.classes)})
    assert not evaluated(monkeypatch, tmp_path, tmp_path)  # a run without results says nothing of itself
    said = PAPER.comparable("plain", recipe, range(len(train) - fewer), val)
    assert said == comparable
    rows = classification.metrics({"top1": 50.0}, recipe, said)
    run.write_json(tmp_path / "results.json", {"metrics": rows})
    assert evaluated(monkeypatch, tmp_path, tmp_path) == comparable
    monkeypatch.setattr(paper, "IMAGENET", (len(train), len(val) + 1))  # now on a part of the images
    assert not evaluated(monkeypatch, tmp_path, tmp_path)


def test_of_files_of_weights_the_authors_alone_are_comparable(tmp_path, monkeypatch, sizes):
    file = tmp_path / "w.safetensors"
    for prefix, comparable in (("1.", False), ("head.", True)):
        run.save_weights(file, {name.replace("1.", prefix): tensor for name, tensor in WEIGHTS.items()})
        assert evaluated(monkeypatch, tmp_path, file, "--recipe", "plain") == comparable
    monkeypatch.setattr(paper, "IMAGENET", (1_281_167, 50_000))
    assert not evaluated(monkeypatch, tmp_path, file, "--recipe", "plain")


def test_classes_that_differ_are_named_alone(tmp_path, capsys):
    many = [f"class{i:04d}" for i in range(1000)]

    def of_classes(names):
        return paper.of_classes(tmp_path, many, images.Images(["a"], [len(names) - 1], names))

    assert of_classes(many).labels == 999
    with pytest.raises(run.UserError, match=r"1000 there, 1000 here\): the data lack class0007, and have besides cat;"):
        of_classes(sorted([*many[:7], *many[8:], "cat"]))
    assert not capsys.readouterr().err
    assert of_classes(many[990:0:-1]).labels == 1, "numbered by the run's classes"
    assert "the data lack class0000, class0991, class0992, class0993, class0994 and 5 more" in capsys.readouterr().err
