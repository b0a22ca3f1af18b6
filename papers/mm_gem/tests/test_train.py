"""The trainer: learns both tasks, resumes exactly, goes on to the second stage, and refuses bad input in one line."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import run
from common.data.tiny.scenes import scenes
from common.run import ROOT, UserError
from papers.mm_gem import bench, build, demo, evaluate, search, train
from papers.mm_gem.embedder import load
from papers.mm_gem.recipes import RECIPES

WORLD = run.World(0, 1, torch.device("cpu"), None)
SMOKE = dataclasses.replace(RECIPES["smoke"], batch=16, steps=6, image_steps=3, eval_rows=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(train=64, val=16, root=tmp_path_factory.mktemp("data") / "scenes")


def _train(tmp_path, data, recipe=SMOKE, **options):
    return train.train("smoke", recipe, run.Options(data=data, out=tmp_path, log_every=1, **options), WORLD)


def _scores(folder):
    return {m["name"]: m["value"] for m in json.loads((folder / "results.json").read_text())["metrics"]}


def _weights(folder):
    return run.load_weights(folder / "model" / "model.safetensors")


def test_overfits_a_batch():
    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    model = build.model(RECIPES["tiny"], processor).train()
    texts = ["a red circle .", "two blue squares .", "a green triangle .", "three yellow circles ."]
    images = torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, RECIPES["tiny"]))
    for _ in range(60):
        out = model(pixel_values=images, **processor.texts(texts))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    model.eval()
    assert out.loss_emb < 0.1 and out.loss_gen < 0.1
    assert out.logits_per_image.argmax(1).tolist() == [0, 1, 2, 3]
    assert processor.captions(model.generate(images, max_new_tokens=8)) == texts


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A finished run."""
    return _train(tmp_path_factory.mktemp("finished"), data)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, data, finished):
    for stop in (2, 4):  # before and within the second stage
        folder = _train(tmp_path, data, stop_at=stop, resume="auto")
        assert not (folder / "results.json").exists()
    (folder / "checkpoints" / "checkpoint-5").mkdir()  # torn: without its last file
    resumed = _train(tmp_path, data, resume=str(folder), workers=1)
    assert resumed == folder and _scores(resumed) == _scores(finished)
    torch.testing.assert_close(_weights(resumed), _weights(finished), rtol=0, atol=0)
    for name in ("curves", "retrieval", "captions", "regions"):
        assert Image.open(resumed / f"{name}.png").width > 100


def test_the_second_stage_takes_the_first_ones_model(tmp_path, finished):
    second = dataclasses.replace(RECIPES["tiny_stage2"], init=str(finished))
    model = build.model(second, build.processor(second))
    torch.testing.assert_close(model.state_dict(), load(finished, WORLD).model.state_dict(), rtol=0, atol=0)
    for name, other in (("grid", 8), ("joint_width", 32), ("standardize", True)):
        changed = dataclasses.replace(second, **{name: other})
        with pytest.raises(UserError, match=f"was made with {name}=.*, not {other}"):
            build.model(changed, build.processor(changed))
    with pytest.raises(UserError, match="holds no model"):
        build.model(dataclasses.replace(second, init=str(tmp_path)), build.processor(second))


def test_commands(tmp_path, data, finished, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def spoken(module, *words):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words), "--device", "cpu"])
        module.main()
        return capsys.readouterr().out

    picture = data / "val" / "000003.png"
    spoken(evaluate, finished, "--data", data, "--out", "scores.json", "--workers", 1)
    scores = {m["name"]: m["value"] for m in json.loads(Path("scores.json").read_text())["metrics"]}
    assert scores == {name: value for name, value in _scores(finished).items() if name != "training loss"}

    for i, name in enumerate(["red circle", "blue square"] * 2):
        (home := tmp_path / "classes" / "val" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "val" / f"{i:06d}.png", home)
    assert "zero-shot, 2 classes" in spoken(evaluate, finished, "--images", "classes")

    words = "--box", 3, 3, 40, 40, "--texts", "red circle", "blue square"
    shown = spoken(demo, picture, "--checkpoint", finished, *words)
    assert "red circle" in shown and "blue square" in shown and Image.open("answer.png").width > 100

    spoken(search, "embed", data / "val", "--checkpoint", finished)
    hits = spoken(search, "find", picture, "--checkpoint", finished, "--count", 3).splitlines()
    assert hits[0] == f" 1.000  {picture.resolve()}" and len(hits) == 4 and Image.open("hits.png").width > 100
    told = json.loads(Path("hits.json").read_text())
    assert told["query"] == str(picture) and [row["there"] for row in told["hits"]] == [True] * 3
    assert told["hits"][0] == {"file": str(picture.resolve()), "similarity": pytest.approx(1), "there": True}
    assert spoken(search, "find", "two red circles .", "--checkpoint", finished).count("val/") == 8
    assert spoken(search, "find", "two red circles . " * 15, "--checkpoint", finished).count("val/") == 8  # no path
    shutil.copytree(data / "val", gone := tmp_path / "gone")
    spoken(search, "embed", gone, "--checkpoint", finished, "--index", "gone.index")
    (gone / picture.name).unlink()
    hits = spoken(search, "find", picture, "--checkpoint", finished, "--index", "gone.index", "--count", 2).splitlines()
    assert hits[0].endswith("has gone since it was embedded)") and not json.loads(
        Path("hits.json").read_text())["hits"][0]["there"]
    with pytest.raises(UserError, match="--count 0: at least 1 picture"):
        spoken(search, "find", "a red circle .", "--checkpoint", finished, "--count", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in empty; expected files ending in"):
        spoken(search, "embed", "empty", "--checkpoint", finished)
    with pytest.raises(UserError, match="no finished run under runs/mm_gem"):
        spoken(demo, picture)
    with pytest.raises(UserError, match="empty holds no model"):
        spoken(demo, picture, "--checkpoint", "empty")
    shutil.copytree(finished / "model", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot load torn: SafetensorError"):
        spoken(demo, picture, "--checkpoint", "torn")
    with pytest.raises(UserError, match="needs --recipe, one of tiny"):
        spoken(evaluate, finished / "model", "--data", data)


def test_the_benchmark_measures_equal_steps():
    record = bench.study(bench.Arguments(batch=8, chunks=(3,), seconds=0.01), WORLD)
    assert record["peak_bytes"]["3 at a time"] < record["peak_bytes"]["whole batch"]
    assert set(record["seconds"]) == {"whole batch", "3 at a time"} and min(record["seconds"].values()) > 0
    lines = bench.page(record, 8).splitlines()
    assert any(line.startswith("| whole batch |") and line.endswith("| 1.00 |") for line in lines)


def test_chunks_do_not_change_a_run(tmp_path, data):
    recipe = dataclasses.replace(SMOKE, steps=3, image_steps=1, objectives="embedding")
    whole, chunked = (_train(tmp_path / str(m), data, recipe, micro_batch=m, stop_at=2) for m in (0, 5))
    for a, b in zip(run.read_log(whole), run.read_log(chunked)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_lora_trains_little_and_is_merged(tmp_path, data):
    recipe = dataclasses.replace(SMOKE, tune="lora", steps=3, image_steps=1, lora_rank=2, warmup_steps=0)
    run.seed_all(0)  # as the trainer does
    processor = build.processor(recipe)
    before = build.model(recipe, processor).state_dict()
    after = load(_train(tmp_path, data, recipe), WORLD).model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    table = "language_model.model.embed_tokens.weight"
    tied = {table, "language_model.lm_head.weight"}
    trained = re.compile(r"h[123]\.|log_scale|language_model\..*\.[qkvo]_proj\.")
    assert changed - tied == set(filter(trained.match, before))
    rows = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert rows == [processor.emb_token_id, processor.cap_token_id]


def test_scattered_weights_are_grouped_by_their_whole_shapes():
    model = build.model(SMOKE, build.processor(SMOKE))
    groups = train.parameter_groups(model, SMOKE)
    for parameter in model.parameters():  # as ZeRO-3 leaves it
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    for group, scattered in zip(groups, train.parameter_groups(model, SMOKE), strict=True):
        assert scattered["weight_decay"] == group["weight_decay"]
        assert [*map(id, scattered["params"])] == [*map(id, group["params"])]


def _two_processes(tmp_path, data, *words):
    command = [sys.executable, "-m", "common.run.launch", "2", "papers.mm_gem.train", "smoke",
               "--data", str(data), "--out", str(tmp_path),
               "--log-every", "1", "--device", "cpu", "--batch", "16", "--eval-rows", "8", *words]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "mm_gem" / "smoke").iterdir()
    return folder


@pytest.mark.slow
def test_zero3_trains_a_loaded_model_like_one_process(tmp_path, data, finished):
    """Weights are scattered as they are loaded, chunks are computed again, and what is saved is whole."""
    alone = _train(tmp_path / "alone", data, dataclasses.replace(SMOKE, init=str(finished), steps=4, image_steps=1))
    words = ["--init", str(finished), "--steps", "4", "--image-steps", "1", "--deepspeed", "zero3",
             "--micro-batch", "3", "--gradient-checkpointing"]
    _two_processes(tmp_path / "two", data, *words, "--stop-at", "2")
    folder = _two_processes(tmp_path / "two", data, *words, "--resume", "auto")
    losses = [[row["loss"] for row in run.read_log(each) if "loss" in row] for each in (alone, folder)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(_weights(folder), _weights(alone), rtol=1e-2, atol=2e-3)
    assert json.loads((folder / "results.json").read_text())["params"] == sum(
        parameter.numel() for parameter in load(folder, WORLD).model.parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "zero2"])
def test_two_processes_train_like_one(tmp_path, data, finished, how):
    words = ["--micro-batch", "3"] if how == "ddp" else ["--deepspeed", how]
    folder = _two_processes(tmp_path, data, "--steps", "6", "--image-steps", "3", *words)
    losses = [[row["loss"] for row in run.read_log(each) if "loss" in row] for each in (finished, folder)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name, weight in _weights(finished).items():
        torch.testing.assert_close(_weights(folder)[name], weight, rtol=1e-2, atol=2e-3, msg=name)
    assert _scores(folder).keys() == _scores(finished).keys()


def test_boxes_keep_their_digits_under_deepspeed():
    """transformers casts a batch's numbers to DeepSpeed's bf16, in which there is no image 257."""
    trainer = object.__new__(train.GemTrainer)
    trainer.model = SimpleNamespace(check=lambda **_batch: None)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(device=torch.device("cpu")), True
    batch = {"pixel_values": torch.zeros(1), "boxes": torch.tensor([[257.0, 3.3, 100.7, 220.1, 223.9]])}
    prepared = trainer._prepare_inputs(dict(batch))
    assert prepared["pixel_values"].dtype == torch.bfloat16 and torch.equal(prepared["boxes"], batch["boxes"])
    assert "boxes" not in trainer._prepare_inputs({"pixel_values": torch.zeros(1)})


def test_a_missing_validation_split_is_found_before_the_training(tmp_path, data):
    root = shutil.copytree(data, tmp_path / "data")
    for file in (root / "annotations").glob("*_val.json"):
        file.unlink()
    with pytest.raises(UserError, match="has no captions for 'val'"):
        _train(tmp_path / "runs", root)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"batch": 65}, "global batch of 65 is larger than the 64 training samples"),
    ({"dataset": "COCO captions"}, "meant for COCO captions: give its folder"),
    ({"tune": "lora", "deepspeed": "zero3"}, "not zero3"),
])
def test_bad_settings_are_refused(tmp_path, data, change, message):
    recipe = dataclasses.replace(SMOKE, image_steps=6, **change)
    with pytest.raises(UserError, match=message):
        train.train("smoke", recipe, run.Options(data=data if "batch" in change else None, out=tmp_path), WORLD)
    with pytest.raises(UserError, match=r"cannot load /no/such/llm: .*; give a local folder with --llm"):
        build.processor(dataclasses.replace(SMOKE, llm="/no/such/llm"))
    with pytest.raises(UserError, match="no data folder"):
        _train(tmp_path, tmp_path / "missing")


def test_looking_through_a_data_folder(data):
    def look(*words):
        command = [sys.executable, "-m", "papers.mm_gem.data", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert look(str(data)).stdout.startswith("train: 64 captioned images, ")
    without = look()
    assert without.returncode == 2 and "Traceback" not in without.stderr


PYTHON = """#!/usr/bin/env bash
# Stands for the interpreter: writes down what it was asked for, and leaves results as a stage that ends does.
echo "$*" >> "$RUNS/asked"
stage="$(sed 's/.*papers.mm_gem \\([^ ]*\\).*/\\1/' <<< "$*")"
folder="$RUNS/mm_gem/$stage/$(date +%s%N)"
mkdir -p "$folder"
[ -n "${KILLED:-}" ] && [ "$stage" = "$KILLED" ] && exit 1
touch "$folder/results.json"
"""


def test_both_stages_in_a_row_are_taken_up_where_they_were_left(tmp_path):
    (python := tmp_path / "python").write_text(PYTHON)
    python.chmod(0o755)
    for folder in (pairs := tmp_path / "pairs", regions := tmp_path / "regions"):
        folder.mkdir()
    settings = {
        "PYTHON": str(python), "RUNS": str(tmp_path), "PAIRS": str(pairs), "REGIONS": str(regions), "GPUS": "2",
        "STAGE1_ARGS": "--lr 5e-5 --steps 9", "STAGE2_ARGS": "--epochs 1", "VISION": "a tower",
    }

    def script(*words, **more):
        file = ROOT / "papers" / "mm_gem" / "scripts" / "full.sh"
        done = subprocess.run([str(file), *words], env=os.environ | settings | more, capture_output=True, text=True)
        asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
        (tmp_path / "asked").unlink(missing_ok=True)
        return done.returncode, [line.partition("papers.mm_gem ")[2] for line in asked]

    status, (first,) = script(KILLED="stage1")
    assert status and first.startswith(f"stage1 --data {pairs} ")
    assert first.endswith(" --vision a tower --lr 5e-5 --steps 9")
    status, (again, second) = script(KILLED="stage2")
    (done,) = (tmp_path / "mm_gem" / "stage1").glob("*/results.json")
    assert status and again == first and second.startswith(f"stage2 --data {regions} --init {done.parent} ")
    assert second.endswith("--resume auto --vision a tower --epochs 1")
    assert script() == (0, [second]), "stage 1 is done; stage 2 goes on with the same words"
    status, asked = script("--steps", "9")
    assert status == 2 and not asked
