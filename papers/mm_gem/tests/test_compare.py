"""The comparison on kept features: what both objectives share, where [CAP] stands, the linear floor, long texts."""

import dataclasses

import numpy as np
import pytest
import torch

from common import run
from common.data.tiny.scenes import scenes
from common.run import UserError, shipped
from papers.mm_gem import build, compare, features, linear_map, train
from papers.mm_gem.configuration import InputError
from papers.mm_gem.data import open_captions
from papers.mm_gem.embedder import load
from papers.mm_gem.evaluate import retrieval
from papers.mm_gem.model import like_lengths
from papers.mm_gem.recipes import RECIPES

WORLD = run.World(0, 1, torch.device("cpu"), None)
RECIPE = dataclasses.replace(RECIPES["smoke_objectives"], compare=())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(train=64, val=16, root=tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _model(recipe=RECIPE):
    run.seed_all(0)
    processor = build.processor(recipe)
    model = build.model(recipe, processor)
    build.choose_trained(model, recipe)
    return model, processor


def test_kept_features_train_what_pixels_train(tmp_path, data):
    losses = []
    for keep in (True, False):
        recipe = dataclasses.replace(RECIPE, keep_features=keep, steps=3)
        options = run.Options(data=data, out=tmp_path / str(keep), log_every=1, stop_at=3)
        folder = train.train("smoke_objectives", recipe, options, WORLD)
        losses.append([row["loss"] for row in run.read_log(folder) if "loss" in row])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_groups_of_like_lengths_change_nothing(data):
    model, processor = _model()
    texts = processor.texts(["a red circle .", "two .", "a green triangle left of a red square .", "a ."])
    pixels, found = torch.randn(4, 3, 64, 64), []
    for groups in (1, 3):
        model.zero_grad()
        out = model(pixel_values=pixels, groups=groups, **texts)
        out.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((out.loss_emb, out.loss_gen, out.text_embeds, gradient))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert [ids.shape[1] for _, ids, _ in like_lengths(*model._texts(*texts.values()), 3)] == [3, 5, 10]


def test_features_are_of_these_files_and_this_encoder(tmp_path, data):
    model, processor = _model()
    images = open_captions(data, "val")
    kept = features.keep(model, processor, images)
    with torch.inference_mode():
        expected = model.feature_map(processor.pixels([images[3][0]]))[0]
    torch.testing.assert_close(kept[3][0].float(), expected, rtol=2e-3, atol=2e-3)
    assert kept[3][1] == images.captions(3) and kept[3][0].dtype == torch.float16
    before = features.fingerprint(model.vision_tower)
    again = features.keep(model, processor, images)
    assert again.maps.filename == kept.maps.filename
    with torch.no_grad():
        next(model.vision_tower.parameters())[0] += 1
    assert features.fingerprint(model.vision_tower) != before
    assert features.keep(model, processor, images).maps.filename != kept.maps.filename
    model.vision_tower.requires_grad_(True)
    with pytest.raises(UserError, match="frozen vision encoder alone"):
        features.keep(model, processor, images)


def test_an_unreadable_picture_is_passed_over(tmp_path):
    root = scenes(train=128, val=8, root=tmp_path / "scenes")
    (root / "train" / "000005.png").write_bytes(b"torn")
    recipe = dataclasses.replace(RECIPE, steps=8, objectives="embedding")
    folder = train.train("smoke_objectives", recipe, run.Options(data=root, out=tmp_path, stop_at=8), WORLD)
    assert "000005.png" in (folder / "unreadable.txt").read_text()


def test_both_objectives_train_the_shared_parameters(data):
    model, processor = _model()
    batch = {"pixel_values": torch.randn(3, 3, 64, 64), **processor.texts(["a red circle .", "a b .", "two ."])}
    trained = {}
    for objective in ("embedding", "generation"):
        model.config.objectives = objective
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        trained[objective] = {name for name, p in model.named_parameters() if p.grad is not None}
    both = trained["embedding"] & trained["generation"]
    rows = {name for name in both if "trainable_tokens" in name}  # a row each of one tensor
    count = sum(p.numel() for name, p in model.named_parameters() if name in both - rows)
    assert count == build.shared_parameters(model) > 0 and len(rows) == 1


def test_cap_stands_where_it_is_told():
    for place, row in (("last", -1), ("first", 0)):
        model, _ = _model(dataclasses.replace(RECIPE, cap_position=place))
        prefix = model._prefix(torch.randn(2, 64, 4, 4))
        cap = model.get_input_embeddings()(torch.tensor([model.config.cap_token_id]))
        assert prefix.shape[1] == 17 and torch.equal(prefix[:, row], cap.expand(2, -1))
    with pytest.raises(InputError, match="cap_position='middle' must be 'last' or 'first'"):
        _model(dataclasses.replace(RECIPE, cap_position="middle"))


def test_a_comparison_goes_on_where_it_stopped(tmp_path, data):
    recipe = dataclasses.replace(RECIPES["smoke_objectives"], compare=("both", "captions"))
    options = run.Options(data=data, out=tmp_path / "runs", seeds=(0,), resume="auto")
    compare.compare("smoke_objectives", recipe, dataclasses.replace(options, stop_at=1), WORLD, train.train)
    folder = compare.compare("smoke_objectives", recipe, options, WORLD, train.train)
    assert len(list((tmp_path / "runs" / "mm_gem" / "smoke_objectives").iterdir())) == 1
    names = {m["name"]: m["value"] for m in run.read_json(folder / "results.json")["metrics"]}
    assert "both text -> image R@10" in names and "captions CIDEr-D" in names
    assert "captions text -> image R@1" not in names, "nothing of what was not trained"
    assert names["linear map of 64 images text -> image R@10"] > 0
    (home,) = (folder / "seed0" / "mm_gem" / "both").iterdir()
    own = {m["name"]: m["value"] for m in run.read_json(home / "results.json")["metrics"]}
    assert names["both five captions in order, text -> image R@1"] == own["long text, text -> image R@1"]
    assert (folder / "objectives.png").stat().st_size > 1000


def test_the_linear_map_learns_words():
    words = ["dog", "cat", "boat", "tree", "car", "girl"]
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(6, generator=generator)[:3].tolist() for _ in range(200)]
    held = torch.zeros(200, 6)
    for row, its in zip(held, chosen):
        row[its] = 1
    x = held @ torch.randn(6, 12, generator=generator)
    captions = [[f"A {words[a]} and a {words[b]}.", f"The {words[c]}!"] for a, b, c in chosen]
    texts = [" ".join(its) for its in captions[100:]]
    found = linear_map.similarity(x[:100], captions[:100], x[100:], texts, penalty=1e-6)
    same = torch.tensor(np.array([[set(a) == set(b) for b in chosen[100:]] for a in chosen[100:]]))
    assert retrieval(found, same)["text -> image R@1"][0] == 100
    known = linear_map.Words(["a dog", "a dog", "a cat"], least=2)
    assert list(known.place) == ["a", "dog"] and known.vectors(["cat"]).tolist() == [[0, 0]]


def test_what_a_run_trained_is_put_together_again(tmp_path, data):
    folder = train.train("smoke_objectives", RECIPE, run.Options(data=data, out=tmp_path), WORLD)
    weights, path = run.load_weights(folder / "connection.safetensors"), tmp_path / "tiny.safetensors"
    shipped.write(path, weights, paper="mm_gem", recipe_name="smoke_objectives", recipe=RECIPE, classes=(), revision="")
    whole = load(folder, WORLD)
    run.seed_all(0)  # the two networks are random ones here, as the run had them
    again = load(path, WORLD)
    texts = ["a red circle .", "two blue squares ."]
    torch.testing.assert_close(again.texts(texts), whole.texts(texts), rtol=1e-2, atol=2e-3)
    weights.pop("h1.weight")
    with pytest.raises(UserError, match=r"not the weights .* lacks: h1.weight differs"):
        build.assembled(RECIPE, whole.processor, weights)
