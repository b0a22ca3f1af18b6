"""Run folders as several people and processes use them, and as strangers hand them over."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from common import run
from common.run.door import cores_per_process

WORLD = run.World(0, 1, torch.device("cpu"), None)


@dataclass(frozen=True)
class Recipe:
    about: str = "a toy"
    dataset: str = "digits"
    epochs: int = 3


def _open(out, recipe=Recipe(), **options):
    return run.open_run("p", "r", recipe, run.Options(out=out, **options), WORLD)


def test_seeds_and_settings_resume_side_by_side(tmp_path):
    first, second, longer = _open(tmp_path, seed=0), _open(tmp_path, seed=1), _open(tmp_path, Recipe(epochs=4))
    assert len({first, second, longer}) == 3
    assert _open(tmp_path, seed=0, resume="auto") == first and _open(tmp_path, seed=1, resume="auto") == second
    assert _open(tmp_path, seed=2, resume="auto") not in (first, second, longer)


def test_nobody_trains_in_a_run_that_another_process_holds(tmp_path):
    script = (
        "import sys; from common.tests.test_run_folder import _open; from pathlib import Path; "
        "print(_open(Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=run.ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held = holder.stdout.readline().strip()
    try:
        with pytest.raises(run.UserError, match="a process that is still running trains in it"):
            _open(tmp_path, resume=held)
        assert str(_open(tmp_path, resume="auto")) != held
    finally:
        holder.communicate("")
    assert str(_open(tmp_path, resume=held)) == held


def test_starts_in_the_same_second_get_folders_of_their_own(tmp_path):
    assert len({_open(tmp_path) for _ in range(12)}) == 12


def test_a_resumed_run_lists_what_it_ran_under(tmp_path):
    folder = _open(tmp_path)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"git": "older", "threads": 7}))
    for _ in range(2):
        _open(tmp_path, resume="auto")
    now = json.loads((folder / "environment.json").read_text())
    assert [then["git"] for then in now["before"]] == ["older", now["git"]] and now["before"][0]["threads"] == 7
    assert now["host"] and now["packages"] and "packages" not in now["before"][0]


@pytest.mark.parametrize("name", ["log.jsonl", "report.md", "checkpoints", "deep/unreadable.txt"])
def test_a_run_folder_with_links_is_refused(tmp_path, name):
    folder = _open(tmp_path / "runs")
    (folder / "deep").mkdir()
    (tmp_path / "precious").mkdir() if name == "checkpoints" else (tmp_path / "precious").write_text("mine")
    (folder / name).symlink_to(tmp_path / "precious")
    with pytest.raises(run.UserError, match="is a link"):
        _open(tmp_path / "runs", resume=str(folder))


def test_copies_beside_checkpoints_are_left_alone(tmp_path):
    for step in (1, 2):
        run.save_checkpoint(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}}, {"step": step})
    home = tmp_path / "checkpoints"
    (home / "step_00000001").rename(home / "step_best")
    (home / "step_00000003.tar").write_text("a copy")
    (home / "step_00000009").symlink_to(home / "step_best")
    for step in (3, 4):
        run.save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(2)}}, {"step": step})
    assert {p.name for p in home.iterdir()} == {
        "step_best", "step_00000003", "step_00000003.tar", "step_00000004", "step_00000009"}
    assert run.load_checkpoint(tmp_path)[0] == 4


@pytest.mark.parametrize("state", ['{"dict": 5}', '{"tensor": []}', "[" * 100_000, "null", "\0"])
def test_a_damaged_state_is_passed_over(tmp_path, state, capsys):
    for step in (1, 2):
        run.save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(2)}}, {"step": step})
    (tmp_path / "checkpoints/step_00000002/state.json").write_text(state)
    step, *_ = run.load_checkpoint(tmp_path)
    assert step == 1 and "passing over" in capsys.readouterr().err


@pytest.mark.parametrize("content, what", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
    (b"<!DOCTYPE html><html>", "a web page"),
    (b"PK\x03\x04 and nothing else", "truncated or not a checkpoint"), (b"", "truncated or not a checkpoint"),
])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, content, what, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(run.UserError, match=what) as error:
        run.load_weights(path)
    assert "\n" not in str(error.value)


def test_files_are_as_open_as_the_user_wants(tmp_path):
    run.save_weights(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    run.write_json(tmp_path / "a.json", {})
    os.umask(umask := os.umask(0o022))
    for name in ("w.safetensors", "a.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ValueError, match="JSON"):
        run.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {} and len(list(tmp_path.iterdir())) == 2


def test_figures_that_are_no_numbers_are_left_out(tmp_path, capsys):
    def finish(*values):
        metrics = [run.metric(f"score {i}", value, "%") for i, value in enumerate(values)]
        run.finish(tmp_path, "p", "r", run.Options(), data="digits", metrics=metrics, params=1, flops=None, wall_s=1.0,
                   throughput=None)

    finish(float("nan"), 3.0)
    assert [m["value"] for m in json.loads((tmp_path / "results.json").read_text())["metrics"]] == [3.0]
    assert "score 0 is nan, and left out" in capsys.readouterr().err
    with pytest.raises(run.UserError, match="no figure of this run is a number: score 0"):
        finish(float("inf"))


def test_a_half_removed_package_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "foo-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "torch" in run.environment()["packages"]


def test_a_record_names_what_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imagined GPU")
    run.hardware.cache_clear()
    assert run.hardware("cuda") == "8x Imagined GPU" and "cores of" in run.hardware("cpu")
    run.hardware.cache_clear()


@pytest.mark.parametrize("about", ["", "one\ntwo"])
def test_any_text_says_what_a_recipe_is(about, capsys):
    with pytest.raises(SystemExit):
        run.parse({"r": dataclasses.replace(Recipe(), about=about)}, "papers.p", ["--help"])
    assert "  r " in capsys.readouterr().out


def test_an_old_spelling_is_answered_with_the_new_one(capsys):
    @dataclass(frozen=True)
    class New(Recipe):
        lr: float = 0.1
        milestones: tuple[int, ...] = ()

    for word, now in (("--base-lr", "--lr"), ("--drop-epochs=3", "--milestones")):
        with pytest.raises(SystemExit) as exit:
            run.parse({"r": New()}, "papers.p", ["r", word, "5"])
        assert exit.value.code == 2 and f"is now called {now}" in capsys.readouterr().err


def test_what_a_person_can_mend_is_one_line(capsys):
    def full():
        raise OSError(28, "No space left on device", "/disk/x")

    with pytest.raises(SystemExit) as exit:
        run.main(full)
    assert exit.value.code == 2 and capsys.readouterr().err == "error: No space left on device: /disk/x\n"
    def full_in_torch():
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3951872 vs 3951760")

    with pytest.raises(SystemExit) as exit:
        run.main(full_in_torch)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: no space left on the device: ")
    def no_shared_memory():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    with pytest.raises(SystemExit) as exit:
        run.main(no_shared_memory)
    assert exit.value.code == 2 and "(/dev/shm): make it larger, or --workers 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        run.main(lambda: {}["x"])
    assert exit.value.code == 1 and "KeyError" in capsys.readouterr().err


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(tmp_path, monkeypatch, capsys):
    run.save_weights(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    run.save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(2)}}, {})

    def closed(path, *_, **__):  # root may read any
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(SystemExit) as exit:
        run.main(lambda: run.load_weights(tmp_path / "w.safetensors"))
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: Permission denied: {tmp_path / 'w.safetensors'}\n"
    assert run.load_checkpoint(tmp_path) is None and "Permission denied" in capsys.readouterr().err


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path, monkeypatch):
    model = torch.nn.Linear(1, 1)
    run.save_checkpoint(tmp_path, 9, {"model": model.state_dict()}, {})
    monkeypatch.setattr("common.run.checkpoints.gather_objects", lambda own: [*own, 0])  # the other one sees none
    with pytest.raises(run.UserError, match=r"other checkpoints .* of the steps \[9, 0\]: is it the same disk"):
        run.restore(tmp_path, run.Options(resume=str(tmp_path)), model=model)


@pytest.mark.parametrize("error, status", [(KeyError("x"), 1), (run.UserError("a mistake"), 2)])
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, error, status, capsys):
    """To close the group would wait on NCCL for peers that wait for this process."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", None)

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    def fails():
        raise error

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        run.main(fails)
    assert left.value.args == (status,) and ("Traceback" in capsys.readouterr().err) == (status == 1)


def test_more_processes_than_gpus_are_one_error(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(run.UserError, match="there are 4 processes, but torch sees 1 CUDA devices"):
        run.start_world(run.Options())


@pytest.mark.parametrize("cores, local, expected", [(80, 8, 10), (8, 1, 8), (200, 1, 16), (2, 8, 1)])
def test_loaders_share_the_cores_of_a_machine(monkeypatch, cores, local, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert cores_per_process() == expected


@pytest.mark.parametrize("device, words, workers", [
    ("cuda", [], 3), ("cuda", ["--workers", "0"], 0), ("cuda", ["--workers=2"], 2), ("cpu", [], 0),
])
def test_a_gpu_has_loaders_by_itself(tmp_path, monkeypatch, device, words, workers):
    seen, door = [], sys.modules["common.run.door"]
    monkeypatch.setattr(door, "start_world", lambda _: run.World(0, 1, torch.device(device), None))
    monkeypatch.setattr(door, "cores_per_process", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["p", "r", *words])
    run.door("p", {"r": Recipe()}, lambda name, recipe, options, world: seen.append(options.workers) or tmp_path)
    assert seen == [workers]
