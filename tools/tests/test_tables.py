import json
import os

import pytest

from common.run import UserError, metric
from common.run.readme import markers
from tools import list as tools_list
from tools import tables

START, END = markers("results")


def record(**changes):
    return {
        "paper": "toypaper", "recipe": "tiny", "data": "digits", "metrics": [metric("top1", 90.0, "%")],
        "params": 10, "flops": 5, "wall_s": 1.0, "peak_mem_bytes": 1, "throughput": 2.0, "seed": 0,
        "git": "0123456789abcdef-dirty", "hardware": "2 cores", "time": "2026-01-01T00:00:00+00:00",
        "command": "/home/x/bin/python -m papers.toypaper.train tiny --seed 0 --out /tmp/runs", **changes,
    }


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of papers with one in it, `toypaper`."""
    folder = tmp_path / "papers/toypaper"
    (folder / "results").mkdir(parents=True)
    (folder / "recipes.py").write_text("RECIPES = {'tiny': None, 'big': None, 'base': None}")
    (folder / "README.md").write_text(f"# Toy\n\n{START}\n{END}\n\nAfter.\n")
    monkeypatch.setattr(tools_list, "PAPERS", folder.parent)
    return folder.parent


def keep(home, *records):
    for i, r in enumerate(records):
        (home / "toypaper/results" / f"{i}.json").write_text(json.dumps(r))


def readme(home) -> str:
    return (home / "toypaper/README.md").read_text()


def test_two_seeds_share_a_row(home):
    other = "python -m papers.toypaper.train tiny --seed=3 --resume auto"
    keep(home, record(), record(seed=3, metrics=[metric("top1", 93.0, "%")], command=other))
    tables.update(home, write=True)
    # mean of 90 and 93; sd = sqrt((1.5² + 1.5²) / 1) = 2.1213
    assert "| tiny | digits | top1 | – | 91.5 ± 2.1 % | 0, 3 | no | 2 cores | 0123456-dirty |\n" in readme(home)
    assert readme(home).count("- tiny: `python -m papers.toypaper.train tiny`\n") == 1
    assert readme(home).startswith("# Toy\n\n<!--") and readme(home).endswith("-->\n\nAfter.\n")


def test_one_incomparable_seed_makes_the_row_incomparable(home):
    ours = metric("top1", 81.6, "%", paper_value=81.7, paper_source="Table 2", comparable=True)
    keep(home, record(metrics=[ours]), record(seed=1, metrics=[{**ours, "comparable": False}]))
    tables.update(home, write=True)
    assert "| 81.7 % | 81.6 ± 0 % | 0, 1 | no |" in readme(home)


def test_rows_apart_and_in_the_order_of_the_recipes(home):
    beside = metric("top1", 81.62, "%", paper_value=81.7, paper_source="Table 2", comparable=True)
    keep(
        home,
        record(recipe="base", data="a|b"),
        record(recipe="big", metrics=[beside]),
        record(hardware="1x GPU"),
        record(command="python -m papers.toypaper.train tiny --epochs 5"),
        record(),
    )
    tables.update(home, write=True)
    rows = [line.split(" | ") for line in readme(home).splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| tiny", "| tiny", "| tiny", "| big", "| base"]
    assert "| base | a\\|b | top1" in readme(home)
    assert "| big | digits | top1 | 81.7 % | 81.62 % | 0 | yes |" in readme(home)
    assert "train tiny`; paper: Table 2\n" in readme(home)


def test_stale_until_rewritten_then_stable(home):
    assert tables.update(home, write=True) == [home / "toypaper/README.md"]
    assert "No runs are recorded yet." in readme(home)
    keep(home, record())
    before = readme(home)
    assert tables.update(home, write=False) == [home / "toypaper/README.md"]
    assert readme(home) == before
    tables.update(home, write=True)
    assert tables.update(home, write=False) == []


def test_check_names_the_stale_readme_and_fails(home, monkeypatch, capsys):
    keep(home, record())
    monkeypatch.setattr(tables, "ROOT", home.parent)
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as stop:
        tables.main()
    assert stop.value.code == 1
    assert "papers/toypaper/README.md is stale" in capsys.readouterr().out


def test_metrics_that_get_a_row():
    few = [metric(name, 1.0, "%") for name in "abcd"]
    assert tables.headline(few) == few
    many = [*few, metric("e", 1.0, "%", paper_value=2.0)]
    assert [m["name"] for m in tables.headline(many)] == ["a", "e"]


@pytest.mark.parametrize("change, expected", [
    ({"seed": "zero"}, r"0\.json: field seed: 'zero' is not of type 'integer'"),
    ({"metrics": [{**metric("top1", 1.0, "%"), "value": "high"}]}, r"field metrics\[0\]\.value: 'high'"),
    ({"metrics": [metric("top1", float("nan"), "%")]}, "expected finite numbers, got NaN"),
    ({"paper": "other"}, "field paper: expected 'toypaper', got 'other'"),
])
def test_a_bad_record_is_named_with_its_field(home, change, expected):
    keep(home, record(**change))
    with pytest.raises(UserError, match=expected):
        tables.update(home, write=True)


def test_a_missing_field_is_named(home):
    keep(home, {key: value for key, value in record().items() if key != "hardware"})
    with pytest.raises(UserError, match=r"0\.json: 'hardware' is a required property"):
        tables.update(home, write=True)


def test_a_seed_counts_once(home):
    keep(home, record(), record())
    with pytest.raises(UserError, match="2 records of tiny on 2 cores give top1 for seeds 0, 0"):
        tables.update(home, write=True)


def test_records_without_a_place_for_them(home):
    keep(home, record())
    (home / "toypaper/README.md").write_text("# Toy\n")
    with pytest.raises(UserError, match=f"add these two lines .*\n{START}\n{END}"):
        tables.update(home, write=True)
    assert readme(home) == "# Toy\n"


@pytest.mark.parametrize("value, sd, text", [
    (90.5556, None, "90.56"), (81.7, None, "81.7"), (0.00123456, None, "0.001235"), (12345.6, None, "12,346"),
    (90.5556, 0.3928, "90.56 ± 0.39"), (90.5556, 12.3, "91 ± 12"), (0.81131, 0.00213, "0.8113 ± 0.0021"),
    (5.0, 0.0, "5 ± 0"),
])
def test_figures(value, sd, text):
    assert tables.figure(value, sd) == text


def test_what_a_record_says_stays_in_its_cell(home):
    end = "<!-- results:end -->"
    command = f"python -m x --a '{end}' \n# `b`"
    keep(home, record(data=f"digits {end}\n| x | 99.9 % | yes", recipe="tiny", command=command))
    tables.update(home, write=True)
    once = readme(home)
    assert once.count(end) == 1 and once.endswith("-->\n\nAfter.\n")
    assert "| digits &lt;!-- results:end --> \\| x \\| 99.9 % \\| yes | top1 |" in once
    assert "- tiny: ``python -m x --a '<! -- results:end -->' '#' '`b`'``" in once
    assert tables.update(home, write=True) == [] and readme(home) == once


def test_quotes_that_never_end_are_no_obstacle(home):
    keep(home, record(command="python -m papers.toypaper.train tiny --data DATA b' --seed 3"))
    tables.update(home, write=True)
    assert "train tiny --data DATA" in readme(home) and "--seed" not in readme(home)


@pytest.mark.parametrize("text", [
    '{"paper": "\\ud800"}', '{"seed": 1e999}', '{"seed": 1' + "0" * 400 + "}", '{"seed": NaN}',
    "[" * 100_000, '{"a": ' * 100_000,
])
def test_what_is_no_record_is_named(home, text):
    (home / "toypaper/results/bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json: not readable as JSON"):
        tables.update(home, write=True)


def test_links_pipes_and_large_files_are_no_records(home, tmp_path):
    path = home / "toypaper/results/bad.json"
    (tmp_path / "elsewhere").write_text(json.dumps(record()))
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path), path.mkdir):
        make()
        with pytest.raises(UserError, match=r"bad\.json: not readable as JSON: a link, pipe or folder"):
            tables.update(home, write=True)
        path.rmdir() if path.is_dir() else path.unlink()
    path.write_text(" " * (tables.RECORD_BYTES + 1))
    with pytest.raises(UserError, match="more than the"):
        tables.update(home, write=True)


def test_a_recorded_command_can_be_typed_today(home):
    command = "python -m papers.toypaper.train tiny --weights runs/x --drop-epoch 3 --seeds 2 --about 'a b' "
    command += "--contenders a b"
    rows = [{**metric("top1", 3.0, "%"), "seeds": [4, 5], "spread": 1.0}]
    keep(home, record(command=command, metrics=rows))
    tables.update(home, write=True)
    today = "python -m papers.toypaper.train tiny --init runs/x --milestones 3 --seeds 4 5 --about 'a b' --compare a b"
    assert f"- tiny: `{today}`" in readme(home)


def test_the_papers_glances_are_gathered_in_the_readme_above(tmp_path, monkeypatch):
    papers = tmp_path / "papers"
    (papers / "toypaper").mkdir(parents=True)
    said = "# T\n\n| | |\n|---|---|\n| Verdict | seen, 3 ± 1 |\n"
    (papers / "toypaper/README.md").write_text(
        f"{said}<!-- results:start -->\n{tables.table([])}<!-- results:end -->\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("<!-- glance:start -->\n<!-- glance:end -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "listed", lambda: ["toypaper", "elsewhere"])
    monkeypatch.setattr(tables, "recipes", lambda name: type("Recipes", (), {"NAME": "Toy"}))
    assert tables.update(papers, write=True) == [tmp_path / "README.md"]
    assert "| [Toy](papers/toypaper/README.md) | seen, 3 ± 1 |  |  |  |" in (tmp_path / "README.md").read_text()
    assert tables.update(papers, write=False) == []
