"""CtP's trainer: learns, resumes exactly, shares a batch, passes backbones on, compares, and refuses bad input."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from common import run
from common.data import video
from common.data.tiny.clips import clips
from papers.ctp import baselines, bench, cases, compare, data, demo, evaluate, train
from papers.ctp.model import Backbone
from papers.ctp.official import export, load_backbone, load_export
from papers.ctp.recipes import BASELINES, RECIPES
from papers.ctp.scripts import shrink_videos

WORLD = run.World(0, 1, torch.device("cpu"), None)
SMALL = dataclasses.replace(RECIPES["smoke"], batch=16, test_clips=2)
ACTIONS = dataclasses.replace(RECIPES["tiny_recognize"], batch=16, epochs=1, eval_every=1, test_clips=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A ninth of the clips, as a list."""
    whole, part = clips(), tmp_path_factory.mktemp("clips")
    for split, every in (("train", 6), ("val", 12)):
        videos = video.open_videos(whole, split)
        rows = [f"{videos.paths[i]} {videos.labels[i]}\n" for i in range(0, len(videos), every)]
        (part / f"{split}.txt").write_text("".join(rows))
    (part / "classes.txt").write_text("\n".join(videos.classes))
    return part


def _train(tmp_path, tiny, recipe=SMALL, **options):
    return train.train("smoke", recipe, run.Options(data=tiny, out=tmp_path, log_every=1, **options), WORLD)


def _scores(folder):
    return {m["name"]: m["value"] for m in json.loads((folder / "results.json").read_text())["metrics"]}


def test_a_game_is_learned_by_heart(tiny):
    """Sixteen fixed games: the loss falls far below that of boxes which never move."""
    videos = video.open_videos(tiny, "train")
    games = data.training_clips(videos, SMALL, seed=0)
    sample = torch.utils.data.default_collate([games[i][0] for i in range(16)])
    torch.manual_seed(0)
    model = evaluate.build(SMALL, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        terms = evaluate.losses_of(SMALL, model, sample, None)
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 40)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(terms.values()).item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize("method", ["ctp", *BASELINES, "recognize"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, tiny, method):
    recipe = ACTIONS if method == "recognize" else (
        compare.contender(dataclasses.replace(SMALL, queue=32), method)
    )
    whole = _train(tmp_path / "whole", tiny, recipe)
    parts = _train(tmp_path / "parts", tiny, recipe, stop_at=2, resume="auto")
    assert not (parts / "results.json").exists()
    assert _train(tmp_path / "parts", tiny, recipe, resume=str(parts), workers=1) == parts
    (_, ours, _), (_, theirs, _) = run.load_checkpoint(whole), run.load_checkpoint(parts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [row["loss"] for row in run.read_log(whole)] == [row["loss"] for row in run.read_log(parts)]
    assert _scores(whole) == _scores(parts) and len(run.read_log(whole)) == 3
    assert not any(m["comparable"] for m in json.loads((whole / "results.json").read_text())["metrics"])


def test_what_a_run_leaves(tmp_path, tiny, monkeypatch):
    folder = _train(tmp_path, tiny)
    names = {"curves.png", "tracks.png", "tracks.gif", "tracks.mp4", "best.safetensors", "report.md", "results.json"}
    assert names <= {p.name for p in folder.iterdir()}
    with video.open_video(folder / "tracks.mp4") as opened:
        assert len(opened) == SMALL.frames
    scores = _scores(folder)
    assert list(scores) == ["iou", "iou_hidden", "iou_still", "centre", "size"]
    assert 0 < scores["iou"] < 1 and 0 < scores["iou_still"] < 1

    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--data", str(tiny), "--out", str(tmp_path / "s.json")])
    evaluate.main()
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "s.json").read_text())["metrics"]}
    assert again == scores

    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", str(folder), "--out", str(tmp_path / "seen.mp4")])
    demo.main()
    with video.open_video(tmp_path / "seen.mp4") as opened:
        assert len(opened) == SMALL.frames


def test_a_backbone_is_passed_on(tmp_path, tiny):
    pretrained = _train(tmp_path / "before", tiny)
    _, weights, _ = run.load_checkpoint(pretrained)
    for source in (pretrained, pretrained / "model" / "backbone.safetensors", pretrained / "best.safetensors"):
        model = evaluate.build(ACTIONS, 8)
        load_backbone(model.backbone, source)
    exported = load_export(pretrained / "model").state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, weights["model"][f"backbone.{name}"]), name
    # The classifier alone is new.
    assert {k.removeprefix("backbone.") for k in model.state_dict()} - set(exported) == {"fc.weight", "fc.bias"}

    one, other = (
        _train(tmp_path / str(i), tiny, dataclasses.replace(ACTIONS, init=init, lr=0.0), stop_at=0)
        for i, init in enumerate((str(pretrained), ""))
    )
    stems = [run.load_checkpoint(f)[1]["model"]["backbone.stem.0.weight"] for f in (one, other)]
    assert torch.equal(stems[0], exported["stem.0.weight"]) and not torch.equal(*stems)


def test_an_exported_network_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    backbone = Backbone("r3d18").train()
    with torch.no_grad():
        backbone(torch.randn(2, 3, 4, 32, 32))  # running statistics that are not 0 and 1
    backbone.eval()
    export(backbone, "r3d18", tmp_path / "model")
    theirs = torchvision.models.video.r3d_18().eval()
    missing = theirs.load_state_dict(run.load_weights(tmp_path / "model" / "torchvision.safetensors"), strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys
    theirs.fc = torch.nn.Identity()
    clip = torch.randn(2, 3, 8, 40, 48)
    with torch.no_grad():
        torch.testing.assert_close(theirs(clip), backbone(clip).mean((2, 3, 4)), rtol=1e-4, atol=1e-5)


def test_a_trained_backbone_is_judged(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny_recognize", ACTIONS)
    folder = _train(tmp_path, tiny, dataclasses.replace(SMALL, downstream="tiny_recognize"))
    scores = _scores(folder)
    for label in ("", "random "):
        assert all(0 <= scores[f"{label}{key}"] <= 100 for key in ("probe_top1", "R@1", "R@5", "finetune_top1"))
    assert len(list(folder.glob("downstream/*/ctp/tiny_recognize/*/results.json"))) == 2

    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--data", str(tiny), "--task", "features",
                                      "--out", str(tmp_path / "s.json")])
    evaluate.main()
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "s.json").read_text())["metrics"]}
    assert again == {key: scores[key] for key in again} and "probe_top1" in again


def test_a_comparison_goes_on_where_it_was_killed(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny_recognize", ACTIONS)
    recipe = dataclasses.replace(
        RECIPES["compare"], contenders=("random", "ctp", "rotation"), seeds=1, epochs=1, batch=16, eval_every=1,
    )
    options = run.Options(data=tiny, out=tmp_path, seed=3)
    folder = compare.compare("compare", recipe, dataclasses.replace(options, stop_at=2), WORLD)
    assert not (folder / "results.json").exists()
    assert compare.compare("compare", recipe, dataclasses.replace(options, resume="auto"), WORLD) == folder
    scores = _scores(folder)
    assert next(iter(scores)) == "ctp finetune_top1"
    assert {"ctp iou", "rotation own_top1", "random finetune_top1", "random probe_top1"} <= set(scores)
    assert "random iou" not in scores and "rotation iou" not in scores
    results = json.loads((folder / "results.json").read_text())
    assert compare.table(results["metrics"]) in (folder / "report.md").read_text()


def test_accumulation_is_the_whole_batch(tmp_path, tiny):
    """The first loss is computed before any step: chunks differ only in what batch normalisation sees."""
    rows = [run.read_log(_train(tmp_path / str(n), tiny, micro_batch=n, stop_at=1)) for n in (0, 4)]
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=0.02)


def test_mocos_keys_move_once_a_step_however_it_is_cut(tmp_path, tiny, monkeypatch):
    calls = []

    def listen(name, plain):
        def heard(self, *clips):
            if self.training:
                calls.append((name, int(self.queue_ptr)))
            return plain(self, *clips)

        monkeypatch.setattr(baselines.MoCo, name, heard)

    for name in ("update_keys", "forward", "enqueue"):
        listen(name, getattr(baselines.MoCo, name))
    _train(tmp_path, tiny, dataclasses.replace(SMALL, method="moco", queue=40), micro_batch=4, stop_at=2)
    assert calls == [(name, at) for at in (0, 16) for name in ("update_keys", *4 * ["forward"], "enqueue")]


def test_learning_rates_of_the_authors_runs():
    """Something-Something: up from a tenth over the first 1000 iterations, which count; a tenth from epoch 40 on."""
    recipe, per_epoch = RECIPES["ssv1_r3d18_finetune"], 100

    def rate(step):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr)
        train.scheduler(optimizer, recipe, per_epoch).step_update(step - 1)
        return optimizer.param_groups[0]["lr"]

    for step, expected in (
        (1, 0.001), (501, 0.0055), (1000, 0.01 - 0.009 / 1000), (1001, 0.01), (4000, 0.01), (4001, 1e-3), (6000, 1e-3),
        (6001, 1e-4), (8000, 1e-4), (8001, 1e-5), (9000, 1e-5),
    ):
        assert rate(step) == pytest.approx(expected), step


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ctp", "moco"])
def test_two_processes_share_a_batch(tmp_path, tiny, method):
    """Batch normalisation sees half the batch each on CPUs, so losses are near, not equal; the data are the same."""
    changes = ["--data", tiny, "--batch", "16", "--epochs", "1", "--log-every", "1"]
    changes += ["--method", "moco", "--queue", "32"] if method == "moco" else []
    logs = {}
    for processes in (1, 2):
        launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launch, "-m", "papers.ctp.train", "smoke", "--out", tmp_path / str(processes)]
        subprocess.run([str(word) for word in command + changes], check=True, cwd=run.ROOT, capture_output=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        (folder,) = (tmp_path / str(processes)).glob("ctp/smoke/*")
        logs[processes] = run.read_log(folder)
    assert len(logs[1]) == len(logs[2]) == 3
    assert logs[2][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=0.1)
    if method == "ctp":
        assert logs[2][-1]["val/iou_still"] == pytest.approx(logs[1][-1]["val/iou_still"], abs=1e-6)


def test_a_loss_that_explodes_stops_the_run(tmp_path, tiny):
    with pytest.raises(run.UserError, match="not finite"):
        _train(tmp_path, tiny, dataclasses.replace(SMALL, lr=1e20, clip_norm=1e20, warmup_steps=0))


@pytest.mark.parametrize("main, argv, message", [
    (train.main, ["ucf101_r3d18"], "meant for UCF101: give its folder with --data"),
    (train.main, ["tiny", "--batch", "999"], "larger than the 288 training samples"),
    (train.main, ["tiny", "--init", "gone.pth"], "no checkpoint at gone.pth"),
    (train.main, ["compare", "--contenders", "ctp", "magic"], "no contender 'magic'"),
    (evaluate.main, ["gone"], "no checkpoint at gone"),
    (evaluate.main, ["WEIGHTS", "--recipe", "tiny_recognize"], "does not fit recognize r3d18"),
    (evaluate.main, ["WEIGHTS"], "needs --recipe"),
    (demo.main, [], "no finished run"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, main, argv, message):
    if "WEIGHTS" in argv:  # of a wider model
        run.save_weights(tmp_path / "w.safetensors", Backbone(width=24).state_dict())
        argv = [str(tmp_path / "w.safetensors"), *argv[1:]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main", *argv])
    with pytest.raises(SystemExit) as exit:
        run.main(main)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and message in line
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run behind"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_training_can_be_planned(name):
    work = cases.training_cost(RECIPES[name])
    assert work.model(*work.inputs).shape[0] == 1 and work.samples >= work.batch


def test_recipes_are_the_authors():
    for name, recipe in RECIPES.items():
        if recipe.dataset in ("clips", "real videos"):
            continue
        assert (recipe.batch, recipe.clip_norm, recipe.size_px, recipe.width) == (32, 40, 112, 64), name
        assert recipe.lr == (0.001 if "vcop" in name else 0.01) and recipe.head_std == 0.001, name
        assert recipe.weight_decay == (5e-4 if name.endswith("finetune") else 1e-4), name
    assert RECIPES["ucf101_r3d18"].epochs == 300 and RECIPES["kinetics_r2plus1d18"].decay_epochs == (30, 60)
    ssv1 = RECIPES["ssv1_r3d18_finetune"]
    assert (ssv1.frames, ssv1.flip, ssv1.test_clips, ssv1.decay_epochs) == (32, 0.0, 1, (40, 60, 80))
    assert [data.wide_or_short(RECIPES["ucf101_r3d18_finetune"], s) for s in (112, 128, 144)] == [
        (149, 112), (171, 128), (192, 144)
    ]


def test_the_benchmark_times_clips_and_the_loader(tmp_path, tiny, monkeypatch, capsys):
    argv = ["bench", "--data", str(tiny), "--recipe", "tiny", "--clips", "3", "--workers", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    bench.main()
    (record,) = tmp_path.glob("ctp_clips_*.json")
    found = json.loads(record.read_text())
    assert found["clips per second, loaded"] > 0 and found["loading processes"] == 2
    assert set(found["milliseconds per clip"]) == {"open", "decode", "resize, crop, flip", "paste", "colour", "tensor"}
    assert f"with 2 processes on {bench.CORES} cores" in capsys.readouterr().out


def test_readme_shows_the_records():
    readme = Path(compare.__file__).with_name("README.md").read_text()
    assert compare.records() in readme, "stale: python -m papers.ctp.compare"


def test_videos_are_shrunk(tmp_path):
    sources = video.open_videos(clips(), "val").paths[:4]
    shrink_videos.main(tmp_path / "small", sources)
    train_videos, val = (video.open_videos(tmp_path / "small", split) for split in ("train", "val"))
    assert len(set(train_videos.paths)) == 3 and len(set(val.paths)) == 1 and len(val) == shrink_videos.TIMES
    with video.open_video(val.paths[0]) as small, video.open_video(sources[3]) as source:
        assert len(small) == len(source) and small.read([0]).shape == (1, 48, 58, 3)


def test_retrieval_on_a_known_case():
    x = np.eye(3)
    assert evaluate.recall_at(torch.from_numpy(x), torch.eye(3).bool(), (1,)) == {"R@1": 100}
