"""Weights that travel with a paper: files that describe themselves."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import run
from common.run import shipped


@dataclass(frozen=True)
class Recipe:
    about: str = "a layer"
    sizes: tuple[int, ...] = (3, 2)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    return tmp_path / "papers" / "some" / "weights"


def ship(path, weights=None, **changes):
    said = dict(paper="some", recipe_name="tiny", recipe=Recipe(sizes=(3, 1)), classes=["a", "b"], revision="f00")
    weights = weights or {"weight": torch.full((2, 3), 1 / 3), "count": torch.tensor(7)}
    shipped.write(path, weights, **said | changes)


def test_a_file_is_loaded_as_a_run_folder_is(home):
    ship(home / "best.safetensors")
    path = shipped.path_of("some", Path("shipped"))
    assert path == home / "best.safetensors" and shipped.is_run(path)
    recipe, weights, state = run.load_run(path, Recipe)
    assert recipe.sizes == [3, 1] and state["classes"] == ["a", "b"]
    assert weights["model"]["weight"].dtype == torch.float16 and weights["model"]["count"].item() == 7
    layer = run.built(lambda: torch.nn.Linear(3, 2, bias=False), {"weight": weights["model"]["weight"]}, "x")
    assert layer.weight.dtype == torch.float32 and torch.allclose(layer.weight, torch.tensor(1 / 3), atol=1e-4)


def test_names(home):
    with pytest.raises(run.UserError, match="no weights are shipped with some"):
        shipped.path_of("some", Path("shipped"))
    for name in ("b", "a"):
        ship(home / f"{name}.safetensors")
    assert shipped.path_of("some", Path("shipped")).stem == "a"
    assert shipped.path_of("some", Path("shipped:b")).stem == "b"
    with pytest.raises(run.UserError, match="no weights 'c' are shipped with some; there are a, b"):
        shipped.path_of("some", Path("shipped:c"))
    with pytest.raises(run.UserError, match="no checkpoint at elsewhere"):
        shipped.path_of("some", Path("elsewhere"))
    assert shipped.for_demo("some", None).stem == "a"


def test_a_demo_without_shipped_weights_takes_the_newest_run(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(run.UserError, match="no finished run under"):
        shipped.for_demo("some", None)


def test_what_may_not_be_shipped(home):
    with pytest.raises(run.UserError, match=r"weight holds numbers beyond torch.float16"):
        ship(home / "a.safetensors", {"weight": torch.tensor([1e6])})
    with pytest.raises(run.UserError, match=r"would have .* bytes, more than the 4,000,000"):
        ship(home / "a.safetensors", {"weight": torch.zeros(2_000_000)})
    assert not list(home.iterdir())


@pytest.mark.parametrize("key, value", [("recipe", "{"), ("classes", None), ("classes", "[1]"), ("recipe", "[]"),
                                        ("recipe", '{"sizes": "x"}'), ("recipe", "[" * 100_000)])
def test_a_strangers_header_is_one_error(tmp_path, key, value):
    path = tmp_path / "a.safetensors"
    ship(path)
    weights, said = load_file(path), {"format": "pt", "paper": '"some"', "recipe_name": '"tiny"', "recipe": "{}",
                                      "classes": "[]", "revision": '"f00"'}
    said |= {key: value}
    if value is None:
        del said[key]
    save_file(weights, path, said)
    with pytest.raises(run.UserError, match=r"truncated or not a checkpoint|no run of this version"):
        run.load_run(path, Recipe)


def test_bare_weights_are_no_run(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert not shipped.is_run(tmp_path / "a.safetensors")
    with pytest.raises(run.UserError, match=r"does not say what network it holds; give --recipe"):
        run.load_run(tmp_path / "a.safetensors", Recipe)


@pytest.mark.slow
def test_a_run_is_shipped_evaluated_and_shown(tmp_path, monkeypatch):
    def command(*words):
        done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=run.ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout

    command("papers.shiftvit", "smoke", "--out", tmp_path)
    (folder,) = tmp_path.glob("shiftvit/smoke/*")
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    from tools import ship as tool

    monkeypatch.setattr(sys, "argv", ["ship", str(folder), "--name", "digits", "--data-licence", "BSD-3-Clause",
                                      "--limits", "Digits of 32 px."])
    tool.main()
    path = tmp_path / "papers" / "shiftvit" / "weights" / "digits.safetensors"
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "Digits of 32 px." in card and "| top1 |" in card and "python -m papers.shiftvit smoke" in card
    command("papers.shiftvit.evaluate", path, "--out", tmp_path / "scores.json")
    top1, trained = (
        json.loads(file.read_text(encoding="utf-8"))["metrics"][0]["value"]
        for file in (tmp_path / "scores.json", folder / "results.json")
    )
    assert top1 == pytest.approx(trained, abs=0.6)  # two of 360 pictures: halves are rounded
    assert "shiftvit_micro from" in command("papers.shiftvit.demo", "--checkpoint", path, "--out", tmp_path / "a.png")
