"""The trainers: they learn, resume exactly, share a batch exactly, and stop on bad input with one clear error."""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from common import run
from common.data import crops, pairs
from common.data.tiny.digits import digits
from common.data.tiny.sequences import sequences
from common.metrics import classification, trackers
from common.metrics.trackers import demo
from papers.dualtfr import bench, cases, compare, figures, loss, pretrain, train
from papers.dualtfr.data import transform, validation_pairs
from papers.dualtfr.evaluate import PAPER, build, validate
from papers.dualtfr.recipes import RECIPES, Pretrain
from papers.dualtfr.weights import init_weights

WORLD = run.World(0, 1, torch.device("cpu"), None)
# One step an epoch and every kind of randomness: augmentation, drop path.
LIVELY = dataclasses.replace(
    RECIPES["smoke"], pairs_per_epoch=8, epochs=6, milestones=(4,), eval_every=3, val_pairs=6,
    model_args={"drop_path_rate": 0.3},
)
DIGITS = dataclasses.replace(RECIPES["pretrain_tiny"], epochs=1, batch=96)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three training sequences of the built-in set, and the first frames of one of its validation sequences."""
    root = tmp_path_factory.mktemp("sequences")
    for split, count, frames in (("train", 3, 40), ("val", 1, 20)):
        for folder in sorted((sequences() / split).iterdir())[:count]:
            target = root / split / folder.name
            target.mkdir(parents=True)
            for file in folder.iterdir():
                if file.suffix == ".ini":
                    shutil.copy(file, target)
                elif file.suffix != ".jpg":  # one line a frame
                    (target / file.name).write_text("\n".join(file.read_text().splitlines()[:frames]) + "\n")
                elif int(file.stem) <= frames:
                    (target / file.name).symlink_to(file)
        names = sorted(p.name for p in (root / split).iterdir())
        (root / split / "list.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture
def pictures():
    """Asked for by a test whose runs draw theirs."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda *_: None)


def _train(out, data, recipe=LIVELY, **options):
    return train.train("smoke", recipe, run.Options(data=data, out=out, log_every=1, **options), WORLD)


def _steps(folder):
    """The log's rows of training steps; those of evaluations stand by themselves."""
    return [row for row in run.read_log(folder) if "loss" in row]


def _results(folder):
    return json.loads((folder / "results.json").read_text())


def _scores(folder):
    return {m["name"]: m["value"] for m in _results(folder)["metrics"] if "fps" not in m["name"]}


def test_overfits_one_pair(data):
    found = pairs.open_data(LIVELY, data)
    (batch,) = pairs.pairs_loader(pairs.Pairs(found.train, transform(LIVELY), length=1), 1, 1, seed=3)
    torch.manual_seed(0)
    model = build(RECIPES["tiny"])
    z, x, box = crops.normalize(batch["template"]), crops.normalize(batch["search"]), batch["search_box"]
    positives = loss.assign(box, 8)
    assert 0 < positives.sum() < 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(80):
        terms = loss.terms(model(z, x), box, positives, loss.totals(positives))
        optimizer.zero_grad()
        loss.total(terms).backward()
        optimizer.step()
    logits, boxes = model.eval()(z, x)
    assert torch.equal(logits.argmax(-1) == 0, positives)
    w, h = box[0, 2:].tolist()
    best = boxes[0, logits[0].softmax(1)[:, 0].argmax()]
    expected = torch.tensor([box[0, 0] + w / 2, box[0, 1] + h / 2, w, h])
    torch.testing.assert_close(best, expected, atol=0.02, rtol=0)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data):
    whole = _train(tmp_path / "whole", data)
    for stop in (2, 4):
        folder = _train(tmp_path / "parts", data, stop_at=stop, resume="auto")
        assert not (folder / "results.json").exists()
    parts = _train(tmp_path / "parts", data, resume=str(folder), workers=1)
    assert parts == folder and _scores(parts) == _scores(whole)
    ends = [run.load_checkpoint(f) for f in (whole, parts)]
    torch.testing.assert_close(ends[0][1]["model"], ends[1][1]["model"], rtol=0, atol=0)
    torch.testing.assert_close(ends[0][2]["optimizer"]["state"], ends[1][2]["optimizer"]["state"], rtol=0, atol=0)
    losses = [[row["loss"] for row in _steps(f)] for f in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    rates = [row["lr"] for row in _steps(whole)]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3, 2e-4, 2e-4])
    assert [row["step"] for row in run.read_log(whole) if "val/loss" in row] == [3, 6]


def test_a_training_without_a_validation_split_ends_and_ends_again(tmp_path, data):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train").symlink_to(data / "train")
    recipe = dataclasses.replace(LIVELY, epochs=1)
    folder = _train(tmp_path / "runs", alone, recipe)
    scores = _scores(folder)
    assert set(scores) == {"loss"} and scores["loss"] == run.read_log(folder)[-1]["loss"]
    (folder / "results.json").unlink()  # killed after the last step
    assert _train(tmp_path / "runs", alone, recipe, resume="auto") == folder and _scores(folder) == scores


def test_accumulation_is_the_whole_batch(tmp_path, data):
    recipe = dataclasses.replace(LIVELY, model_args={})
    rows = [_steps(_train(tmp_path / str(n), data, recipe, micro_batch=n, stop_at=3)) for n in (0, 3)]
    for whole, parts in zip(*rows):
        for key in ("loss", "ce", "l1", "giou", "iou"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, data_of, more", [
    ("smoke", "sequences", ["--pairs-per-epoch", "16"]),
    ("pretrain_tiny", "digits", ["--batch", "480", "--epochs", "2"]),
])
def test_two_processes_train_like_one(tmp_path, data, recipe, data_of, more):
    logs = {}
    where = ["--data", str(data)] if data_of == "sequences" else []
    for processes in (1, 2):
        launch = ["-m"] if processes == 1 else ["-m", "common.run.launch", "2"]
        command = [sys.executable, *launch, "papers.dualtfr.train", recipe, *where, *more, "--log-every", "1",
                   "--device", "cpu", "--out", str(tmp_path / str(processes))]
        subprocess.run(
            command, check=True, cwd=run.ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        (folder,) = (tmp_path / str(processes)).glob(f"dualtfr/{recipe}/*")
        logs[processes] = run.read_log(folder)
    assert len(logs[1]) == len(logs[2]) > 3
    for one, two in zip(logs[1], logs[2]):
        assert one.keys() == two.keys()
        for key, rel in (("loss", 1e-3), ("grad_norm", 2e-2), ("val/loss", 1e-3)):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=rel)


def test_validation_pairs_whose_targets_lie_outside_are_scored(monkeypatch, data):
    samples = validation_pairs(LIVELY, pairs.open_data(LIVELY, data))
    monkeypatch.setattr(loss, "assign", lambda box, grid, *_: torch.zeros(len(box), grid**2, dtype=torch.bool))
    scores = validate(build(LIVELY), samples, LIVELY, WORLD)
    assert scores["iou"] == scores["l1"] == 0 < scores["loss"] < 1000


def test_a_loss_that_explodes_stops_the_run_before_the_weights_are_touched(tmp_path, data):
    recipe = dataclasses.replace(LIVELY, lr=1e30, warmup_steps=0, model_args={})
    with pytest.raises(run.UserError, match=r"not finite at step \d+"):
        _train(tmp_path, data, recipe)
    (folder,) = tmp_path.glob("dualtfr/smoke/*")
    _, weights, _ = run.load_checkpoint(folder)
    assert all(tensor.isfinite().all() for tensor in weights["model"].values())
    assert not (folder / "results.json").exists()


def test_a_run_is_reported_evaluated_and_shown(tmp_path, data, monkeypatch, capsys, pictures):
    folder = _train(tmp_path, data)
    results = _results(folder)
    assert results["params"] == 252_484 and results["flops"] == 31_924_224
    assert not any(m["comparable"] for m in results["metrics"])
    assert [m["name"] for m in results["metrics"]] == [
        "got10k ao", "got10k ao, static box", "got10k ao, template matching (NCC)",
        "got10k fps", "got10k fps_model", "pairs iou",
    ]
    assert {p.name for p in folder.glob("*.png")} == {"curves.png", "tracks.png", "matches.png"}
    assert "![tracks](tracks.png)" in (folder / "report.md").read_text()

    argv = ["evaluate", str(folder), "--data", str(data), "--split", "val", "--out", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", argv)
    trackers.main(PAPER)
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())["metrics"]
    scores = _scores(folder)
    assert {m["name"]: m["value"] for m in again}["got10k ao"] == scores["got10k ao"]

    source = data / "val" / "GOT-10k_Val_000001"
    argv = ["demo", str(source), "--checkpoint", str(folder), "--out", str(tmp_path / "answer.gif")]
    monkeypatch.setattr(sys, "argv", argv)
    demo.main(PAPER)
    assert "20 frames" in capsys.readouterr().out and (tmp_path / "answer.png").stat().st_size > 10_000


def test_a_tracker_starts_from_a_pretrained_branch(tmp_path, data, monkeypatch):
    options = run.Options(out=tmp_path, log_every=1)
    folder = pretrain.train("pretrain_tiny", DIGITS, options, WORLD)
    rows = _steps(folder)
    assert rows[-1]["loss"] < rows[0]["loss"] and _scores(folder)["top1"] == run.read_log(folder)[-1]["val/top1"]
    exported = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    weights = init_weights(str(folder))
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, weights[name]), name

    recipe = dataclasses.replace(LIVELY, init=str(folder), lr=0.0)
    started = run.load_checkpoint(_train(tmp_path, data, recipe, stop_at=1))[1]["model"]
    for name in ("patch_embed.proj.weight", "stages.2.blocks.1.mlp.fc1.weight"):
        assert torch.equal(started[f"backbone.{name}"], weights[name])
    assert torch.equal(init_weights(str(folder / "model" / "model.safetensors"))["norm.bias"], weights["norm.bias"])

    monkeypatch.setattr(sys, "argv", ["pretrain", str(folder), "--data", str(digits())])
    classification.main(pretrain.PAPER)


def test_an_interrupted_pretraining_ends_like_an_uninterrupted_one(tmp_path):
    def go(out, **more):
        return pretrain.train(
            "pretrain_tiny", dataclasses.replace(DIGITS, batch=480, mixup=0.5),
            run.Options(out=tmp_path / out, log_every=1, **more), WORLD,
        )

    whole = go("whole")
    parts = go("parts", stop_at=1)
    assert go("parts", resume="auto") == parts and _scores(parts) == _scores(whole)
    losses = [[row["loss"] for row in _steps(f)] for f in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_data_sets_without_splits_are_held_out_whole(tmp_path, data):
    (tmp_path / "GOT-10k").symlink_to(data)
    otb = tmp_path / "OTB" / "Box"
    (otb / "img").mkdir(parents=True)
    for number, file in enumerate(sorted((data / "val" / "GOT-10k_Val_000001").glob("*.jpg")), 1):
        (otb / "img" / f"{number:04d}.jpg").symlink_to(file)
    (otb / "groundtruth_rect.txt").write_text("\n".join(["20,30,40,50"] * 20) + "\n")
    shutil.copytree(data / "train", tmp_path / "LaSOT", symlinks=True)  # one split alone is all there is
    recipe = dataclasses.replace(LIVELY, datasets=("lasot",), held_out=("otb",))
    found = pairs.open_data(recipe, tmp_path)
    assert [s.name for s in found.test] == ["Box"] and not found.val and len(found.train["lasot"]) == 3
    assert found.describe("mine") == "mine: 3 training sequences, 1 test sequences"
    with pytest.raises(run.UserError, match="no folder for vot; it has got10k, lasot, otb"):
        pairs.open_data(dataclasses.replace(recipe, held_out=("vot",)), tmp_path)
    folder = _train(tmp_path / "runs", tmp_path, dataclasses.replace(recipe, epochs=1))
    assert {"otb auc", "otb/Box auc"} <= _scores(folder).keys()


def test_a_comparison_goes_on_where_it_was_killed(tmp_path, data):
    recipe = dataclasses.replace(
        RECIPES["ablation"], compare=("cab0", "local"), epochs=1, pairs_per_epoch=4, batch=2, val_pairs=2,
    )
    options = run.Options(data=data, out=tmp_path, seed=5, seeds=(5, 6))
    stopping = dataclasses.replace(options, stop_at=1)
    folder = compare.compare("ablation", recipe, stopping, WORLD, train.train)
    assert not (folder / "results.json").exists()
    going_on = dataclasses.replace(options, resume="auto")
    assert compare.compare("ablation", recipe, going_on, WORLD, train.train) == folder
    every = sorted(folder.glob("seed*/dualtfr/*/*"))
    assert len(every) == 4 and all((home / "results.json").exists() for home in every)
    one = [_scores(home)["got10k ao"] for home in sorted(folder.glob("seed*/dualtfr/local/*"))]
    (row,) = [m for m in _results(folder)["metrics"] if m["name"] == "local got10k ao"]
    assert row["value"] == pytest.approx(np.mean(one)) and row["spread"] == pytest.approx(np.std(one, ddof=1))
    assert row["seeds"] == [5, 6]
    assert "| local |" in (folder / "report.md").read_text()
    assert {p.name for p in folder.glob("*.png")} == {"compare.png"}


def test_a_comparison_needs_a_validation_split(tmp_path, data):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train").symlink_to(data / "train")
    with pytest.raises(run.UserError, match="scored on a validation split"):
        compare.compare("ablation", RECIPES["ablation"], run.Options(data=alone, out=tmp_path), WORLD, train.train)


def test_members_are_the_networks_they_claim_to_be():
    recipe = dataclasses.replace(RECIPES["ablation"], compare_init="some/run")
    members = compare.members(recipe)
    assert list(members) == list(compare.MEMBERS)
    built = {name: build(member) for name, member in members.items()}
    orders = {name: "".join(type(layer).__name__[0] for layer in model.layers()) for name, model in built.items()}
    # after patches, two stages and the last merging; without the code of positions (P, or I for none) and the norm
    assert {name: order[4:-1].translate({80: None, 73: None}) for name, order in orders.items()} == {
        "cab0": "GG", "cab1": "GGC", "cab2": "GGCC", "cab4": "GGCCCC", "early": "CCCCGG", "between": "GCCGCC",
        "local": "LLCCCC", "no_bias": "GGCCCC", "no_reference": "GGCCCC", "no_position": "GGCCCC",
        "pretrained": "GGCCCC",
    }
    assert members["pretrained"].init == "some/run" and members["cab4"].init is None


def test_the_readmes_table_of_a_comparison():
    metrics = [
        run.metric("cab0, got10k ao", 20.0, "%") | {"seeds": [3]}, run.metric("cab0, pairs iou", 50.0, "%"),
        run.metric("cab0, parameters", 1234, ""),
    ]
    records = [{"recipe": name, "data": f"data of {name}", "metrics": metrics} for name in ("ablation", "tiny")]
    text = compare.README_PARTS["compare"](records)
    assert "| no CAB: the branches never meet | 20.0 | 50.0 | 1,234 |" in text and "One run of each, seed 3" in text
    assert "data of ablation:" in text and "data of tiny" not in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_training_can_be_planned(name):
    work = cases.training_cost(RECIPES[name])
    outputs = work.model(*work.inputs)
    assert (outputs if isinstance(RECIPES[name], Pretrain) else outputs.boxes).shape[0] == 1
    if name == "ablation":
        assert work.epochs == RECIPES[name].epochs * 3 * len(RECIPES[name].compare)


def test_bench_times_the_parts_of_the_network(monkeypatch, tmp_path, capsys):
    argv = ["bench", "--variant", "dualtfr_micro", "--seconds", "0.01", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what is timed, not how fast
    bench.main()
    (record,), (page,) = tmp_path.glob("dualtfr_micro_*.json"), tmp_path.glob("dualtfr_micro_*.md")
    found = json.loads(record.read_text())
    rows = {row["case"]: row["seconds"] for row in found["records"]}
    assert {case: list(ways) for case, ways in rows.items() if len(ways) > 1} == {
        "whole frame": ["eager", "compile"], "network": ["template cached", "template anew", "part by part"],
    }
    assert list(rows)[2:] == [
        "crop", "patch embedding", "stage 1, 2 LAB", "stage 2, 2 LAB", "stage 3, 2 GAB", "position and 4 CABs", "head",
        "best token",
    ]
    assert all(seconds > 0 for ways in rows.values() for seconds in ways.values())
    flops = bench.frame_multiply_adds(build(RECIPES["tiny"]), RECIPES["tiny"])
    assert 0 < flops < 31_924_224 and f", {flops / 1e6:,.0f} M multiply-adds" in found["stamp"]  # without the template
    assert "| head |" in page.read_text() and found["environment"]["command"] in page.read_text()
    monkeypatch.setattr(sys, "argv", ["bench", "--variant", "huge"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "dualtfr_micro" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["full"], "meant for GOT-10k, LaSOT, TrackingNet, COCO: give its folder with --data"),
    (["pretrain"], "meant for ImageNet-1K: give its folder with --data"),
    (["tiny", "--data", "/nowhere"], "no data folder /nowhere"),
    (["tiny", "--batch", "4000"], "larger than the 3200"),
    (["tiny", "--search-px", "60"], "expected multiples of the network's stride, 8"),
    (["tiny", "--search-px", "96"], "--search-px 96: a map of 12x12 tokens"),
    (["tiny", "--model", "dualtfr_huge"], "no variant 'dualtfr_huge'; there are dualtfr, dualtfr_micro"),
    (["tiny", "--val-pairs", "0"], "0 samples of val are asked for: expected at least 1"),
    (["tiny", "--init", "resnet9000"], "a run folder, a file of weights or the name of a timm model"),
    (["tiny", "--init", "/nowhere/swin.safetensors"], "no checkpoint at /nowhere/swin.safetensors"),
    (["tiny", "--shares", "0.5", "0.5"], "expected a probability above 0 for each of got10k"),
    (["tiny", "--resume", "/nowhere"], "not a run folder"),
    (["tiny", "--device", "cuda"], "no CUDA device"),
    (["ablation", "--compare", "cab9"], "no member 'cab9' in --compare; there are cab0, cab1"),
    (["ablation", "--compare", "pretrained"], "needs --compare-init"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("papers.dualtfr", run_name="__main__")
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_data_are_looked_at_before_weights_are_sought(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "init_weights", lambda *_: pytest.fail("weights first"))
    with pytest.raises(run.UserError, match=r"no data folder|has no folder for"):
        _train(tmp_path / "runs", tmp_path / "nowhere", RECIPES["got10k"])
    assert not (tmp_path / "runs").exists()
