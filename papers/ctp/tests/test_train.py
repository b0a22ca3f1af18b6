"""CtP's trainer: learns, resumes exactly, shares a batch, passes backbones on, compares, and refuses bad input."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common import run
from common.data import video
from common.data.tiny.clips import clips
from common.run import results, shipped
from papers.ctp import baselines, bench, cases, compare, data, demo, evaluate, motion, train
from papers.ctp.model import Backbone
from papers.ctp.official import export, load_backbone
from papers.ctp.recipes import BASELINES, RECIPES
from papers.ctp.scripts import shrink_videos

DOOR = lambda: run.door("ctp", RECIPES, train.train, compare.compare)  # noqa: E731
WORLD = run.World(0, 1, torch.device("cpu"), None)
SMALL = dataclasses.replace(RECIPES["smoke"], batch=16, test_clips=2)
ACTIONS = dataclasses.replace(RECIPES["tiny_recognize"], batch=16, epochs=1, eval_every=0, test_clips=2)


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
        terms = train.losses_of(SMALL, model, sample, None)
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 40)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(terms.values()).item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize("method", ["ctp", *BASELINES, "recognize"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, tiny, method):
    recipe = ACTIONS if method == "recognize" else (
        compare.member(dataclasses.replace(SMALL, queue=32), method)
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
    names = {"curves.png", "tracks.png", "tracks.gif", "tracks.mp4", "model", "report.md", "results.json"}
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

    # as it is shipped, on a video of one's own: larger, on end
    frames = np.random.default_rng(0).integers(0, 255, (30, 192, 108, 3), dtype=np.uint8)
    video.write_video(tmp_path / "own.mp4", list(frames), fps=25)
    _, weights, state = run.load_checkpoint(folder)
    shipped.write(tmp_path / "w.safetensors", weights["model"], paper="ctp", recipe_name="smoke", recipe=SMALL,
                  classes=state["classes"], revision="0" * 40)
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / "own.mp4"), "--checkpoint",
                                      str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "own.gif")])
    demo.main()
    assert Image.open(tmp_path / "own.gif").n_frames == SMALL.frames


def test_a_backbone_is_passed_on(tmp_path, tiny):
    pretrained = _train(tmp_path / "before", tiny)
    _, weights, _ = run.load_checkpoint(pretrained)
    for source in (pretrained, pretrained / "model" / "backbone.safetensors"):
        model = evaluate.build(ACTIONS, 8)
        load_backbone(model.backbone, source)
        exported = model.backbone.state_dict()
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
    for label, home, init in (("", "ctp", str(folder)), ("random ", "random", "")):
        (tuned,) = folder.glob(f"downstream/{home}/ctp/tiny_recognize/*")
        assert scores[f"{label}finetune_top1"] == _scores(tuned)["top1"]
        assert json.loads((tuned / "config.json").read_text())["recipe"]["init"] == init
        assert all(scores[f"{label}{key}"] % (100 / 8) == 0 for key in ("probe_top1", "R@1", "R@5")), "of 8 videos"

    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--data", str(tiny), "--task", "features",
                                      "--out", str(tmp_path / "s.json")])
    evaluate.main()
    again = {m["name"]: m["value"] for m in json.loads((tmp_path / "s.json").read_text())["metrics"]}
    assert again == {key: scores[key] for key in again} and "probe_top1" in again


def test_neighbours_and_a_linear_classifier_by_hand(monkeypatch):
    """Four training videos; of two test videos one lies among those of its class, one among the others."""
    splits = {
        "train": ([[10.0, 0], [9, 1], [0, 10], [1, 9]], [0, 0, 1, 1]),
        "val": ([[50.0, 10], [1, 5]], [0, 0]),
    }
    monkeypatch.setattr(evaluate, "open_split", lambda _recipe, _data, split: SimpleNamespace(
        name=split, labels=splits[split][1], classes=["a", "b"]
    ))
    monkeypatch.setattr(evaluate, "features", lambda _, videos, *__, **___: np.array(splits[videos.name][0]))
    found = evaluate.frozen_scores("", ACTIONS, run.Options(), WORLD)
    assert found == {"probe_top1": 50, "R@1": 50} | {f"R@{k}": 100 for k in (5, 10, 20, 50)}


def test_a_comparison_goes_on_where_it_was_killed(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny_recognize", ACTIONS)
    monkeypatch.setattr(evaluate, "clips", lambda: tiny)  # what is fine-tuned learns the built-in clips
    monkeypatch.setattr(motion, "COUNTS", {"train": 24, "val": 16})
    recipe = dataclasses.replace(
        RECIPES["compare"], compare=("ctp", "rotation", "random"), epochs=1, batch=16, eval_every=0, width=8,
    )
    options = run.Options(data=tiny, out=tmp_path, seeds=(3,), resume="auto")

    def go_on(**changes):
        return compare.compare("compare", recipe, dataclasses.replace(options, **changes), WORLD, train.train)

    folder = go_on(stop_at=2)
    assert not (folder / "results.json").exists()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after results.json, before report.md
        patch.setattr(results, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    assert go_on() == folder
    scores = _scores(folder)
    assert next(iter(scores)) == "ctp camera_direction"
    assert {"ctp iou", "rotation own_top1", "random finetune_top1", "random object_shuffled"} <= set(scores)
    assert "random iou" not in scores and "rotation iou" not in scores
    found = json.loads((folder / "results.json").read_text())
    assert run.table(found["metrics"], compare.COLUMNS, "pre-training") in (folder / "report.md").read_text()
    assert "\n| pre-training | camera: direction, % |" in compare.README_PARTS["compare"]([found])


def test_a_comparisons_peak_memory_is_its_runs(tmp_path, tiny, monkeypatch):
    """Not that of the process which ends it, and which may have trained nothing."""
    monkeypatch.setitem(RECIPES, "tiny_recognize", ACTIONS)
    monkeypatch.setattr(evaluate, "clips", lambda: tiny)
    monkeypatch.setattr(motion, "COUNTS", {"train": 24, "val": 16})
    recipe = dataclasses.replace(RECIPES["compare"], compare=("random",), epochs=1, batch=16, width=8)
    options = run.Options(data=tiny, out=tmp_path, seeds=(3,), resume="auto")
    folder = compare.compare("compare", recipe, options, WORLD, train.train)
    (own,) = folder.glob("seed3/ctp/random/*/results.json")
    own.write_text(json.dumps(json.loads(own.read_text()) | {"peak_mem_bytes": 2**50}))
    (folder / "results.json").unlink()
    assert compare.compare("compare", recipe, options, WORLD, train.train) == folder
    assert json.loads((folder / "results.json").read_text())["peak_mem_bytes"] == 2**50


def _still_statistics(recipe, classes, build=evaluate.build):
    """A network whose batch normalization does not depend on the batch."""
    model = build(recipe, classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def test_accumulation_is_the_whole_batch(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "build", _still_statistics)
    whole, parts = (run.read_log(_train(tmp_path / str(n), tiny, micro_batch=n, stop_at=1))[0] for n in (0, 5))
    for key in ("loss", "centre", "size", "grad_norm"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-5), key


def test_a_clip_norm_of_0_clips_nothing(tmp_path, tiny):
    unclipped, high = (
        run.load_checkpoint(_train(tmp_path / str(norm), tiny, dataclasses.replace(SMALL, clip_norm=norm), stop_at=1))
        for norm in (0.0, 1e9)
    )
    torch.testing.assert_close(unclipped[1], high[1], rtol=0, atol=0)
    run.seed_all(0)
    assert not torch.equal(unclipped[1]["model"]["head.fc2.weight"], evaluate.build(SMALL, 8).head.fc2.weight)


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


STILL = """
from papers.ctp.tests import test_train as tests
tests.evaluate.build = tests._still_statistics
tests.run.main(tests.DOOR)
"""


def _launch(home, processes, *words):
    launch = ["common.run.launch", processes] if processes > 1 else []
    command = [str(word) for word in (sys.executable, "-m", *launch, *words, "--device", "cpu")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{run.ROOT}:{home}"}
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ctp", "moco"])
def test_two_processes_share_a_batch(tmp_path, tiny, method):
    (tmp_path / "still.py").write_text(STILL)
    changes = ["--data", tiny, "--batch", "16", "--epochs", "1", "--log-every", "1"]
    changes += ["--method", "moco", "--queue", "32"] if method == "moco" else []
    logs = {}
    for processes in (1, 2):
        _launch(tmp_path, processes, "still", "smoke", "--out", tmp_path / str(processes), *changes)
        (folder,) = (tmp_path / str(processes)).glob("ctp/smoke/*")
        logs[processes] = run.read_log(folder)
    assert len(logs[1]) == len(logs[2]) == 3
    for one, two in zip(logs[1], logs[2]):
        for key in set(one) - {"samples_per_s"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.slow
def test_two_processes_judge_a_backbone_with_stop_at(tmp_path, tiny):
    """--stop-at is the pre-training's alone: fine-tuning is longer, and both processes must see it to its end."""
    _launch(tmp_path, 2, "papers.ctp.train", "smoke", "--out", tmp_path, "--data", tiny, "--batch", 16,
            "--stop-at", 3, "--downstream", "tiny_recognize")
    (folder,) = tmp_path.glob("ctp/smoke/*")
    assert {"finetune_top1", "random finetune_top1"} <= set(_scores(folder))
    _launch(tmp_path, 2, "papers.ctp.train", "compare", "--out", tmp_path, "--data", tiny, "--batch", 16,
            "--stop-at", 2, "--compare", "random", "ctp")
    (folder,) = tmp_path.glob("ctp/compare/*")
    assert not (folder / "results.json").exists()


def test_a_loss_that_explodes_stops_the_run(tmp_path, tiny):
    with pytest.raises(run.UserError, match="not finite"):
        _train(tmp_path, tiny, dataclasses.replace(SMALL, lr=1e20, clip_norm=1e20, warmup_steps=0))


@pytest.mark.parametrize("main, argv, message", [
    (DOOR, ["ucf101_r3d18"], "meant for UCF101: give its folder with --data"),
    (DOOR, ["tiny", "--batch", "999"], "larger than the 288 training samples"),
    (DOOR, ["tiny", "--init", "gone.pth"], "no checkpoint at gone.pth"),
    (DOOR, ["smoke", "--size-px", "48"], "--size-px 48 is no crop of frames whose shorter side is 32 px"),
    (DOOR, ["compare", "--compare", "ctp", "magic"], "no member 'magic'"),
    (DOOR, ["compare", "--compare", "ctp", "--downstream", "gone"], "no recipe --downstream 'gone'"),
    (DOOR, ["tiny", "--downstream", "gone"], "no recipe --downstream 'gone'"),
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
    assert RECIPES["ucf101_r3d18"].epochs == 300 and RECIPES["kinetics_r2plus1d18"].milestones == (30, 60)
    ssv1 = RECIPES["ssv1_r3d18_finetune"]
    assert (ssv1.frames, ssv1.flip, ssv1.test_clips, ssv1.milestones) == (32, 0.0, 1, (40, 60, 80))
    assert [data.short_side_size(RECIPES["ucf101_r3d18_finetune"], s) for s in (112, 128, 144)] == [
        (149, 112), (171, 128), (192, 144)
    ]


def test_the_benchmark_times_clips_and_the_loader(tmp_path, tiny, monkeypatch, capsys):
    argv = ["bench", "--data", str(tiny), "--recipe", "tiny", "--clips", "3", "--workers", "2"]
    argv += ["--out", str(tmp_path / "results" / "bench")]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    bench.main()
    (record,) = tmp_path.glob("results/bench/ctp_clips_*.json")
    found = json.loads(record.read_text())["records"]
    assert found["clips per second, loaded"] > 0 and found["loading processes"] == 2
    assert set(found["milliseconds per clip"]) == {"open", "decode", "resize, crop, flip", "paste", "color", "tensor"}
    assert f"with 2 processes on {bench.CORES} cores" in capsys.readouterr().out


def test_videos_are_shrunk(tmp_path):
    sources = video.open_videos(clips(), "val").paths[:4]
    shrink_videos.main(tmp_path / "small", tuple(sources))
    train_videos, val = (video.open_videos(tmp_path / "small", split) for split in ("train", "val"))
    assert len(set(train_videos.paths)) == 3 and len(set(val.paths)) == 1 and len(val) == 16
    with video.open_video(val.paths[0]) as small, video.open_video(sources[3]) as source:
        assert len(small) == len(source) and small.read([0]).shape == (1, 48, 58, 3)
    shrink_videos.main(tmp_path / "named", tuple(sources[:1]), val=tuple(sources[1:3]), times=1)
    assert [len(video.open_videos(tmp_path / "named", split)) for split in ("train", "val")] == [1, 2]


def _class_folders(root, tiny):
    """train/<class>/ and val/<class>/ with a link to a video each."""
    for split in ("train", "val"):
        videos = video.open_videos(tiny, split)
        for path, label in zip(videos.paths, videos.labels):
            (root / split / videos.classes[label]).mkdir(parents=True, exist_ok=True)
            (root / split / videos.classes[label] / path.name).symlink_to(path)
    return root


def test_other_classes_in_validation_are_one_line_before_training(tmp_path, tiny):
    root = _class_folders(tmp_path / "data", tiny)
    first, *_ = classes = sorted(path.name for path in (root / "train").iterdir())
    (root / "val" / first).rename(tmp_path / first)
    with pytest.raises(run.UserError, match=f"validation has no video of {first}, which training has"):
        _train(tmp_path / "runs", root, ACTIONS)
    (tmp_path / first).rename(root / "val" / "juggling")
    with pytest.raises(run.UserError, match="val has classes that train has not: juggling"):
        _train(tmp_path / "runs", root, ACTIONS)
    assert not (tmp_path / "runs").exists()
    (root / "val" / "juggling").rename(root / "val" / first)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    folder = _train(tmp_path / "runs", root, ACTIONS, stop_at=1)
    assert run.load_checkpoint(folder)[2]["classes"] == classes
    (root / "train" / first / "notes.txt").write_text("not a video")
    home = _train(tmp_path / "whole", root, dataclasses.replace(SMALL, batch=24))
    assert "- passed over in training: 1 files that are no video (.txt), 1 hidden" in (home / "report.md").read_text()
    (root / "train" / first).rename(root / "train" / "zz")
    (root / "val" / first).rename(root / "val" / "zz")
    with pytest.raises(run.UserError, match=f"it learned '{first}', the data have 'zz'"):
        _train(tmp_path / "runs", root, ACTIONS, resume="auto")


def test_bf16_on_a_cpu_is_refused(tmp_path, tiny):
    bf16 = dataclasses.replace(WORLD, amp=torch.bfloat16)
    with pytest.raises(run.UserError, match="--precision bf16 on a CPU: the weight gradients"):
        train.train("smoke", SMALL, run.Options(data=tiny, out=tmp_path), bf16)
