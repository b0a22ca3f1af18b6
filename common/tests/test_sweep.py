"""Members times seeds, the clock, and the end of a run, on a training that takes no time."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from common import run

WORLD = run.World(0, 1, torch.device("cpu"), None)
COLUMNS = {"top1": run.Column("test, %", digits=2), "params": run.PARAMS}


@dataclass(frozen=True)
class Recipe:
    about: str = "a toy"
    dataset: str = "digits"
    factor: float = 1.0
    compare: tuple[str, ...] = ()
    paper_top1: float | None = None


def train(name, recipe, options, world):
    """Its score is ten times the seed plus the factor."""
    folder = run.open_run("toy", name, recipe, options, world)
    if options.stop_at:
        return folder
    metrics = [run.metric("top1", 10 * options.seed + recipe.factor, "%", paper_value=80.0, paper_source="Table 1")]
    run.finish(folder, "toy", name, options, data="digits", metrics=metrics, params=int(recipe.factor), flops=None,
               wall_s=2.0, throughput=5.0, peak_mem_bytes=int(100 * recipe.factor + options.seed))
    return folder


def sweep(options, picture=None, **changes):
    members = {"small": Recipe(factor=1.0), "large, wide": Recipe(factor=3.0)}
    return run.sweep("toy", "pair", Recipe(compare=("small", "large, wide")), options, WORLD, members, train, COLUMNS,
                     picture=picture, **changes)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_table_of_means_and_spreads(tmp_path):
    folder = sweep(run.Options(out=tmp_path, seeds=(0, 1, 2)))
    found = {m["name"]: m for m in results(folder)["metrics"]}
    assert found["large, wide top1"]["value"] == 13 and found["large, wide top1"]["spread"] == 10
    assert found["small top1"]["seeds"] == [0, 1, 2] and "spread" not in found["small params"]
    assert "| large, wide | 13.00 ± 10.00 | 3 |" in (folder / "report.md").read_text()
    assert results(folder)["wall_s"] == 12 and results(folder)["peak_mem_bytes"] == 302  # the sum; the largest
    assert run.by_member(results(folder)["metrics"], COLUMNS).keys() == {"small", "large, wide"}


def test_a_comparison_has_three_seeds_by_itself(tmp_path):
    assert results(sweep(run.Options(out=tmp_path, seed=4)))["metrics"][0]["seeds"] == [4, 5, 6]


def test_what_is_finished_stays_finished(tmp_path):
    options = run.Options(out=tmp_path, seeds=(0, 1))
    folder = sweep(replace(options, stop_at=1))
    assert not (folder / "results.json").exists()
    asked = []

    def scores(home, label):
        asked.append(label)
        return run.read_scores(home)

    killed = iter([False, False, True])

    def kill(home, label):
        if next(killed):
            raise KeyboardInterrupt
        return scores(home, label)

    with pytest.raises(KeyboardInterrupt):
        sweep(replace(options, resume="auto"), scores=kill)
    assert sweep(replace(options, resume="auto"), scores=scores) == folder
    assert asked == ["small", "large, wide"] * 2
    assert all(len(list(folder.glob(f"seed{seed}/toy/{label}/*"))) == 1 for seed in (0, 1) for label in ("small",))


def test_a_failing_picture_takes_no_result_with_it(tmp_path, capsys):
    def picture(folder, runs):
        assert len(runs["small"]) == 2
        raise ValueError("no such color")

    folder = sweep(run.Options(out=tmp_path, seeds=(0, 1)), picture)
    assert "picture could not be made" in (err := capsys.readouterr().err) and "no such color" in err
    assert results(folder)["metrics"] and "| small |" in (folder / "report.md").read_text() and run.finished(folder)


def test_a_kill_among_the_pictures_leaves_a_run_to_resume(tmp_path):
    def picture(*_):
        raise KeyboardInterrupt

    options = run.Options(out=tmp_path, seeds=(0,))
    with pytest.raises(KeyboardInterrupt):
        sweep(options, picture)
    (folder,) = tmp_path.glob("toy/pair/*")
    assert results(folder) and "| small |" in (folder / "report.md").read_text() and not run.finished(folder)
    drawn = []
    assert sweep(replace(options, resume="auto"), lambda *_: drawn.append(1)) == folder
    assert drawn == [1] and run.finished(folder)


def test_several_seeds_of_one_recipe(tmp_path):
    folder = run.over_seeds("toy", "one", Recipe(), run.Options(out=tmp_path, seeds=(1, 2)), WORLD, train)
    (row,) = results(folder)["metrics"]
    assert row["name"] == "top1" and row["value"] == 16 and row["spread"] == pytest.approx(50**0.5)
    assert row["seeds"] == [1, 2] and row["paper_value"] == 80 and not row["comparable"]


def test_old_records_are_read_whatever_stands_between_label_and_score():
    rows = [run.metric(name, 1.0, "%") for name in ("conv-8 top1", "mlp, wide, top1", "maml: top1", "none params")]
    assert list(run.by_member(rows, COLUMNS)) == ["conv-8", "mlp, wide", "maml", "none"]


def test_an_unknown_member_is_named():
    with pytest.raises(run.UserError, match=r"no member 'c' in --compare; there are a, b"):
        run.check_members(("a", "c"), ("a", "b"))


# The clock -------------------------------------------------------------------------------------------------


def test_what_is_due():
    clock = run.Clock(run.Options(log_every=4, stop_at=11), steps=12, batch=8, per_epoch=5, eval_every=10)
    due = {"log": [], "save": [], "eval": []}
    for step, sample in clock.over("abcdefghijk"):
        clock.stop()
        assert sample == "abcdefghijk"[step - 1]
        for key, steps in due.items():
            steps += [step] * getattr(clock, f"{key}_due")
    assert due == {"log": [4, 8], "save": [5, 10, 11], "eval": [10]} and clock.stopped and clock.end == 11
    assert not run.Clock(run.Options(), steps=12, batch=8, per_epoch=5, eval_every=10).eval_due  # nothing to score
    assert run.Clock(run.Options(), steps=12, batch=8, per_epoch=5, start=10, eval_every=10).eval_due


def test_the_processors_seconds_are_this_process_own(monkeypatch):
    now, used = [100.0], [7.0]
    monkeypatch.setattr("common.run.log.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("common.run.log.time.process_time", lambda: used[0])
    clock = run.Clock(run.Options(), steps=9, batch=6, per_epoch=3, start=7, wall_s=50.0, cpu_s=20.0)
    for _ in clock.over("ab"):
        now[0] += 5  # of which others had the processor for four
        used[0] += 1
        clock.stop()
        now[0] += 3
        used[0] += 3  # evaluation
    assert clock.wall_s == 60 and clock.cpu_s == 22


def test_evaluation_is_outside_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("common.run.log.time.perf_counter", lambda: now[0])
    clock = run.Clock(run.Options(), steps=9, batch=6, per_epoch=3, start=4, wall_s=50.0)

    def batches():
        for _ in range(2):
            now[0] += 1  # loading
            yield None

    for _ in clock.over(batches()):
        now[0] += 2  # the step
        clock.stop()
        now[0] += 1000  # evaluation
    assert clock.wall_s == 56 and clock.rate == 2 and clock.step == 6


def test_a_score_is_asked_for_once(tmp_path):
    log = run.Log(tmp_path, WORLD, steps=4)
    log.step(2, {"loss": 1.0})
    assert log.scores(2, lambda: {"top1": 1 / 3}) == {"top1": 1 / 3}
    log.close()
    log = run.Log(tmp_path, WORLD, steps=4, start=2)
    assert log.scores(2, lambda: pytest.fail("known")) == {"top1": 1 / 3}
    assert run.read_log(tmp_path) == [{"step": 2, "loss": 1.0, "val/top1": 1 / 3}]
    log.close()


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, 4.0])
    asked = dict(step=7, loss=torch.tensor([1.0, float("inf")]), folder=tmp_path)
    assert run.clip_gradients([weight], 0.0, **asked) == 5 and weight.grad.tolist() == [3, 4]
    assert run.clip_gradients([weight], 1.0, **asked) == 5 and weight.grad.norm().item() == pytest.approx(1)
    weight.grad[0] = float("nan")
    with pytest.raises(run.UserError, match=r"not finite at step 7 \(loss \[1.0, inf\]\).*--lr"):
        run.clip_gradients([weight], 0.0, **asked)
