import sys
from dataclasses import dataclass

import pytest
import torch

import papers
from common.run import UserError, write_json
from common.run.cases import TrainingCost
from tools import plan
from tools.tests.test_tables import record


@dataclass
class Recipe:
    about: str = "a toy"
    ema_decay: float = 0.0
    optimizer: str = "adamw"


def linear() -> TrainingCost:
    """One linear layer, 10 -> 20: 220 parameters, 200 multiply-adds."""
    with torch.device("meta"):
        return TrainingCost(torch.nn.Linear(10, 20), (torch.empty(1, 10),), samples=1000, epochs=3, batch=64)


def two_layers() -> TrainingCost:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.GELU(), torch.nn.Linear(20, 5))
        return TrainingCost(model, (torch.empty(1, 10),), samples=1000, epochs=3, batch=64)


def text(work=None, recipe=None, **options) -> str:
    return plan.plan(plan.Arguments("toy", "tiny", **options), recipe or Recipe(), work or linear())


def test_states_of_a_linear_layer():
    model = linear().model  # 220 fp32 parameters: 880 bytes
    assert plan.states_bytes(model, Recipe(), 1) == {"weights": 880, "gradients": 880, "optimizer states": 1760}
    assert plan.states_bytes(model, Recipe(ema_decay=0.9), 2)["EMA"] == 880
    assert plan.states_bytes(model, Recipe(), 2)["DDP buckets"] == 880
    assert plan.states_bytes(model, Recipe(optimizer="SGD"), 1)["optimizer states"] == 880


def test_frozen_weights_have_no_gradients():
    model = linear().model
    model.weight.requires_grad_(False)  # leaves the bias: 20 x 4 bytes
    states = plan.states_bytes(model, Recipe(), 1)
    assert states == {"weights": 880, "gradients": 80, "optimizer states": 160}


def test_activations_by_hand():
    # The layer keeps its input for the weight's gradient: 10 values per sample, in bf16 autocast's copy of them.
    assert plan.activation_bytes(linear(), "fp32") == (0, 40)
    assert plan.activation_bytes(linear(), "bf16") == (0, 20)
    # Two layers keep the input (10), GELU's input (20) and its output (20); the second weight once, if copied to bf16.
    assert plan.activation_bytes(two_layers(), "fp32") == (0, 200)
    assert plan.activation_bytes(two_layers(), "bf16") == (2 * 20 * 5, 100)


def test_autocast_rules_are_those_of_cuda():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.GroupNorm(1, 16))
        work = TrainingCost(model, (torch.empty(1, 10),), 1000, 3, 64)
    # bf16 input 20; GroupNorm runs in fp32 on CUDA: its input 64, mean and rstd 8. On a CPU it would stay in bf16.
    assert plan.activation_bytes(work, "bf16") == (0, 20 + 64 + 8)


def test_activations_leave_the_model_as_it_was():
    work = linear()
    plan.activation_bytes(work, "bf16")
    assert work.model.weight.device.type == "meta" and not torch.is_autocast_enabled("cuda")


def test_steps_and_flops():
    shown = text()
    assert "220 parameters" in shown and "200 multiply-adds" in shown
    # 1000 // 64 = 15 steps an epoch, 45 in all, 2,880 samples; 6 x 200 x 2880 = 3,456,000 FLOPs
    assert "3 epochs of 15 steps: 45 steps, 2,880 samples" in shown
    assert "3.46e+06 FLOPs" in shown


def test_accumulation_is_told_only_where_there_is_some():
    assert "64 = 2 GPUs x 32 samples, accumulated over 4 chunks of at most 8" in text(gpus=2, batch_per_gpu=8)
    assert "accumulated" not in text(gpus=2, batch_per_gpu=32)


def test_largest_batch_fills_the_card():
    shown = text(precision="fp32")
    # 0.9 x 24e9 bytes, less 880 + 880 + 1760, at 40 bytes a sample
    assert f"{(24_000_000_000 * 9 // 10 - 3520) // 40:,} in 24 GB" in shown


def test_hours():
    # 2880 samples at 0.2/s: 14,400 s
    assert "4.0 h at the 0.2 samples/s given" in text(samples_per_s=0.2)
    assert "assumed" not in text(samples_per_s=0.2)
    big = plan.times(plan.Arguments("toy", "tiny", gpus=2), samples=1, flops=312e12 * 3600 * 2)
    assert "not measured" in big[0]
    assert "2 x A100           312 TFLOP/s each: 10.0 h at 10%, 4.0 h at 25%" in big[1]


def test_measured_throughput_comes_from_the_newest_whole_record(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    for i, changes in enumerate((
        {"throughput": 1.0, "time": "2026-01-02"}, {"throughput": 9.0, "time": "2026-01-01"},
        {"throughput": 4.0, "hardware": "1x GPU"}, {"recipe": "other", "time": "2026-01-03"}, {"seed": "damaged"},
    )):
        folder = tmp_path / f"runs/toypaper/tiny/{i}"
        folder.mkdir(parents=True)
        write_json(folder / "results.json", record(**changes))
    assert [row[:2] for row in plan.measured("toypaper", "tiny")] == [(4.0, "1x GPU"), (1.0, "2 cores")]
    assert "runs/toypaper/tiny/4/results.json: field seed" in capsys.readouterr().err


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Asks on the command line, in a checkout with one paper, `planpaper`, of one recipe, `tiny`."""
    folder = tmp_path / "planpaper"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "recipes.py").write_text("from tools.tests.test_plan import Recipe\nRECIPES = {'tiny': Recipe()}")
    cases = "from tools.tests.test_plan import linear\ntraining_cost = lambda recipe: linear()"
    (folder / "cases.py").write_text(cases)
    monkeypatch.setattr(papers, "__path__", [str(tmp_path)])

    def ask(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["plan", *words])
        plan.main()
        return capsys.readouterr().out

    yield ask
    for name in [name for name in sys.modules if name.startswith("papers.planpaper")]:
        del sys.modules[name]


def test_from_the_command_line(ask):
    assert "planpaper tiny: a toy\n" in ask("planpaper", "tiny", "--gpus", "2", "--precision", "fp32")


def test_unknown_names_are_answered_with_the_known_ones(ask):
    with pytest.raises(UserError, match=r"unknown paper 'nosuch'; the papers are planpaper$"):
        ask("nosuch", "tiny")
    with pytest.raises(UserError, match=r"unknown recipe 'big' of planpaper; its recipes are tiny$"):
        ask("planpaper", "big")


@pytest.mark.parametrize("options", [{"gpus": 0}, {"gpus": 3}, {"batch_per_gpu": -1}])
def test_impossible_requests(options):
    with pytest.raises(UserError):
        text(**options)
