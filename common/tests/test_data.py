"""Loaders: three layouts give the same samples; order and augmentation follow from seed and step alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from common.data import images, loader
from common.data.tiny.digits import digits
from common.run import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits("folder", tmp_path_factory.mktemp("tiny") / "digits")


def _pixels(data):
    samples = [data[i] for i in range(len(data))]
    return sorted((label, np.asarray(image).tobytes()) for image, label in samples)


@pytest.mark.parametrize("layout", ["cifar", "webdataset"])
@pytest.mark.parametrize("split, count", [("train", 1437), ("val", 360)])
def test_three_layouts_hold_the_same_images(folder, tmp_path, layout, split, count):
    other = images.open_images(digits(layout, tmp_path / layout), split)
    data = images.open_images(folder, split)
    assert len(other) == len(data) == count and other.classes == data.classes == [str(i) for i in range(10)]
    assert _pixels(other) == _pixels(data)


def test_tiny_set_is_written_the_same_every_time(folder, tmp_path):
    again = digits("folder", tmp_path / "again")
    for path in sorted(folder.rglob("*.png"))[::50]:
        assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_webdataset_index_is_kept(tmp_path, monkeypatch):
    root = digits("webdataset", tmp_path / "w")
    monkeypatch.setattr("common.data.index.SETTLED_NS", 0)
    first = images.open_images(root, "val")
    monkeypatch.setattr("tarfile.open", None)  # a second index would fail
    assert np.array_equal(images.open_images(root, "val").sources, first.sources)


@pytest.mark.parametrize("prepare, expected", [
    (lambda p: p.rmdir(), "no data folder"),
    (lambda p: None, "has no train split"),
    (lambda p: (p / "train").mkdir(), "holds no images"),
    (lambda p: (p / "train" / "cat").mkdir(parents=True), "holds no images"),
    (lambda p: (p / "batches.meta").write_bytes(b""), "no data_batch_1"),
    (lambda p: [(p / n).write_bytes(b"") for n in ("batches.meta", "data_batch_1")], "truncated"),
    (lambda p: (p / "train-0.tar").write_bytes(b"junk"), "no readable webdataset shard"),
])
def test_a_wrong_folder_is_explained(tmp_path, prepare, expected):
    root = tmp_path / "data"
    root.mkdir()
    prepare(root)
    with pytest.raises(UserError, match=expected):
        images.open_images(root, "train")


def test_an_empty_class_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(UserError, match="dog"):
        images.open_images(tmp_path, "train")



# Sampler --------------------------------------------------------------------------------------------------


def _steps(**kwargs):
    return list(loader.StepSampler(**{"length": 23, "batch": 4, "steps": 12, "seed": 3, **kwargs}))


def test_an_epoch_shows_each_sample_once():
    epoch = [index for batch in _steps()[:5] for index, _ in batch]
    assert len(set(epoch)) == 20


@given(start=st.integers(0, 12), world=st.sampled_from([1, 2, 4]))
def test_resuming_and_sharing_change_nothing(start, world):
    whole = _steps()[start:]
    shares = [_steps(start=start, rank=rank, world=world) for rank in range(world)]
    joined = [[pair for group in zip(*batches) for pair in group] for batches in zip(*shares)]
    assert joined == whole


def test_repeated_augmentation():
    epoch = [pair for batch in _steps(repeats=3)[:5] for pair in batch]
    indices, seeds = zip(*epoch)
    assert indices[:3] == (indices[0],) * 3 and len(set(indices)) == 7 and len(set(seeds)) == 20


def test_epochs_and_seeds_differ():
    assert _steps()[:5] != _steps()[5:10] and _steps() != _steps(seed=4)


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(UserError, match="larger than the 23"):
        _steps(batch=24)


# Samples --------------------------------------------------------------------------------------------------


def test_augmentation_follows_from_the_seed_whatever_the_workers(folder):
    data = images.open_images(folder, "train")
    transform = images.train_transform(32, policy="rand-m9-mstd0.5-inc1", erase=0.5)
    seen = []
    for workers in (0, 2):
        batches = loader.train_loader(data, transform, 8, 3, seed=0, workers=workers)
        seen.append(torch.cat([x for x, _ in batches]))
    assert torch.equal(*seen)
    augmented = loader.Augmented(data, transform)
    assert not torch.equal(augmented[(0, 1)][0], augmented[(0, 2)][0])


def _damaged(tmp_path, bad):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(20):
            path = tmp_path / split / "a" / f"{i:02d}.png"
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
            if i in bad:
                path.write_bytes(path.read_bytes()[:30])
    return tmp_path


def test_a_corrupt_image_is_named_counted_and_replaced_in_training(tmp_path):
    data = images.open_images(_damaged(tmp_path, {4}), "train")
    augmented = loader.Augmented(data, np.asarray, report=tmp_path / "unreadable.txt")
    assert augmented[(4, 0)][0].max() == 5
    augmented[(4, 1)]
    (line,) = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert "04.png" in line


def test_too_many_corrupt_images_end_training(tmp_path):
    data = images.open_images(_damaged(tmp_path, {4, 9}), "train")
    augmented = loader.Augmented(data, np.asarray, report=tmp_path / "unreadable.txt", limit=0.05)
    augmented[(4, 0)]
    with pytest.raises(UserError, match=r"2 of 20 samples.*09\.png"):
        augmented[(9, 0)]


def test_a_corrupt_image_is_an_error_in_evaluation(tmp_path):
    data = images.open_images(_damaged(tmp_path, {4}), "val")
    with pytest.raises(UserError, match=r"cannot evaluate.*04\.png"):
        list(loader.eval_loader(loader.Plain(data, images.eval_transform(8)), 4))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_each_sample_once_over_all_ranks(folder, world):
    data = loader.Plain(images.open_images(folder, "val"), images.eval_transform(32))
    loaders = [loader.eval_loader(data, 64, rank=rank, world=world) for rank in range(world)]
    seen = torch.cat([index for batches in loaders for *_, index in batches])
    assert seen.sort().values.tolist() == list(range(360))


def test_the_papers_policy_fails_on_no_view(folder):
    """20,000 views; the policy asks for a posterize of 0 bits in about 28 of them, which Pillow refuses by itself."""
    image, _ = images.open_images(folder, "train")[0]
    policy = images.train_transform(32, policy="rand-m9-mstd0.5-inc1").transforms[2]
    zero_bits = 0
    for seed in range(20_000):
        random.seed(seed)
        np.random.seed(seed)
        policy(image)
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            zero_bits += 1
            assert np.asarray(op.aug_fn(image, 0)).max() == 0
            assert np.array_equal(op.aug_fn(image, 4), ImageOps.posterize(image, 4))
    assert zero_bits == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_transform_raises_is_not_a_damaged_file(folder, tmp_path, workers):
    data = images.open_images(folder, "train")
    batches = loader.train_loader(data, _raises, 8, 3, seed=0, workers=workers, report=tmp_path / "unreadable.txt")
    with pytest.raises(ValueError, match="bits must be"):
        next(iter(batches))
    assert not (tmp_path / "unreadable.txt").exists()


def _raises(image):
    raise ValueError("bits must be between 1 and 8")
