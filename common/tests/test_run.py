"""The run folder: checkpoints whole or not at all, weights that cannot run code, results that fit the schema."""

import argparse
import dataclasses
import importlib.util
import json
import os
import pickle
import shlex
import sys

import jsonschema
import pytest
import torch

from common import run
from common.run.log import expect_wandb


@dataclasses.dataclass(frozen=True)
class Recipe:
    """For the tests."""

    about: str = "a recipe"
    epochs: int = 3
    scale: tuple[float, float] = (0.1, 1.0)


WORLD = run.World(0, 1, torch.device("cpu"), None)


def test_overrides_are_typed():
    argv = ["a", "--epochs", "5", "--seed", "7", "--scale", "0.5", "0.6"]
    name, recipe, options = run.parse({"a": Recipe()}, "x", argv)
    assert (name, recipe.epochs, recipe.scale, options.seed) == ("a", 5, (0.5, 0.6), 7)


@pytest.mark.parametrize("argv", [[], ["b"], ["a", "--epochs", "x"], ["a", "--epoch", "3"]])
def test_bad_command_lines_leave_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        run.parse({"a": Recipe()}, "x", argv)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert "a recipe" in printed.out + printed.err or "epoch" in printed.err


def test_checkpoint_round_trip_is_exact(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "best": {"top1": 12.5}, "none": None, "pair": (1, 2)}
    run.save_checkpoint(tmp_path, 7, {"model": model.state_dict()}, state)
    step, weights, back = run.load_checkpoint(tmp_path)
    assert step == 7 and back["best"] == {"top1": 12.5} and back["none"] is None and back["pair"] == [1, 2]
    torch.testing.assert_close(weights["model"], dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(back["optimizer"]["state"][0], optimizer.state_dict()["state"][0], rtol=0, atol=0)
    optimizer.load_state_dict(back["optimizer"])


def test_tied_tensors_are_saved(tmp_path):
    x = torch.ones(4)
    run.save_weights(tmp_path / "w.safetensors", {"a": x, "b": x, "view": x[1:3]})
    assert {k: len(v) for k, v in run.load_weights(tmp_path / "w.safetensors").items()} == {"a": 4, "b": 4, "view": 2}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 10):
        run.save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000010"]


@pytest.mark.parametrize("damaged", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damaged):
    for step in (1, 2):
        run.save_checkpoint(tmp_path, step, {"model": {"w": torch.full((9,), float(step))}}, {"x": torch.ones(2)})
    newest = tmp_path / "checkpoints" / "step_00000002" / damaged
    newest.write_bytes(newest.read_bytes()[:-5])
    assert run.load_checkpoint(tmp_path)[0] == 1
    assert "step_00000002" in capsys.readouterr().err


def test_a_checkpoint_half_written_does_not_count(tmp_path):
    part = tmp_path / "checkpoints" / ".step_00000003.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"x")
    assert run.load_checkpoint(tmp_path) is None
    run.save_checkpoint(tmp_path, 3, {"model": {"w": torch.ones(1)}}, {})
    assert run.load_checkpoint(tmp_path)[0] == 3


class _Malice:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_weights_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Malice()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Malice()))
    with pytest.raises(run.UserError, match=r"refused: reading it could run posix\.mkdir"):
        run.load_weights(tmp_path / "evil.pth")
    with pytest.raises(run.UserError, match="refused"):
        run.load_weights(tmp_path / "raw.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_weights_are_named(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    weights = {"w": torch.ones(1000)}
    torch.save(weights, path) if suffix == "pth" else run.save_weights(path, weights)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(run.UserError, match="truncated or not a checkpoint"):
        run.load_weights(path)


def test_wrappers_around_weights_are_removed(tmp_path):
    args = argparse.Namespace(lr=0.1)  # as DeiT's trainer, and so the authors', saves it
    torch.save({"model": {"module.w": torch.ones(2)}, "epoch": 3, "args": args}, tmp_path / "w.pth")
    assert list(run.load_weights(tmp_path / "w.pth")) == ["w"]


def test_resume_finds_the_unfinished_run_and_refuses_other_settings(tmp_path):
    options = run.Options(out=tmp_path)
    folder = run.open_run("p", "r", Recipe(), options, WORLD)
    again = dataclasses.replace(options, resume="auto", workers=3)
    assert run.open_run("p", "r", Recipe(), again, WORLD) == folder
    named = dataclasses.replace(again, resume=str(folder))
    with pytest.raises(run.UserError, match="epochs: 3 then, 4 now"):
        run.open_run("p", "r", Recipe(epochs=4), named, WORLD)
    with pytest.raises(run.UserError, match="seed: 0 then, 1 now"):
        run.open_run("p", "r", Recipe(), dataclasses.replace(named, seed=1), WORLD)
    (folder / "results.json").write_text("{}")
    assert run.open_run("p", "r", Recipe(), again, WORLD) != folder
    with pytest.raises(run.UserError, match="not a run folder"):
        run.open_run("p", "r", Recipe(), dataclasses.replace(options, resume=str(tmp_path)), WORLD)


def test_a_run_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(run.UserError, match="--out"):
        run.open_run("p", "r", Recipe(), run.Options(out=tmp_path / "file"), WORLD)


def test_the_log_forgets_what_a_resumed_run_will_repeat(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = run.Log(tmp_path, WORLD, steps=4, start=1)
    log.step(2, {"loss": 2.5})
    log.close()
    assert run.read_log(tmp_path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.5}]


def test_a_log_that_is_no_text_ends_a_resume_in_one_line_and_stays(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\xff')
    with pytest.raises(run.UserError, match=r"log\.jsonl: not readable as text"):
        run.Log(tmp_path, WORLD, steps=4, start=1)
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n\xff'


@pytest.mark.parametrize("device, per_step_s, told", [("cpu", 60, True), ("cpu", 1, False), ("cuda", 60, False)])
def test_hours_on_a_cpu_are_told_once(tmp_path, monkeypatch, capsys, device, per_step_s, told):
    now = [0.0]
    monkeypatch.setattr("common.run.log.time.monotonic", lambda: now[0])
    log = run.Log(tmp_path, dataclasses.replace(WORLD, device=torch.device(device)), steps=2003, start=1000)
    for step in range(1001, 1006):
        now[0] += per_step_s
        log.step(step, {"loss": 1.0})
    log.close()
    said = capsys.readouterr().out
    assert said.count("hours are left on this CPU") == told and ("rate 17 hours" in said) == told


FAKE_WANDB = """
class errors:
    Error = OSError

class init:
    def __init__(self, **asked):
        if asked["project"] == "nobody":
            raise errors.Error("no key\\nlog in first")
        self.asked, self.rows = asked, []
    def log(self, values, step):
        self.rows.append((step, values))
    def finish(self):
        self.rows.append("end")
"""


def test_the_log_goes_to_wandb_too_where_that_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()  # what it leaves of other runs is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    if importlib.util.find_spec("wandb").origin is None:  # where the package is installed it is found
        with pytest.raises(run.UserError, match="--wandb needs the package wandb"):
            expect_wandb()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    expect_wandb()
    options = run.Options(out=tmp_path / "runs", wandb=True, seed=3)
    log = run.Log(folder := run.open_run("p", "r", Recipe(), options, WORLD), WORLD, steps=4, wandb=options.wandb)
    assert log.wandb.asked["project"] == "p" and log.wandb.asked["id"] == f"r-{folder.name}-3"
    assert log.wandb.asked["config"] | {"epochs": 3, "seed": 3} == log.wandb.asked["config"]
    log.step(1, {"loss": 2.5})
    log.step(2)
    log.scores(2, lambda: {"top1": 50.0})
    log.close()
    assert log.wandb.rows == [(1, {"loss": 2.5}), (2, {"val/top1": 50.0}), "end"]
    with pytest.raises(run.UserError, match="wandb: no key log in first"):
        run.Log(run.open_run("nobody", "r", Recipe(), options, WORLD), WORLD, steps=4, wandb=True)
    again = run.open_run("p", "r", Recipe(), dataclasses.replace(options, wandb=False, resume="auto"), WORLD)
    assert again == folder  # it changes no result
    monkeypatch.delitem(sys.modules, "wandb")


def _results(**change):
    return {
        "paper": "p", "recipe": "r", "data": "d", "metrics": [run.metric("top1", 50.0, "%")], "params": 1,
        "flops": None, "wall_s": 1.0, "peak_mem_bytes": 1, "throughput": None, "seed": 0, **change,
    }


def test_results_are_checked_and_reported(tmp_path):
    run.write_results(tmp_path, _results())
    assert json.loads((tmp_path / "results.json").read_text())["hardware"] == run.hardware()
    assert "Not comparable" in (tmp_path / "report.md").read_text()
    assert "could not be read" not in (tmp_path / "report.md").read_text()
    (tmp_path / "unreadable.txt").write_text("a.jpg\tno picture\nb.jpg\tempty\n")
    run.write_results(tmp_path, _results())
    assert ". 2 training samples could not be read: unreadable.txt" in (tmp_path / "report.md").read_text()
    for change in ({"metrics": []}, {"seed": "0"}, {"surprise": 1}):
        with pytest.raises(jsonschema.ValidationError):
            run.write_results(tmp_path, _results(**change))


def test_a_recorded_command_names_no_folder_of_this_machine():
    typed = "/home/me/.venv/bin/python -m papers.p.train tiny --out /tmp/x --data=/data/y --seed 3 --resume auto"
    assert run.command(shlex.split(typed)) == "python -m papers.p.train tiny --data DATA --seed 3"
    typed = "python -m papers.p.train tiny --probe /data/z --weights runs/p/w --start=/data/w"
    expected = "python -m papers.p.train tiny --probe PROBE --weights runs/p/w --start START"
    assert run.command(shlex.split(typed)) == expected
    typed = "python -m papers.p.train tiny '--data=/my data' --out 'a b' --about 'two words' --data \"it's here\" --x"
    expected = "python -m papers.p.train tiny --data DATA --about 'two words' --data DATA --x"
    assert run.command(shlex.split(typed)) == expected


def test_a_mistake_found_by_a_loading_process_is_one_line_too(capsys):
    class Worker(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, _):
            raise run.UserError("a.png is unreadable")

    with pytest.raises(SystemExit) as exit:
        run.main(lambda: list(torch.utils.data.DataLoader(Worker(), num_workers=1)))
    assert exit.value.code == 2 and capsys.readouterr().err == "error: a.png is unreadable\n"


def test_seeding_is_a_function_of_its_key():
    def draw(*key):
        run.seed_all(*key)
        return torch.rand(3).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({tuple(draw(*key)) for key in [(0, 5, 1), (0, 5, 0), (0, 6, 1), (1, 5, 1)]}) == 4


@pytest.mark.parametrize("batch, size, micro, chunks", [(128, 1, 0, 1), (128, 2, 32, 2), (10, 1, 4, 3)])
def test_accumulation(batch, size, micro, chunks):
    assert run.accumulation(batch, dataclasses.replace(WORLD, size=size), micro) == chunks


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(run.UserError, match="not a multiple"):
        run.accumulation(9, dataclasses.replace(WORLD, size=2), 0)


def test_multiply_adds_of_a_layer():
    assert run.multiply_adds(torch.nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 5, 7)) == 3 * 8 * 9 * 35


def test_multiply_adds_of_attention():
    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert run.multiply_adds(Attention(), torch.zeros(1, 2, 7, 4)) == 2 * 2 * 7 * 7 * 4


def test_names_in_a_mistake_move_no_terminal(capsys):
    def fails():
        raise run.UserError("no \x1b]0;PWNED\x07 there,\nexpected caf\xe9 or \udce9")

    with pytest.raises(SystemExit):
        run.main(fails)
    assert capsys.readouterr().err == "error: no \\x1b]0;PWNED\\x07 there,\nexpected caf\xe9 or \\udce9\n"


def test_a_recipe_in_full_precision_yields_to_who_asks_for_another():
    bf16 = torch.bfloat16
    assert run.World(0, 1, torch.device("cpu"), bf16).in_full(True).amp is None
    assert run.World(0, 1, torch.device("cpu"), bf16).in_full(False).amp is bf16
    chosen = run.start_world(run.Options(device="cpu", precision="bf16"))
    assert chosen.in_full(True).amp is bf16
