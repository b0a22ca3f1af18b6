import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from common.run import ROOT, UserError, metric, write_json
from tools import report
from tools.tests.test_tables import record


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path


def add(root, name="toypaper/tiny/20260101-000000", results=None, log=(), **files):
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    if results:
        write_json(folder / "results.json", results)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    for stem, value in files.items():
        write_json(folder / f"{stem}.json", value)
    return folder


def html(root) -> str:
    return report.page(report.find_runs(root / "runs", root / "papers"), root / "runs")


def words(page: str) -> str:
    """The page as it is read: no tags, style or script, single spaces."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_a_tiny_run_is_called_not_comparable_and_nothing_of_it_comparable(root):
    scores = [metric("top1", 87.7778, "%"), metric("loss", 0.5, "nats")]
    add(root, results=record(metrics=scores), log=[{"step": 10, "loss": 2.0}])
    page, shown = html(root), words(html(root))
    assert "No figure here is comparable with a paper's" in shown  # said once
    assert "tiny top1 87.78 % · loss 0.5 nats seed 0, 20260101-000000 Run folder" in shown  # its line
    assert "metric ours paper top1 87.78 % loss 0.5 nats" in shown  # its table
    assert "Curves (not comparable)" in shown
    assert page.count('class="yes"') == 1  # where the word is explained


def test_the_papers_figure_stands_beside_ours(root):
    ours = metric("top1", 81.62, "%", paper_value=81.7, paper_source="Table 2", comparable=True)
    add(root, results=record(metrics=[ours]))
    add(root, "toypaper/cut/20260101-000000", record(recipe="cut", metrics=[{**ours, "comparable": False}]))
    shown = words(html(root))
    assert "top1 81.62 % comparable 81.7 % Table 2" in shown
    assert "cut top1 81.62 % (the paper 81.7) seed 0" in shown and "top1 81.62 % 81.7 % Table 2" in shown


def test_a_card_for_each_paper(root, monkeypatch):
    (root / "papers/toypaper").mkdir(parents=True)
    (root / "papers/toypaper/README.md").write_text(
        "# Toy\n\n| | |\n|---|---|\n| Verdict | [seen](x.md): `a` 3.1 ± 0.2 | over b |\n"
        "| Only a GPU can tell | speed |\n| Verdicts | other |\n", encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(report, "papers", lambda: ["toypaper"])
    monkeypatch.setattr(report, "recipes", lambda name: type("R", (), {"NAME": "A toy", "CLAIM": "Toys teach."}))
    report.known.cache_clear()
    add(root, results=record())
    add(root, "toypaper/tiny/20260101-000001")
    shown = words(html(root))
    report.known.cache_clear()
    assert "A toy Toys teach. Verdict seen: a 3.1 ± 0.2 | over b Only a GPU can tell speed Runs 1 finished" in shown


def test_settings_are_there_to_be_compared(root):
    add(root, results=record(), config={"recipe": {"lr": 0.1, "name": "a \"b\" <c>"}, "options": {"seed": 3}})

    class Settings(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if "data-settings" in dict(attrs):
                found.append(json.loads(dict(attrs)["data-settings"]))

    found = []
    Settings().feed(html(root))
    assert found == [{"lr": 0.1, "name": 'a "b" <c>', "seed": 3}]


def test_unfinished_and_damaged_runs_are_told(root, capsys, monkeypatch):
    add(root, log=[{"step": 5, "loss": 2.0}, {"step": 15, "loss": 1.0}])
    add(root, "toypaper/tiny/20260101-000001")
    cut = add(root, "toypaper/tiny/20260101-000002")
    (cut / "results.json").write_text('{"paper": "toyp')
    add(root, "toypaper/tiny/20260101-000003", record(seed="one"))
    (add(root, "toypaper/tiny/20260101-000004", record()) / "log.jsonl").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["report", "--runs", str(root / "runs")])
    report.main()
    shown, err = words((root / "runs/report.html").read_text()), capsys.readouterr().err
    assert "1 finished, 2 unfinished, 2 damaged" in shown
    assert "unfinished: last logged step 15, no result" in shown
    assert "unfinished: no step logged, no result" in shown
    for text in (err, shown.replace("&#39;", "'")):
        assert "20260101-000002/results.json: not readable as JSON" in text
        assert "20260101-000003/results.json: field seed: 'one' is not of type 'integer'" in text
        assert "20260101-000004/log.jsonl: not readable as text" in text


DEEP = "[" * 100_000
LONG = "1" + "0" * 400


def of_log(*rows: str):
    return lambda folder: (folder / "log.jsonl").write_text("\n".join(rows))


def of_metric(**change):
    return lambda folder: write_json(folder / "results.json", record(metrics=[metric("top1", 90.0, "%") | change]))


def as_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def as_link(name: str, target):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def as_pipe(name: str):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


HOSTILE = {
    "deep log": of_log('{"step": 1, "a": ' + DEEP), "deep config": as_text("config.json", DEEP),
    "deep results": as_text("results.json", DEEP), "no recipe": as_text("config.json", '{"recipe": null}'),
    "list recipe": as_text("config.json", '{"recipe": [1]}'), "long step": of_log(f'{{"step": {LONG}, "loss": 1}}'),
    "long loss": of_log(f'{{"step": 1, "loss": {LONG}}}'), "number": of_log("5"),
    "wide": of_log('{"step": 1, "loss": 1e308}', '{"step": 2, "loss": -1e308}'),
    "tiny": of_log('{"step": 1, "loss": 5e-324}', '{"step": 2, "loss": 0}'),
    "spread below 0": of_metric(spread=-1.0), "long memory": lambda folder: write_json(
        folder / "results.json", record(peak_mem_bytes=int(LONG))),
    "long flops": lambda folder: write_json(folder / "results.json", record(flops=int(LONG))),
    "infinite spread": as_text("results.json", json.dumps(record()).replace('"value"', '"spread": 1e999, "value"')),
    "half a character": as_text("results.json", json.dumps(record(data="\ud800"))),
    "half in config": as_text("environment.json", '{"command": "\\ud800"}'),
    "folder picture": lambda folder: (folder / "x.png").mkdir(), "text picture": as_text("x.png", "secret"),
    "dangling picture": as_link("x.png", "/nowhere"), "endless log": as_link("log.jsonl", "/dev/zero"),
    "pipe picture": as_pipe("x.png"), "pipe results": as_pipe("results.json"), "pipe log": as_pipe("log.jsonl"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_run_takes_no_other_with_it(root, name, capsys, monkeypatch):
    add(root, "toypaper/tiny/20260101-000001", record(data="the good one"), log=[{"step": 1, "loss": 2.0}])
    HOSTILE[name](add(root, "shiftvit/tiny/20260101-000002", log=[{"step": 1, "loss": 2.0}]))
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["report", "--runs", str(root / "runs")])
    report.main()
    page = (root / "runs/report.html").read_text()
    assert "the good one" in page and "2 runs in" in capsys.readouterr().out
    # what is no row of a log is left out of it, as the last line of a run that was killed
    assert name in ("half in config", "deep log", "number") or 'class="damaged"' in page
    assert "20260101-000002" in page and page.rstrip().endswith("</html>")


def test_nothing_is_shown_through_a_link(root):
    Image.new("RGB", (2, 2)).save(root / "private.png")
    (root / "private.jsonl").write_text('{"step": 7, "private": 1}')
    folder = add(root, results=record())
    as_link("x.png", root / "private.png")(folder)
    as_link("log.jsonl", root / "private.jsonl")(folder)
    Image.new("RGB", (2, 2)).save(add(root, "elsewhere/tiny/20260101-000009") / "y.png")
    (root / "runs/toypaper/tiny/20260101-000001").symlink_to(root / "runs/elsewhere/tiny/20260101-000009")
    (root / "runs/linked").symlink_to(root / "runs/elsewhere")
    page = html(root)
    assert page.count("data:image/png") == 1  # the one in its own place; an unfinished run is no card's
    assert "<strong>private" not in page and "x.png: no picture: ValueError: a link" in page
    assert page.count("a link, and what it leads to is not shown") == 4  # two runs, above and in their places


def test_the_last_good_page_stays_when_a_new_one_fails(root, monkeypatch):
    add(root, results=record())
    (root / "runs/report.html").write_text("good")
    monkeypatch.setattr("sys.argv", ["report", "--runs", str(root / "runs")])
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        report.main()
    assert (root / "runs/report.html").read_text() == "good"


def test_runs_of_earlier_versions_are_shown(root):
    old, new = record(), record(threads=1, recipe="other")
    add(root, "toypaper/tiny/20260101-000000", old, [{"step": 1, "images_per_s": 3.0}],
        config={"recipe": {"base_lr": 1}})
    add(root, "toypaper/other/20260101-000001", new, [{"step": 1, "samples_per_s": 4.0, "val/loss": 1.0}],
        environment={"threads": 1, "before": [{"git": "a"}]})
    shown = words(html(root))
    assert "images_per_s 3 at step 1" in shown and "samples_per_s 4 at step 1" in shown and "Damaged" not in shown


def test_names_are_escaped(root):
    name = "<script>alert(1)</script>"
    add(root, "toypaper/x/20260101-000000", record(recipe=name, data="a & b"), log=[{"step": 1, "<i>": 1.0}])
    page = html(root)
    assert page.count("<script") == 1 and "<i>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "a &amp; b" in page


def test_the_page_needs_nothing_else(root):
    folder = add(root, results=record(), log=[{"step": 1, "loss": 1.0}])
    Image.new("RGB", (2, 2)).save(folder / "boxes.png")
    Image.new("RGB", (2, 2)).save(folder / "curves.png")  # drawn from the log instead
    found, anchors = [], set()

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            attrs = dict(attrs)
            found.extend(attrs[key] for key in ("src", "href", "srcset", "data", "xlink:href") if key in attrs)
            anchors.add(attrs.get("id"))

    page = html(root)
    Links().feed(page)
    assert [link[:22] for link in found if not link.startswith("#")] == 2 * ["data:image/png;base64,"]
    assert all(link[1:] in anchors for link in found if link.startswith("#"))
    assert not re.search(r"<script |<link|@import|url\(|fetch|XMLHttp|import ", page)


def test_newest_first_with_kept_records_not_shown_twice(root):
    old, new = record(time="2026-01-01T00:00:00+00:00"), record(time="2026-01-03T00:00:00+00:00", seed=1)
    kept = record(time="2026-01-02T00:00:00+01:00", seed=2)
    add(root, "toypaper/tiny/a", old, environment={"time": old["time"]})
    add(root, "toypaper/tiny/b", new, environment={"time": new["time"]})
    (root / "papers/toypaper/results").mkdir(parents=True)
    write_json(root / "papers/toypaper/results/same.json", new)
    write_json(root / "papers/toypaper/results/kept.json", kept)
    runs = report.find_runs(root / "runs", root / "papers")
    assert [run.name for run in runs] == ["b", "kept", "a"]
    assert "Kept record:" in html(root)


def test_changes_from_the_recipe():
    shiftvit = pytest.importorskip("papers.shiftvit.recipes", reason="papers/shiftvit is not here")
    config = json.loads(json.dumps({
        "recipe": {**vars(shiftvit.RECIPES["tiny"]), "epochs": 5, "gone": 1},
        "options": {**vars(report.Options()), "out": "runs", "seed": 3},
    }))
    assert sorted(report.changes("shiftvit", "tiny", config)) == [
        ("epochs", "20", "5"), ("gone", "no such field", "1"), ("seed", "0", "3"),
    ]
    assert report.changes("shiftvit", "nosuch", config) is None
    assert report.changes("nosuch", "tiny", config) is None


def test_curves_reach_their_ticks():
    (loss, lr) = report.panels([{"step": 0, "loss": 0.0, "lr": 1}, {"step": 10, "val/loss": 10.0, "loss": math.nan}])
    assert (loss["title"], [s["key"] for s in loss["series"]], lr["title"]) == ("loss", ["loss", "val/loss"], "lr")
    right, bottom = report.WIDTH - 8, report.HEIGHT - report.BOTTOM
    assert loss["series"][0]["points"] == [(report.LEFT, bottom)]
    assert loss["series"][1]["points"] == [(right, report.TOP)]
    assert loss["series"][0]["lost"] == 1
    assert loss["y_ticks"][0] == (bottom, "0") and loss["y_ticks"][-1] == (report.TOP, "10")


@pytest.mark.parametrize("low, high", [(0, 1), (0.1, 0.1), (-3, 7e5), (1e-6, 3e-6), (0, 0), (98.6, 99.4)])
def test_ticks_enclose_and_are_few(low, high):
    found = report.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 6


def test_long_logs_keep_their_spikes():
    points = [(i, 0.0) for i in range(10_000)]
    points[777] = (777, 5.0)
    thin = report._thin(points)
    assert len(thin) <= report.POINTS and (777, 5.0) in thin and thin == sorted(thin)


def test_a_missing_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--runs", str(tmp_path / "typo")])
    with pytest.raises(UserError, match=r"no folder of runs at .*typo"):
        report.main()


def test_from_the_command_line(root):
    add(root, results=record())
    out = root / "page.html"
    command = [sys.executable, "-m", "tools.report", "--runs", str(root / "runs"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "toypaper" in out.read_text()
