"""MaskCo's trainer: learns, resumes exactly, shares a batch, passes backbones on, and refuses bad input."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from common import run
from common.data.tiny.digits import digits
from common.data.tiny.scenes import scenes
from common.run import shipped
from common.tests.squares import BROKEN, break_classes, class_folders
from papers.maskco import cases, data, demo, evaluate
from papers.maskco.__main__ import choose
from papers.maskco.export import export, load_backbone
from papers.maskco.model import MaskCo, MomentumContrast, build_backbone
from papers.maskco.recipes import RECIPES
from papers.maskco.scripts import to_detectron2

DOOR = lambda: run.door("maskco", RECIPES, choose)  # noqa: E731
WORLD = run.World(0, 1, torch.device("cpu"), None)
SMALL = replace(RECIPES["smoke"], batch=8, region_px=(8, 12), mph_width=16, queue=40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Few scenes."""
    return scenes(24, 12, root=tmp_path_factory.mktemp("data") / "scenes")


def _train(out, folder, recipe=SMALL, **options):
    return choose("smoke", recipe, run.Options(data=folder, out=out, log_every=1, **options), WORLD)


def _scores(folder):
    return {m["name"]: m["value"] for m in json.loads((folder / "results.json").read_text())["metrics"]}


def test_learning_rates_of_the_linear_protocol():
    """A tenth after 60 epochs and again after 80: from the first step of the next epoch on."""
    recipe = RECIPES["imagenet_linear"]

    def rate(step):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr)
        evaluate.scheduler(optimizer, recipe, 5).step_update(step - 1)
        return optimizer.param_groups[0]["lr"]

    found = [rate(step) for step in (1, 300, 301, 400, 401, 500)]
    assert found == pytest.approx([30, 30, 3, 3, 0.3, 0.3])


@pytest.mark.parametrize("method", ["maskco", "moco_v2"])
def test_a_batch_is_learned_by_heart(method):
    """The same views of eight pictures again and again, against keys of others, starting from a loss of chance."""
    recipe = replace(
        RECIPES["tiny"], input_size_px=48, overlap_px=20, region_px=(12, 18), queue=24, momentum=0.9, method=method,
    )
    views = evaluate.Seeded(data.open_pictures(scenes(), "train"), data.Views(recipe))
    ours, others = (
        evaluate.to(WORLD.device, torch.utils.data.default_collate([views[i][0] for i in rows]))
        for rows in (range(8), range(8, 32))
    )
    torch.manual_seed(0)
    model = evaluate.build(recipe, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        model.update_keys()
        with torch.no_grad():
            model.enqueue(model(**others)[1])
        logits, _ = model(**ours)
        loss = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 2.5, losses


@pytest.mark.parametrize("method, changes", [
    ("maskco", {}), ("maskco", {"regions": 2, "mph_on_key": True, "mask": "learned", "overlap_tries": 0}),
    ("moco_v2", {}), ("linear", {}),
])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, tiny, method, changes):
    recipe = replace(SMALL, method=method, **changes)
    folder = tiny
    if method == "linear":
        folder, recipe = digits(), replace(recipe, batch=480, epochs=2, lr=1.0, milestones=(1,))
    whole = _train(tmp_path / "whole", folder, recipe)
    parts = _train(tmp_path / "parts", folder, recipe, stop_at=2, resume="auto")
    assert not (parts / "results.json").exists()
    assert _train(tmp_path / "parts", folder, recipe, resume=str(parts), workers=1) == parts
    (_, ours, _), (_, theirs, _) = run.load_checkpoint(whole), run.load_checkpoint(parts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # queue, its pointer and the keys' networks among it
    logs = [[(row["loss"], row.get("fallbacks")) for row in run.read_log(folder)] for folder in (whole, parts)]
    assert logs[0] == logs[1]
    if "overlap_tries" in changes:
        assert [count for _, count in logs[0]] == [8, 16, 24], "of every picture the crops do not meet"
    assert _scores(whole) == _scores(parts)
    if method != "linear":
        assert ours["model"]["queue_ptr"] == 24 * recipe.regions % 40
        kept = json.loads((whole / "checkpoints" / "step_00000003" / "state.json").read_text())
        groups = dict(dict(kept["dict"])["optimizer"]["dict"])["param_groups"]["list"][0]["dict"]
        learned = sum(p.requires_grad for p in evaluate.build(recipe, 1).parameters())
        assert len(dict(groups)["params"]["list"]) == learned, "the keys' networks have no optimizer state"


def test_what_a_run_leaves(tmp_path, tiny, monkeypatch):
    folder = _train(tmp_path, tiny)
    names = {"curves.png", "regions.png", "report.md", "results.json", "model"}
    assert names <= {p.name for p in folder.iterdir()}
    scores = _scores(folder)
    assert list(scores) == ["probe_map", "random_probe_map", "contrast_top1", "contrast_rank"]
    assert not any(m["comparable"] for m in json.loads((folder / "results.json").read_text())["metrics"])
    for task, expected in (("trained", ["contrast_top1", "contrast_rank"]), ("probe", ["probe_map"])):
        out = tmp_path / f"{task}.json"
        argv = ["evaluate", str(folder), "--task", task, "--data", str(tiny), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate.main()
        again = {m["name"]: m["value"] for m in json.loads(out.read_text())["metrics"]}
        assert {k: again[k] for k in expected} == pytest.approx({k: scores[k] for k in expected})
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", str(folder), "--out", str(tmp_path / "seen.png")])
    demo.main()
    assert Image.open(tmp_path / "seen.png").size[0] > 500
    # as it is shipped, on a picture of one's own
    Image.effect_noise((320, 180), 90).convert("RGB").save(tmp_path / "own.jpg")
    shipped.write(tmp_path / "w.safetensors", run.load_checkpoint(folder)[1]["model"], paper="maskco",
                  recipe_name="smoke", recipe=SMALL, classes=[], revision="0" * 40)
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / "own.jpg"), "--checkpoint",
                                      str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "own.png")])
    demo.main()
    assert Image.open(tmp_path / "own.png").size == Image.open(tmp_path / "seen.png").size


def test_large_data_are_not_probed_and_a_failing_probe_costs_no_backbone(tmp_path, tiny, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(evaluate, "probe_scores", fails)
    scores = _scores(_train(tmp_path / "large", tiny, replace(SMALL, dataset="COCO")))
    assert list(scores) == ["contrast_top1", "contrast_rank", "contrast_loss"]
    with pytest.raises(MemoryError):
        _train(tmp_path / "small", tiny)
    (model,) = (tmp_path / "small").glob("maskco/smoke/*/model")
    load_backbone(build_backbone(SMALL.backbone, SMALL.output_stride), model)


def test_pictures_left_out_of_a_score_are_an_error(tiny, monkeypatch):
    model, val = evaluate.build(SMALL, 1), data.open_pictures(tiny, "val")
    plain = evaluate.loader.eval_loader
    monkeypatch.setattr(evaluate.loader, "eval_loader", lambda *x, **y: list(plain(*x, **y))[:-1])
    with pytest.raises(RuntimeError, match="over 0 regions"):
        evaluate.contrast(model, val, SMALL, WORLD)


def test_scores_do_not_depend_on_the_number_of_loading_processes(tiny):
    """Whatever stands in the mask: noise, too, belongs to the sample."""
    recipe = replace(SMALL, mask="noise")
    torch.manual_seed(0)
    model, val = evaluate.build(recipe, 1), data.open_pictures(tiny, "val")
    here, there = (evaluate.contrast(model, val, recipe, WORLD, workers=workers) for workers in (0, 1))
    assert here == there


def test_a_classifier_stands_on_a_frozen_backbone(tmp_path, tiny):
    pretrained = _train(tmp_path / "before", tiny)
    recipe = replace(SMALL, method="linear", batch=128, epochs=4, lr=0.01, flip=0.0, init=str(pretrained))
    linear = _train(tmp_path / "after", digits(), recipe)
    before, after = (run.load_checkpoint(folder)[1]["model"] for folder in (pretrained, linear))
    backbone = {k: v for k, v in after.items() if k.startswith("backbone.")}
    torch.testing.assert_close(backbone, {k: before[k] for k in backbone}, rtol=0, atol=0)  # statistics too
    assert set(after) - set(backbone) == {"fc.weight", "fc.bias"}
    assert _scores(linear)["loss"] < 2.28, "below ln 10"
    assert set(_scores(linear)) == {"top1", "top5", "loss"}


def test_an_exported_backbone_is_a_stock_resnet50(tmp_path):
    """Strictly all of torchvision's and timm's names but the classifier's; the same features at stride 32."""
    torch.manual_seed(0)
    model = MaskCo(queue=8).eval()
    export(model.backbone, "resnet50", tmp_path / "model", 224, 0.875)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    stock = torchvision.models.resnet50()
    missing = stock.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and missing.unexpected_keys == []
    stock.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    expected = model.backbone(x).mean((2, 3))
    torch.testing.assert_close(stock.eval()(x), expected, rtol=1e-4, atol=1e-4)
    ours = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    # the layout that checkpoints of MoCo's code have, and that those passed on by others use
    again = build_backbone("resnet50")
    run.save_weights(tmp_path / "q.safetensors", {f"encoder_q.0.{k}": v for k, v in weights.items()} | {"queue": x})
    load_backbone(again, tmp_path / "q.safetensors")
    torch.testing.assert_close(again.state_dict(), model.backbone.state_dict())


def test_a_narrow_dilated_backbone_keeps_its_weights(tmp_path):
    backbone = build_backbone("resnet10_narrow", 8)
    export(backbone, "resnet10_narrow", tmp_path / "model", 64, 1.0)
    ours = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0)
    torch.testing.assert_close(ours.state_dict(), backbone.state_dict(), rtol=0, atol=0)


def test_accumulation_is_the_whole_batch(tmp_path, tiny):
    """The first loss comes before any step: chunks differ only in what batch normalisation sees."""
    rows = [run.read_log(_train(tmp_path / str(n), tiny, micro_batch=n, stop_at=1)) for n in (0, 4)]
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=0.1)
    queues = [run.load_checkpoint(next((tmp_path / str(n)).glob("*/*/*")))[1]["model"]["queue_ptr"] for n in (0, 4)]
    assert queues[0] == queues[1] == 8


@pytest.mark.parametrize("method", ["maskco", "moco_v2"])
def test_keys_move_once_a_step_and_before_they_are_used(tmp_path, tiny, monkeypatch, method):
    calls = []

    def listen(name, plain):
        def heard(self, *inputs):
            calls.append((name, int(self.queue_ptr)))
            return plain(self, *inputs)

        monkeypatch.setattr(MomentumContrast, name, heard)

    for name in ("update_keys", "_keys", "enqueue"):
        listen(name, getattr(MomentumContrast, name))
    monkeypatch.setattr(run, "multiply_adds", lambda *_: 0)
    _train(tmp_path, tiny, replace(SMALL, method=method), micro_batch=4, stop_at=2)
    assert calls == [(name, at) for at in (0, 8) for name in ("update_keys", "_keys", "_keys", "enqueue")]


TWO = """
import torch, torch.distributed as dist
from common import run
from papers.maskco.model import MaskCo
run.join_group("gloo")
torch.manual_seed(0)
model = MaskCo("resnet10_narrow", output_stride=8, mph_width=16, queue=13)
for name, module in model.named_modules():  # train mode, so that keys are shuffled; statistics as in eval mode
    if isinstance(module, torch.nn.BatchNorm2d):
        module.train = lambda mode: module
        module.eval()
        module.forward = lambda x, m=module: torch.nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight,
                                                                            m.bias, False)
key = torch.randn(6, 3, 64, 64)
corner = torch.rand(6, 3, 2) * 40
boxes = torch.cat([corner, corner + 20], -1)
mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
model.training = True
torch.manual_seed(dist.get_rank())
shuffled = model._keys(model.keys, key[mine], boxes[mine])
plain = model.keys(key[mine], boxes[mine])
assert torch.allclose(shuffled, plain, atol=1e-5), (shuffled - plain).abs().max()
model.enqueue(shuffled[:, :1])
assert model.queue_ptr == 6
queues = [torch.empty_like(model.queue) for _ in range(2)]
dist.all_gather(queues, model.queue)
assert torch.equal(*queues) and torch.allclose(model.queue[:, :6].T, model.keys(key, boxes[:, :1])[:, 0], atol=1e-5)
dist.destroy_process_group()
"""


def _launch(home, *words):
    command = [sys.executable, "-m", "common.run.launch", 2, *words, "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{run.ROOT}:{home}"}
    done = subprocess.run([str(w) for w in command], cwd=run.ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_shuffled_keys_are_those_of_their_own_boxes(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    _launch(tmp_path, "two")


@pytest.mark.slow
def test_two_processes_share_a_batch(tmp_path, tiny):
    """Batch normalisation sees half the batch each, so losses are near, not equal."""
    _launch(tmp_path, "papers.maskco.train", "smoke", "--out", tmp_path / "two", "--data", tiny, "--batch", 8,
            "--queue", 40, "--log-every", 1, "--lr", 0.01, "--overlap-tries", 0)
    (folder,) = (tmp_path / "two").glob("maskco/smoke/*")
    one = _train(tmp_path / "one", tiny, replace(RECIPES["smoke"], batch=8, queue=40, lr=0.01, overlap_tries=0))
    logs = [run.read_log(each) for each in (one, folder)]
    assert [row["fallbacks"] for row in logs[0]] == [row["fallbacks"] for row in logs[1]] == [8, 16, 24]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=0.25)
    assert run.load_checkpoint(folder)[1]["model"]["queue_ptr"] == 24
    assert list(_scores(folder)) == list(_scores(one)), "one process probes the features of both"


@pytest.mark.slow
def test_it_learns_and_the_mask_makes_it_hard(tmp_path):
    """Held-out regions are found better than by chance; without the mask the loss is lower after every epoch."""
    found = {}
    for mask in ("mean", "off"):
        recipe = replace(RECIPES["tiny"], epochs=3, queue=256, mask=mask, eval_every=0)
        rows = run.read_log(_train(tmp_path / mask, digits(), recipe))
        found[mask] = [row for row in rows if "val/contrast_loss" in row]
    assert found["mean"][-1]["val/contrast_rank"] < 30 and len(found["mean"]) == 3
    for with_mask, without in zip(found["mean"], found["off"]):
        assert without["val/contrast_loss"] < with_mask["val/contrast_loss"]


def test_a_loss_that_explodes_stops_the_run(tmp_path, tiny):
    with pytest.raises(run.UserError, match="not finite"):
        _train(tmp_path, tiny, replace(SMALL, lr=1e30))


@pytest.mark.parametrize("main, argv, message", [
    (DOOR, ["coco"], "meant for COCO: give its folder with --data"),
    (DOOR, ["tiny", "--batch", "9999"], "larger than the 1437 training samples"),
    (DOOR, ["tiny", "--overlap-px", "9"], "does not fit into --overlap-px 9"),
    (DOOR, ["tiny", "--init", "gone.pth"], "no checkpoint at gone.pth"),
    (evaluate.main, ["gone"], "no checkpoint at gone"),
    (evaluate.main, ["WEIGHTS", "--recipe", "tiny"], "no run folder"),
    (evaluate.main, ["WEIGHTS", "--recipe", "tiny", "--task", "probe"], "does not fit this backbone"),
    (demo.main, [], "no finished run"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, main, argv, message):
    run.save_weights(tmp_path / "w.safetensors", {"conv1.weight": torch.zeros(1)})
    places = {"WEIGHTS": str(tmp_path / "w.safetensors")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main", *(places.get(word, word) for word in argv)])
    with pytest.raises(SystemExit) as exit:
        run.main(main)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and message in line
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run behind"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_training_can_be_planned(name):
    work = cases.training_cost(RECIPES[name])
    assert work.samples >= work.batch and tree_leaves(work.model(*work.inputs))[0].shape[0] == 1


def test_baselines_change_nothing_but_the_task():
    for name, other, changed in (
        ("imagenet", "imagenet_moco_v2", "method"), ("coco", "coco_moco_v2", "method"), ("coco", "coco_no_mph", "mph"),
        ("coco", "coco_conv1x1", "mph"), ("mini", "mini_moco_v2", "method"), ("mini", "mini_no_mph", "mph"),
    ):
        ours, theirs = (vars(RECIPES[n]) for n in (name, other))
        assert {k for k in ours if ours[k] != theirs[k]} == {"about", changed}, other


def test_pictures_are_read_from_what_people_have(tmp_path):
    for path in ("coco/train2017/1.jpg", "flat/train/a.png", "classes/train/dog/a.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / path)
        pictures = data.open_pictures(tmp_path / path.split("/")[0], "train")
        assert len(pictures) == 1 and pictures[0][0].size == (50, 40)
    assert len(data.open_pictures(digits("webdataset"), "train")) == 1437
    present, val = data.open_labelled(scenes())
    assert present.categories.shape == (2000, 3) and val.classes == present.classes == ["circle", "square", "triangle"]
    assert set(present.categories.sum(1)) == {1, 2}
    with pytest.raises(run.UserError, match="no data folder"):
        data.open_pictures(tmp_path / "gone", "train")


def test_annotations_of_both_splits_must_be_there_and_agree(tmp_path):
    def annotate(split, categories):
        rows = [{"id": i, "name": name} for i, name in categories]
        seen = [{"image_id": 5, "category_id": 7}]
        about = {"categories": rows, "images": [{"id": 5, "file_name": "a.png"}], "annotations": seen}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(about))

    (tmp_path / "annotations").mkdir()
    annotate("train2017", [(7, "dog"), (2, "cat")])
    with pytest.raises(run.UserError, match=r"no .*instances_val2017.json, and no instances_val.json"):
        data.open_labelled(tmp_path)
    annotate("val2017", [(2, "cat"), (7, "dog")])
    for pictures in data.open_labelled(tmp_path):  # columns by id, in whatever order a file lists them
        assert pictures.classes == ["cat", "dog"] and pictures.categories.tolist() == [[False, True]]
    annotate("val2017", [(2, "cat"), (7, "wolf")])
    with pytest.raises(run.UserError, match=r"classes of .* differ .*\['dog', 'wolf'\]"):
        data.open_labelled(tmp_path)


@pytest.mark.parametrize("how, message", BROKEN)
def test_other_classes_in_a_classifiers_validation_are_one_line(tmp_path, how, message):
    break_classes(root := class_folders(tmp_path / "data"), how)
    with pytest.raises(run.UserError, match=message):
        _train(tmp_path / "runs", root, replace(SMALL, method="linear"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(run.UserError, match=message):  # and so are those of pictures to probe with
        _train(tmp_path / "runs", root, replace(SMALL, probe=str(root)))


def test_a_training_picture_that_cannot_be_read_is_left_out_of_the_probe(tmp_path, capsys):
    root = class_folders(tmp_path / "data")
    train, val = data.open_labelled(root)
    backbone = evaluate.build(SMALL, 1).backbone
    names = [path.name for path in sorted((root / "train" / "b").iterdir())]
    (root / "train" / "b" / names[2]).write_bytes(b"damaged")
    rows, seen = evaluate.features(backbone, train, SMALL, WORLD, tolerant=True)
    assert seen == [i for i in range(32) if i != 8 + 2] and len(rows) == 31
    scores = evaluate.probe_scores(backbone, train, val, SMALL, WORLD)
    assert "1 of 32 pictures cannot be read" in capsys.readouterr().err and 0 <= scores["probe_top1"] <= 100
    (root / "val" / "a" / "0.png").write_bytes(b"damaged")
    with pytest.raises(run.UserError, match="cannot evaluate"):
        evaluate.probe_scores(backbone, train, val, SMALL, WORLD)


def test_a_backbone_has_detectron2s_names(tmp_path, monkeypatch):
    """By detectron2's own scheme, stage by stage; every tensor once, and nothing of it changed."""
    network = build_backbone("resnet50")
    run.save_weights(tmp_path / "model.safetensors", network.state_dict())
    monkeypatch.setattr(sys, "argv", ["to_detectron2", str(tmp_path / "model.safetensors"), str(tmp_path / "d2.pth")])
    tyro.cli(to_detectron2.main)
    content = torch.load(tmp_path / "d2.pth", weights_only=True)
    assert content["matching_heuristics"] is True
    norms = ["weight", "bias", "running_mean", "running_var"]
    convolutions = ["stem.conv1"]
    for stage, blocks in (("res2", 3), ("res3", 4), ("res4", 6), ("res5", 3)):
        for block in range(blocks):
            names = ["conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else [])]
            convolutions += [f"{stage}.{block}.{name}" for name in names]
    expected = {f"{c}.weight" for c in convolutions} | {f"{c}.norm.{part}" for c in convolutions for part in norms}
    assert set(content["model"]) == expected
    ours = network.state_dict()
    for theirs, name in (
        ("stem.conv1.norm.bias", "bn1.bias"), ("res2.0.shortcut.norm.weight", "layer1.0.downsample.1.weight"),
        ("res5.2.conv3.weight", "layer4.2.conv3.weight"), ("res4.0.conv2.norm.bias", "layer3.0.bn2.bias"),
    ):
        assert torch.equal(content["model"][theirs], ours[name])
