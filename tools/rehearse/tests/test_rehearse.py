"""The rehearsal must be able to say no: a known-bad set, each of which it names."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import posterize
from torch import nn

from common import run
from common.data import images, loader
from common.data.video import open_videos
from common.run.cases import Curve, Rehearsal, TrainingCost
from tools.rehearse import cost, curve, data, layouts, walk

SAMPLES = 6400


@dataclass(frozen=True)
class Recipe:
    flaw: str = ""
    milestones: tuple[int, ...] = (80,)
    epochs: int = 100
    batch: int = 64
    width: int = 8
    dataset: str = "toy"


class Noise:
    """Pictures and labels of a toy data set."""

    classes = ["a", "b", "c"]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return Image.fromarray(np.full((40, 48, 3), index, np.uint8)), index % 3

    def name(self, index):
        return str(index)


def train(name, recipe, options, world):
    """A trainer like those of the papers, with a flaw that its recipe names."""
    pictures = Noise()
    per_epoch = loader.steps_per_epoch(len(pictures), recipe.batch)
    run.seed_all(options.seed)
    network = nn.Sequential(nn.Conv2d(3, recipe.width, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(network, nn.Linear(recipe.width, 3)).to(world.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    folder = run.open_run("toy", name, recipe, options, world)
    start, _ = run.restore(folder, options, optimizer, model=model)
    clock = run.Clock(options, steps=recipe.epochs * per_epoch, batch=recipe.batch, per_epoch=per_epoch, start=start)
    batches = loader.train_loader(
        pictures, images.train_transform(32), recipe.batch, clock.end, seed=0, world=world.size,
    )
    log = run.Log(folder, world, steps=clock.steps, start=start)
    for step, (pixels, labels) in clock.over(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.1 ** sum(step > epoch * per_epoch for epoch in recipe.milestones)
        pixels, labels = pixels.to(world.device), labels.to(world.device)
        total = torch.zeros((), device="cpu" if recipe.flaw == "left on the CPU" else world.device)
        for weight, x, y in run.micro_batches(model, 1, pixels, labels):
            with world.autocast():
                logits = model(x)
            each = F.cross_entropy(logits.float(), y, reduction="none")
            if recipe.flaw == "picks":
                each = each[y > 0]
            part = weight * each.mean()
            if recipe.flaw == "left on the CPU":
                part = part + torch.zeros(3).mean(0, keepdim=True)
            if recipe.flaw == "item" and part.item() > 100:
                break
            if recipe.flaw == "to the CPU":
                part.detach().cpu()
            part.sum().backward()
            total = total + part.detach() if recipe.flaw != "left on the CPU" else total
        run.clip_gradients(model.parameters(), 0.0, step=step, loss=total, folder=folder)
        optimizer.step()
        optimizer.zero_grad()
        clock.stop()
    log.close(clock.farewell(folder))
    return folder


def rehearsed(tmp_path, recipe: Recipe = Recipe()) -> walk.Row:
    with torch.device("meta"):
        counted = TrainingCost(nn.Linear(4, 4), (torch.empty(1, 4),), SAMPLES, recipe.epochs, recipe.batch)
    work = Rehearsal(train, recipe, SAMPLES, Curve(0.1, "steps", drops=(80,), epochs=100))
    return walk.judge("toy", "recipe", work, counted, tmp_path)


def test_a_sound_recipe_is_ready(tmp_path):
    row = rehearsed(tmp_path)
    assert not row.why_not, row.why_not
    assert row.shown.steps == 100 * (SAMPLES // 64) and row.shown.batch == 8
    assert row.rates.startswith("0.1 at epoch 0, 0.1 at epoch") and row.rates.endswith("0.01 at epoch 99.99")


@pytest.mark.parametrize(("flaw", "said"), [
    ("left on the CPU", "mixes devices"), ("item", "waits for the device"), ("picks", "waits for the device"),
    ("to the CPU", "waits for the device"),
])
def test_what_a_device_would_stumble_on_is_named(flaw, said, tmp_path):
    assert said in rehearsed(tmp_path, Recipe(flaw)).why_not


def test_a_wrong_drop_is_named(tmp_path):
    why = rehearsed(tmp_path, Recipe(milestones=(70,))).why_not
    assert why.startswith("learning rate 0.01 at step 8,000 (epoch 79.99); the paper's is 0.1"), why
    assert "60 epochs; the paper's are 100" in rehearsed(tmp_path, Recipe(epochs=60)).why_not


def test_a_batch_that_does_not_fit_is_named(tmp_path):
    why = rehearsed(tmp_path, Recipe(width=4_000_000)).why_not
    assert "do not fit into a card of 80 GB at 8 samples" in why, why


def test_the_blocker_of_randaugment_is_named(monkeypatch):
    """Posterize to 0 bits, which Pillow refuses, ended ImageNet trainings in their eighth epoch."""
    samples = loader.Augmented(Noise(), images.train_transform(32, policy="rand-m10-inc1"))
    assert data.look(samples, 60)[1] == []
    monkeypatch.setattr(images, "_posterize", posterize)
    samples = loader.Augmented(Noise(), images.train_transform(32, policy="rand-m10-inc1"))
    _, wrong = data.look(samples, 60)
    assert wrong and all("ValueError: bits must be" in line for line in wrong)


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinetics") / "data"
    layouts.lay_out("Kinetics-400", root)
    return root


def test_missing_files_of_kinetics_are_named(kinetics):
    work = Rehearsal(None, Recipe(), 240_436, Curve(0.01), opens=lambda root: open_videos(root, "train"))
    assert not data.opening(work, kinetics).error
    for path in sorted((kinetics / "train").rglob("*.mp4"))[::33]:  # 3 %
        path.unlink()
    assert "13 of 400 train videos" in data.opening(work, kinetics).error


def test_a_trainer_is_called_until_it_has_its_data(tmp_path):
    work = Rehearsal(train, Recipe(), SAMPLES, Curve(0.1))
    found = data.opening(work, tmp_path)
    assert not found.error and 0 <= found.cpu_seconds < 60
    refused = Rehearsal(lambda name, recipe, options, world: images.open_both(options.data), Recipe(), 1, Curve(0.1))
    assert "no train split" in data.opening(refused, tmp_path).error


def test_curves():
    whole = Curve(1.0, warmup=2, start=0.1, end=0.5, epochs=10)
    assert [curve.expected(whole, step, 100, 10) for step in (1, 11)] == pytest.approx([0.1, 0.55])
    assert curve.expected(whole, 51, 100, 10) == pytest.approx(0.75)
    dropped = Curve(1.0, "steps", drops=(5, 8))
    found = [curve.expected(dropped, step, 100, 10) for step in (50, 51, 80, 81)]
    assert found == pytest.approx([1, 0.1, 0.1, 0.01])
    assert curve.turning_points(dropped, 10)(100) == [1, 50, 51, 80, 81, 100]


def test_hours_are_the_larger_of_loader_and_device(monkeypatch, tmp_path):
    row = rehearsed(tmp_path)
    samples = row.shown.steps * 64
    assert row.cost.flops == 6 * 16 * samples and row.cost.loader_hours is None
    monkeypatch.setattr(cost, "view_seconds", lambda *_: 3600.0)
    slow = rehearsed(tmp_path).cost
    assert slow.hours == pytest.approx((samples / 8 / 16,) * 2) and slow.processes[1] > slow.processes[0]


def test_layouts_of_few_files_are_those_of_many(tmp_path):
    with pytest.raises(run.UserError, match="no layout of 'toy'"):
        layouts.lay_out("toy", tmp_path / "toy")
    layouts.lay_out("ImageNet-1K", tmp_path / "data")
    found = images.open_images(tmp_path / "data", "train")
    assert len(found) == len(found.classes) == 1000 and found.read(7).size == (500, 375)


def test_two_recipes_of_one_augmentation_are_looked_at_once():
    one = loader.Augmented(Noise(), images.train_transform(32, policy="rand-m9-mstd0.5-inc1"))
    other = loader.Augmented(Noise(), images.train_transform(32))
    again = loader.Augmented(Noise(), images.train_transform(32, policy="rand-m9-mstd0.5-inc1"))
    assert data.signature(one) == data.signature(again) != data.signature(other)
    assert (data.kind(one), data.kind(other)) == ("policy", "pictures")
    assert math.isfinite(data.look(other, 3)[0])


@pytest.mark.long
def test_memory_does_not_grow_with_loader_processes(tmp_path, monkeypatch):
    """What each process has for itself, of an index of 128,000 names: the same with one and with eight."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    layouts.lay_out("ImageNet-1K", tmp_path / "data", 0.1)
    samples = loader.Augmented(images.open_images(tmp_path / "data", "train"), images.train_transform(32))
    alone, among = (data.workers_memory_mb(samples, workers) for workers in (1, 8))
    assert max(among) < 1.1 * alone[0] + 5, (alone, among)
