"""The trainer: whole runs of a few steps."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from common import run
from common.data import pairs
from common.data.tiny.sequences import sequences
from common.metrics import trackers
from common.metrics.trackers import demo
from papers.maml_tracker import bench, cases, compare, train
from papers.maml_tracker.data import VideoSets, support_set, target_set
from papers.maml_tracker.evaluate import PAPER, build
from papers.maml_tracker.maml import multi_step_weights
from papers.maml_tracker.recipes import RECIPES, members

WORLD = run.World(0, 1, torch.device("cpu"), None)
# 2 steps of detection, 3 of meta-training, on a network that is quick.
SHORT = dataclasses.replace(
    RECIPES["smoke"], head_width=8, head_depth=1, crop_px=63, anchor_px=16, shift_px=15.0, inner_steps=2,
    pairs_per_epoch=4, batch=4, detection_epochs=2, epochs=3, milestones=(2,), val_pairs=2,
)


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    """The built-in set with a single, shorter validation video."""
    root = tmp_path_factory.mktemp("data")
    (root / "train").symlink_to(sequences() / "train")
    name = (sequences() / "val" / "list.txt").read_text().split()[0]
    (root / "val" / name).mkdir(parents=True)
    (root / "val" / "list.txt").write_text(name + "\n")
    for file in (sequences() / "val" / name).iterdir():
        if file.suffix == ".jpg" and int(file.stem) <= 20:
            (root / "val" / name / file.name).symlink_to(file)
        elif file.suffix in (".txt", ".label"):
            kept = file.read_text().splitlines()[:20]
            (root / "val" / name / file.name).write_text("\n".join(kept) + "\n")
    return root


def _train(out, data, recipe=SHORT, report=False, **options):
    options = {"workers": 0, "log_every": 1, **options}
    return train.train("smoke", recipe, run.Options(out=out, data=data, **options), WORLD, report=report)


def _steps(folder):
    """The rows of steps, without those of validations."""
    return [row for row in run.read_log(folder) if "loss" in row]


def _weights(folder):
    step, weights, _ = run.load_checkpoint(folder)
    return step, weights["model"]


def test_a_frozen_backbone_stays_what_it_was_in_either_stage(tmp_path, two_videos):
    recipe = dataclasses.replace(SHORT, backbone="lite0_levels", frozen=True, epochs=1, batch=2, val_pairs=0)
    run.seed_all(0)
    before = build(recipe).state_dict()
    _, after = _weights(_train(tmp_path, two_videos, recipe))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and not any("backbone" in key for key in moved)


def test_resumed_equals_uninterrupted(tmp_path, two_videos):
    whole = _train(tmp_path / "whole", two_videos)
    for stop in (1, 3):  # in either stage
        parts = _train(tmp_path / "parts", two_videos, stop_at=stop, resume="auto", checkpoint_every=1)
        assert not (parts / "results.json").exists()
    *rows, owed = (parts / "log.jsonl").read_text().splitlines()  # as if killed between checkpoint and validation
    assert "val/after_5" in owed
    (parts / "log.jsonl").write_text("\n".join([*rows, ""]))
    parts = _train(tmp_path / "parts", two_videos, resume="auto", checkpoint_every=1)
    (step, a), (_, b) = _weights(whole), _weights(parts)
    assert step == 5 and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    logs = [[row | {"samples_per_s": 0} for row in run.read_log(f)] for f in (whole, parts)]
    assert logs[0] == logs[1] and ["val/after_5" in row for row in logs[0]] == [True] * 5
    assert _train(tmp_path / "sparse", two_videos, dataclasses.replace(SHORT, eval_every=3), checkpoint_every=9)
    (sparse,) = tmp_path.glob("sparse/*/*/*")
    assert [row["step"] for row in run.read_log(sparse) if "val/after_5" in row] == [3, 5]
    results = [json.loads((f / "results.json").read_text())["metrics"] for f in (whole, parts)]
    assert results[0] == results[1] and results[0][0]["name"] == "loss"


def test_stages_and_rates(tmp_path, two_videos):
    folder = _train(tmp_path, two_videos)
    rows = _steps(folder)
    assert [("after_2" in row) for row in rows] == [False, False, True, True, True]
    assert [row["rate"] == pytest.approx(0.01) for row in rows] == [True, True, False, False, False]
    assert [row["lr"] for row in rows] == pytest.approx([0.02] * 4 + [0.002])
    assert rows[-1]["loss"] == pytest.approx(sum(rows[-1][f"after_{j}"] for j in range(3)) / 3)
    before, (_, after) = run.load_weights(folder / "detection.safetensors"), _weights(folder)
    rates = [key for key in before if key.startswith("rates")]
    assert all(torch.equal(before[key], torch.full_like(before[key], 0.01)) for key in rates)
    assert all((after[key] >= 0).all() for key in rates)
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert any(key.startswith("rates") for key in moved) and any("_first" in key for key in moved)
    assert not any("backbone" in key for key in moved)  # frozen after the detection stage, which trains it
    run.seed_all(0)
    assert not torch.equal(before["detector.backbone.conv1.weight"], build(SHORT).detector.backbone.conv1.weight)

    # Another run can begin where this one's first stage ended.
    began = dataclasses.replace(SHORT, init=str(folder / "detection.safetensors"), detection_epochs=0, epochs=1)
    again = _train(tmp_path / "again", two_videos, began, stop_at=1)
    assert run.read_log(again)[0]["after_0"] > 0
    wrong = dataclasses.replace(began, head="fcos")
    with pytest.raises(run.UserError, match="does not fit the recipe's detector"):
        _train(tmp_path / "wrong", two_videos, wrong)


@pytest.mark.parametrize("changes", [
    {"second_order": False, "multi_step": "last"}, {"granularity": "per_filter", "multi_step": "annealed"},
    {"checkpointing": True, "head": "fcos"}, {"rate_lr": 0.0}, {"inner_steps": 0},
])
def test_every_variant_trains(tmp_path, two_videos, changes):
    recipe = dataclasses.replace(SHORT, **changes)
    folder = _train(tmp_path, two_videos, recipe, stop_at=4)
    last = _steps(folder)[-1]
    assert last["step"] == 4 and last["grad_norm"] > 0
    assert (last["rate"] == pytest.approx(0.01)) == (changes.get("rate_lr") == 0.0 or changes.get("inner_steps") == 0)


def test_one_video_is_learned_by_heart():
    torch.manual_seed(0)
    data, recipe = pairs.open_data(SHORT, sequences()), dataclasses.replace(SHORT, negatives=0.0)

    sample = pairs.Pairs(data.train, VideoSets(recipe), length=1, max_gap=5)[0, 0]
    batch = {key: value[None] for key, value in sample.items()}
    support, target = support_set(batch, 0, WORLD.device), target_set(batch, slice(0, 1), WORLD.device)
    maml, gamma = build(recipe), multi_step_weights("uniform", 2)
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(maml(support, target, gamma) @ gamma)
        losses[-1].backward()
        optimizer.step()
        maml.clamp_rates()
    assert losses[-1] < 0.35 * losses[0]


def test_a_chunked_detection_stage_is_the_same(tmp_path, two_videos):
    losses = []
    for micro_batch in (0, 3):
        folder = _train(tmp_path / str(micro_batch), two_videos, micro_batch=micro_batch, stop_at=3)
        losses.append([row["loss"] for row in _steps(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, two_videos):
    logs = {}
    size = ["--head-width", "8", "--crop-px", "63", "--anchor-px", "16", "--val-pairs", "2", "--pairs-per-epoch", "8"]
    for processes in (1, 2):
        launch = ["-m"] if processes == 1 else ["-m", "common.run.launch", "2"]
        command = [sys.executable, *launch, "papers.maml_tracker.train", "smoke", *size, "--data", two_videos,
                   "--out", tmp_path / str(processes), "--log-every", "1", "--device", "cpu"]
        subprocess.run(
            [str(word) for word in command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=run.ROOT,
            capture_output=True,
        )
        (folder,) = (tmp_path / str(processes)).glob("maml_tracker/smoke/*")
        logs[processes] = run.read_log(folder)
    assert len(logs[1]) == len(logs[2]) == 4  # two of them with what validation says
    for one, two in zip(logs[1], logs[2]):
        if "loss" not in one:
            continue
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert logs[2][-1]["val/after_5"] == pytest.approx(logs[1][-1]["val/after_5"], rel=1e-2)


def test_a_loss_that_explodes_stops_the_run_before_the_weights_are_touched(tmp_path, two_videos):
    recipe = dataclasses.replace(SHORT, rate=1e30)
    with pytest.raises(run.UserError, match=r"not finite at step 3.*Lower --rate"):
        _train(tmp_path, two_videos, recipe, checkpoint_every=1)
    (folder,) = tmp_path.glob("maml_tracker/smoke/*")
    step, weights = _weights(folder)
    assert step == 2 and all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_is_reported_evaluated_and_shown(tmp_path, two_videos, monkeypatch, capsys):
    folder = _train(tmp_path, two_videos, report=True)
    results = json.loads((folder / "results.json").read_text())
    baselines = [f"got10k ao, {label}" for label in trackers.BASELINES]
    assert [m["name"] for m in results["metrics"]] == [
        "got10k ao", *baselines, "got10k fps", "got10k fps_model"]
    assert not any(m["comparable"] for m in results["metrics"])
    assert {p.name for p in folder.glob("*.png")} == {
        "curves.png", "gradient_steps.png", "responses.png", "tracks.png"}
    assert "![tracks](tracks.png)" in (folder / "report.md").read_text()

    monkeypatch.setattr(sys, "argv", [
        "evaluate", str(folder), "--data", str(two_videos), "--split", "val", "--out", str(tmp_path / "scores")])
    trackers.main(PAPER)
    again = json.loads((tmp_path / "scores" / "evaluation.json").read_text())["metrics"]
    assert again[0]["value"] == results["metrics"][0]["value"]
    weights = run.load_weights(folder / "checkpoints" / "step_00000005" / "model.safetensors")
    run.save_weights(tmp_path / "file.safetensors", weights)
    with pytest.raises(run.UserError, match="does not fit the recipe tiny"):
        PAPER.load(tmp_path / "file.safetensors", "tiny", WORLD)

    monkeypatch.setattr(sys, "argv", [
        "demo", "--checkpoint", str(folder), "--frames", "4", "--out", str(tmp_path / "answer.gif")])
    demo.main(PAPER)
    assert (tmp_path / "answer.gif").stat().st_size > 1000 and (tmp_path / "answer.png").exists()


COMPARISON = dataclasses.replace(
    SHORT, compare=("detection", "detection_long", "maml", "fixed_rate"), epochs=1, milestones=(),
)


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_was_killed(tmp_path, two_videos, monkeypatch):
    def go_on(**options):
        options = {"seeds": (0, 1), "resume": "auto", **options}
        return compare.compare(
            "smoke", COMPARISON, run.Options(out=tmp_path, data=two_videos, **options), WORLD, train.train)

    folder = go_on(stop_at=2)
    (first,) = folder.glob("seed0/maml_tracker/detection/*/results.json")
    run.write_json(first, run.read_json(first) | {"peak_mem_bytes": 2**50})
    write_results = run.results.write_results

    def killed(folder, results, table=""):
        write_results(folder, results, table)
        if results["recipe"] == "smoke":
            raise KeyboardInterrupt

    monkeypatch.setattr("common.run.results.write_results", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    monkeypatch.undo()
    assert "| fixed_rate |" in (folder / "report.md").read_text()  # the table comes with the results
    assert go_on() == folder and (folder / "results.json").exists()
    results = run.read_json(folder / "results.json")
    assert results["peak_mem_bytes"] == 2**50  # of the runs, not of this process
    metrics = {m["name"]: m for m in results["metrics"]}
    assert next(iter(metrics)) == "detection score" and metrics["maml score"]["seeds"] == [0, 1]
    assert metrics["maml no steps"]["value"] >= 0 and "fixed_rate no steps" not in metrics
    for label in trackers.BASELINES:
        assert "seeds" not in metrics[f"{label} score"]
    rates = {"detection": [], "fixed_rate": []}
    for seed in (0, 1):  # meta-training starts from the rate that was chosen for the detector, and keeps it if told so
        for label, its in rates.items():
            (kept,) = folder.glob(f"seed{seed}/maml_tracker/{label}/*/scores.json")
            its.append(run.read_json(kept)["rate"])
        (config,) = folder.glob(f"seed{seed}/maml_tracker/maml/*/config.json")
        recipe = run.read_json(config)["recipe"]
        assert recipe["rate"] == rates["detection"][-1] and f"seed{seed}/maml_tracker/detection" in recipe["init"]
    assert rates["detection"] == rates["fixed_rate"] and set(rates["detection"]) <= set(compare.RATES)
    part = compare.README_PARTS["compare"]([results | {"recipe": "comparison"}])
    assert "| member | score | no steps | first frame only | accept 0.3 | loss after 0 |" in part
    assert "| fixed_rate |" in part


@pytest.mark.slow
def test_a_comparison_of_two_processes_stops_and_goes_on(tmp_path, two_videos):
    command = [
        sys.executable, "-m", "common.run.launch", "2", "papers.maml_tracker.train", "comparison", "--device", "cpu",
        "--compare", "detection", "maml", "--seeds", "0",
        "--data", two_videos, "--out", tmp_path, "--resume", "auto", "--head-width", "8", "--crop-px", "63",
        "--anchor-px", "16", "--val-pairs", "2", "--pairs-per-epoch", "4", "--batch", "4", "--detection-epochs", "2",
        "--epochs", "1",
    ]
    for more in (["--stop-at", "1"], []):
        subprocess.run(
            [str(word) for word in (*command, *more)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=run.ROOT, capture_output=True, timeout=600,
        )
        (folder,) = tmp_path.glob("maml_tracker/comparison/*")
        assert (folder / "results.json").exists() == (not more)
    assert "| maml |" in (folder / "report.md").read_text()


def test_boxes_of_other_weights_or_rates_are_not_kept(tmp_path, two_videos):
    home = _train(tmp_path, two_videos, dataclasses.replace(SHORT, epochs=0))
    data = pairs.open_data(SHORT, two_videos)

    def boxes(rate=None):
        tracker, _, settings, _ = PAPER.load(home, None, WORLD)
        if rate is not None:
            compare.set_rate(tracker.maml, rate)
        about = settings | {"rate": tracker.maml.mean_rate()}
        compare.score(tracker, tmp_path / "views", data, about, WORLD)
        return (next(tmp_path.glob("views/*/*.csv")).read_text()).splitlines()

    first = boxes()
    assert boxes() == first  # kept, seconds and all
    assert boxes(rate=0.0) != (second := boxes()) != first
    path = home / "checkpoints" / "step_00000002" / "model.safetensors"
    weights = run.load_weights(path)
    weights["detector.head.box.bias"] += 0.5
    run.save_weights(path, weights)
    assert boxes() != second


def test_the_ways_that_the_benchmark_times_agree():
    recipe = dataclasses.replace(SHORT, buffer=2, inner_steps=4, head_width=32, head_depth=3)
    timed = list(bench.everything(recipe, "cpu", torch.float32, 1))
    assert [list(case.ways) for case in timed[:3]] == [["checkpointed", "whole graph"], ["whole graph"], ["eager"]]
    assert all(set(run.bench.check_parity(case)) == set(case.ways) for case in timed) and len(timed) == 7
    peaks = timed[0].about["peak_bytes"]
    assert peaks["checkpointed"] < 0.8 * peaks["whole graph"]


def test_a_plan_counts_both_stages_all_members_and_seeds():
    cost = cases.training_cost(RECIPES["retina"])  # 5 epochs of one crop a pair, 20 of the 17 that four steps look at
    assert cost.epochs == 25 and len(cost.inputs[0]) == 14 == -(-(5 + 20 * 17) // 25)
    recipe = RECIPES["comparison"]
    found = members(recipe)
    assert {label: (each.detection_epochs, each.epochs) for label, each in found.items()} == {
        "detection": (10, 0), "detection_long": (0, 80), "maml": (0, 4), "last_step": (0, 4), "fixed_rate": (0, 4)}
    cost = cases.training_cost(recipe)
    assert cost.epochs == 3 * (10 + 80 + 3 * 4)
    crops = 3 * (10 + 80 + 3 * 4 * 17)
    assert crops <= len(cost.inputs[0]) * cost.epochs < crops + cost.epochs


@pytest.mark.parametrize("argv, message", [
    (["retina"], "meant for LaSOT, GOT-10k, TrackingNet, COCO: give its folder with --data"),
    (["tiny", "--data", "/nowhere"], "no data folder /nowhere"),
    (["real_small", "--data", "/nowhere"], "no folder for coco, got10k, lasot, otb, vot"),
    (["tiny", "--batch", "4000"], "larger than the 320"),
    (["tiny", "--head", "yolo"], "no 'yolo'; there are retina, fcos"),
    (["tiny", "--imagenet"], "the narrow backbone has no ImageNet weights"),
    (["tiny", "--init", "/nowhere.pth"], "no checkpoint at /nowhere.pth"),
    (["tiny", "--shares", "0.5", "0.5"], "expected a probability above 0 for each of got10k"),
    (["tiny", "--resume", "/nowhere"], "not a run folder"),
    (["tiny", "--granularity", "per_pixel"], "per_tensor, per_filter"),
    (["tiny", "--multi-step", "none"], "uniform, annealed, last"),
    (["tiny", "--speed", "fast"], "eager, compile"),
    (["tiny", "--compile"], "cannot differentiate twice"),
    (["comparison", "--compare", "detection", "x"], "no member 'x' in --compare; there are detection, detection_long"),
    (["comparison", "--compare", "maml"], "put it first in --compare, not 'maml'"),
    (["comparison", "--val-pairs", "0"], "--val-pairs must be above 0"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        run.door("maml_tracker", RECIPES, train.train, compare.compare)
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_data_are_looked_at_before_weights_are_sought(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda *_, **__: pytest.fail("weights first"))
    with pytest.raises(run.UserError, match=r"no data folder|has no folder for"):
        _train(tmp_path / "runs", tmp_path / "nowhere", RECIPES["retina"])
    assert not (tmp_path / "runs").exists()
