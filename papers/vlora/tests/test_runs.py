"""Runs that lose nothing: damaged checkpoints, evaluations that fail, other numbers of processes, odd data."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from common import run
from common.data.tiny.scenes import DESCRIBE, scenes
from common.run import ROOT, UserError, hf
from papers.vlora import build, demo, evaluate, train
from papers.vlora.configuration import InputError
from papers.vlora.recipes import RECIPES

WORLD = run.World(0, 1, torch.device("cpu"), None)
SMALL = dataclasses.replace(RECIPES["smoke"], batch=8, steps=6, eval_rows=8, eval_every=3, blocks=1, width=32, rank=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(24, 6, 32, root=tmp_path_factory.mktemp("data") / "scenes")


def _train(out, data, recipe=SMALL, **options):
    return train.train("smoke", recipe, run.Options(data=data, out=out, log_every=1, **options), WORLD)


def _weights(folder):
    return run.load_weights(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An undisturbed run."""
    return _train(tmp_path_factory.mktemp("whole"), data)


def _rows(folder):
    timed = ("samples_per_s", "eval_runtime", "eval_samples_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in run.read_log(folder)]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [
    lambda newest: _cut(newest / "model.safetensors"), lambda newest: _cut(newest / "optimizer.pt"),
    lambda newest: (newest / "optimizer.pt").unlink(), lambda newest: (newest / "trainer_state.json").write_text(""),
    lambda newest: (newest / "trainer_state.json").write_text('{"no_such": 4}'),
    lambda newest: (newest / "trainer_state.json").write_text('{"global_step": 9}'),
    lambda newest: (newest / hf.COMPLETE_MARKER).unlink(), lambda newest: (newest / "scheduler.pt").write_bytes(b""),
], ids=["weights", "optimizer", "no optimizer", "state", "other state", "other step", "not whole", "schedule"])
def test_a_damaged_newest_checkpoint_is_passed_over(stopped, tmp_path, capsys, damage):
    folder = shutil.copytree(stopped, tmp_path / "run")
    assert hf._newest_checkpoint(folder).name == "checkpoint-4"
    damage(folder / "checkpoints" / "checkpoint-4")
    assert hf._newest_checkpoint(folder).name == "checkpoint-2"
    assert "passing over" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """A run left after step 4, with checkpoints of steps 2 and 4, and copies of them that somebody made."""
    folder = _train(tmp_path_factory.mktemp("stopped"), data, checkpoint_every=2, stop_at=4)
    for name in ("checkpoint-best", "checkpoint-1_copy", "checkpoint-1.tar"):
        shutil.copytree(folder / "checkpoints" / "checkpoint-2", folder / "checkpoints" / name)
    return folder


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_leaves_copies_alone(stopped, tmp_path, data, whole):
    folder = shutil.copytree(stopped, tmp_path / "run")
    _cut(folder / "checkpoints" / "checkpoint-4" / "model.safetensors")
    _train(tmp_path, data, resume=str(folder), checkpoint_every=2)
    torch.testing.assert_close(_weights(folder), _weights(whole), rtol=0, atol=0)
    assert _rows(folder) == _rows(whole)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"checkpoint-4", "checkpoint-6", "checkpoint-best", "checkpoint-1_copy", "checkpoint-1.tar"}


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(tmp_path, data, whole, monkeypatch):
    def fails(*_, **__):
        raise UserError("cannot evaluate: a picture has gone")

    for step in (3, 6):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="a picture has gone"):
            patch.setattr(hf.Trainer, "evaluate", fails)
            _train(tmp_path, data, resume="auto", checkpoint_every=3)
        (folder,) = (tmp_path / "vlora" / "smoke").iterdir()
        assert hf._newest_checkpoint(folder).name == f"checkpoint-{step}"
        _train(tmp_path, data, resume="auto", checkpoint_every=3, stop_at=4 if step == 3 else 0)
    assert _rows(folder) == _rows(whole)
    torch.testing.assert_close(_weights(folder), _weights(whole), rtol=0, atol=0)


def test_the_exported_model_has_the_modes_of_other_files(whole):
    assert len({path.stat().st_mode for path in (whole / "model").iterdir()}) == 1
    assert (whole / "model" / "model.safetensors").stat().st_mode == (whole / "results.json").stat().st_mode


def test_results_are_there_even_where_no_loss_is_a_number(tmp_path, data, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"loss": (float("nan"), "nats")}, [{"loss": float("nan")}]))
    monkeypatch.setattr(train.figures, "draw", lambda *_: None)
    folder = _train(tmp_path, data, dataclasses.replace(SMALL, steps=1))
    assert "NaN" not in (folder / "results.json").read_text()


def test_an_empty_caption_is_found_before_the_training(tmp_path, data):
    root = shutil.copytree(data, tmp_path / "data")
    path = root / "annotations" / "captions_val.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["caption"] = "   " if entry["image_id"] == content["images"][0]["id"] else entry["caption"]
    path.write_text(json.dumps(content))
    recipe = dataclasses.replace(SMALL, stage="pretrain", template="plain")
    with pytest.raises(UserError, match=r"cannot evaluate: .*/val/\d+\.png has an empty caption"):
        _train(tmp_path / "out", root, recipe)
    assert not (tmp_path / "out").exists()


def test_a_damaged_validation_picture_is_found_before_the_training(tmp_path, data):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "val" / "000002.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot evaluate: .*000002.png"):
        _train(tmp_path / "out", root)
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_answers_that_max_length_cuts_off_are_no_matter_of_the_learning_rate(tmp_path, data):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "conversations_val.json").unlink()
    with pytest.raises(UserError, match=r"samples cannot be read, the last .*no word of an answer within 4 tokens"):
        _train(tmp_path / "out", root, dataclasses.replace(SMALL, max_length=4))


def test_losses_take_flat_logits(monkeypatch):
    """The loss of a map of labels, nll_loss2d, raises under --deterministic on a GPU."""
    processor = build.processor(SMALL)
    model = build.model(SMALL, processor.image_token_id).eval()
    talks = [[{"role": "user", "content": [{"type": "text", "text": "What color is it?"}]},
              {"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in ("red", "two blue")]
    plain = torch.nn.functional.cross_entropy
    seen = []
    monkeypatch.setattr(evaluate.F, "cross_entropy", lambda logits, *a, **k: seen.append(logits.dim()) or
                        plain(logits, *a, **k))
    found = evaluate.losses(model, processor, [[], []], talks, WORLD)
    assert seen == [2]
    for loss, talk in zip(found, talks):
        row = processor.encode(talk)
        with torch.no_grad():
            expected = plain(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], ignore_index=-100)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("text, asked", [
    ("What color is it?\nWhat shape is it?\n", ["What color is it?", "What shape is it?"]),
    ("Red?\n\nBlue?\n", ["Red?"]), ("Red?", ["Red?"]), ("", [DESCRIBE]),
])
def test_the_demo_reads_questions_from_a_pipe(monkeypatch, text, asked):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert list(demo.questions(None)) == asked
    assert list(demo.questions("Why?")) == ["Why?"]


def test_the_demo_ends_with_its_input(monkeypatch, capsys):
    typed = iter(["Red?"])

    def ask(prompt):
        for line in typed:
            return line
        raise EOFError  # Ctrl-D

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert list(demo.questions(None)) == ["Red?"]


def test_a_release_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "papers.vlora.official", "VLoRA-7b-v1", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: VLoRA-7b-v1 is no folder; expected what huggingface.co/feipengma/VLoRA-7b-v1 has\n"
    )


def test_a_config_that_names_the_hub_is_refused(whole, tmp_path, monkeypatch):
    model = shutil.copytree(whole / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["vision_config"] = {"model_type": "timm_wrapper", "architecture": "hf-hub:attacker/model", "num_classes": 2}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("timm.create_model", None)
    with pytest.raises(UserError, match="names the architecture 'hf-hub:attacker/model'"):
        evaluate.load(model, WORLD.device)
    with pytest.raises(InputError, match="names the architecture"):
        AutoModelForImageTextToText.from_pretrained(model)


def _command(out, data, *words, processes=1, switches=()):
    launch = ["-m", "common.run.launch", str(processes)] if processes > 1 else [*switches, "-m"]
    fields = ["--device", "cpu", "--log-every", "1", "--batch", "8", "--blocks", "1", "--width", "32", "--rank", "4",
              "--eval-rows", "4", "--steps", "4", "--checkpoint-every", "1", "--resume", "auto"]
    command = [sys.executable, *launch, "papers.vlora", "smoke", "--data", str(data), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *fields, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(Path(out).glob("vlora/smoke/*")), done.stderr


@pytest.mark.slow
def test_a_deepspeed_recipe_runs_without_a_launcher(tmp_path, data):
    folder, _ = _command(tmp_path, data, "--deepspeed", "zero2", "--steps", "1")
    assert (folder / "results.json").exists()


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, data):
    alone, _ = _command(tmp_path / "alone", data)
    for stop, processes in ((1, 1), (2, 2), (3, 2), (0, 1)):
        folder, _ = _command(tmp_path / "parts", data, "--stop-at", str(stop), processes=processes)
    assert len(list((tmp_path / "parts" / "vlora" / "smoke").iterdir())) == 1
    losses = [[row["loss"] for row in run.read_log(each) if "loss" in row] for each in (alone, folder)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name, weight in _weights(alone).items():
        torch.testing.assert_close(_weights(folder)[name], weight, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.long
def test_no_file_is_read_or_written_in_the_locales_encoding(tmp_path, data):
    """Of this repository; packages have such warnings of their own."""
    _, said = _command(tmp_path, data, switches=["-X", "warn_default_encoding"])
    assert not [line for line in said.splitlines() if re.search(r"(common|papers)/.*EncodingWarning", line)]
