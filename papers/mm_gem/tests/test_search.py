"""The index of pictures: what it finds, how it lasts (kills, changes, links), and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common.data.tiny.scenes import scenes
from common.run import ROOT, UserError
from papers.mm_gem import build, index_bench, search
from papers.mm_gem.embedder import Embedder, Files
from papers.mm_gem.index import Index, Row
from papers.mm_gem.recipes import RECIPES


@pytest.fixture(scope="module")
def embedder():
    torch.manual_seed(0)
    processor = build.processor(RECIPES["tiny"])
    return Embedder(build.model(RECIPES["tiny"], processor).eval(), processor)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    root = scenes(train=4, val=24, root=tmp_path / "scenes") / "val"
    return shutil.copytree(root, tmp_path / "pictures")


def _embed(embedder, home, folder, kind="auto"):
    index = Index.open(home, "m") if (home / "about.json").exists() else Index.create(home, "m", 64, kind)
    counts = search.embed(embedder, index, folder, search.pictures_in(folder))
    return Index.open(home, "m"), counts


def _names(index):
    return sorted(os.path.basename(row.name) for row in index.rows())


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
def test_an_index_finds_its_own_pictures(embedder, tmp_path, folder, kind):
    if kind != "exact":
        pytest.importorskip("faiss", reason="needs faiss-cpu")
    index, counts = _embed(embedder, tmp_path / "index", folder, kind)
    files = search.pictures_in(folder)
    assert counts == {"new": 24, "dropped": 0, "doubles": 0, "unreadable": 0} and len(index) == 24
    vectors = embedder.images(Files(files))
    for i in (0, 13):
        name, similarity = index.nearest(vectors[i], 3)[0]
        assert similarity == pytest.approx(1, abs=1e-5) and name == str(files[i])
    found = [similarity for _, similarity in index.nearest(vectors[5], 99)]
    assert found == pytest.approx((vectors @ vectors[5]).sort(descending=True).values.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="width 64, the model 3"):
        index.nearest(vectors[0, :3], 1)
    with pytest.raises(UserError, match="--count 0: at least 1"):
        index.nearest(vectors[0], 0)
    if kind != "exact":  # from the cache, and made anew where that is torn
        (kept,) = (tmp_path / "cache").rglob("*.faiss")
        kept.write_bytes(b"torn")
        assert Index.open(tmp_path / "index", "m").nearest(vectors[13], 1)[0][0] == str(files[13])


def test_parts_give_what_one_matrix_gives(tmp_path):
    index, vectors = Index.create(tmp_path, "m", 16), index_bench.vectors(100, 16, 1)
    for first in range(0, 100, 7):
        rows = [Row(str(i), 1, 1, str(i)) for i in range(first, min(100, first + 7))]
        index.add(rows, vectors[first : first + 7])
    query = index_bench.vectors(3, 16, 2)
    values, places = Index.open(tmp_path, "m").search(query, 12)
    best = (query @ vectors.mT).topk(12)
    torch.testing.assert_close(values, best.values)
    assert torch.equal(places, best.indices)
    assert index.nearest(query[0], 1)[0][0] == str(int(best.indices[0, 0]))


def test_it_takes_in_what_is_new_and_drops_what_has_gone(embedder, tmp_path, folder):
    home = tmp_path / "index"
    _embed(embedder, home, folder)
    before = {row.name: row for row in Index.open(home, "m").rows()}
    (folder / "000000.png").unlink()
    shutil.move(folder / "000001.png", folder / "moved.png")
    Image.effect_noise((40, 40), 90).convert("RGB").save(folder / "000002.png")
    (folder / "torn.png").write_bytes(b"no picture")
    calls = []
    watched = Embedder(embedder.model, embedder.processor)
    watched.prepared = lambda pixels: calls.append(len(pixels)) or embedder.prepared(pixels)
    index, counts = _embed(watched, home, folder)
    assert counts == {"new": 2, "dropped": 3, "doubles": 0, "unreadable": 1} and sum(calls) == 2
    assert _names(index) == sorted(p.name for p in folder.glob("*.png") if p.name != "torn.png")
    noise = str(folder.resolve() / "000002.png")
    assert index.nearest(embedder.images(Files([noise]))[0], 1)[0] == (noise, pytest.approx(1, abs=1e-5))
    kept = [row for row in index.rows() if row.name in before and row.name != noise]
    assert len(kept) == 21 and all(before[row.name] == row for row in kept)
    assert _embed(watched, home, folder)[1] == {"new": 0, "dropped": 0, "doubles": 0, "unreadable": 0}
    other = tmp_path / "other"
    other.mkdir()
    Image.effect_noise((40, 40), 50).convert("RGB").save(other / "a.png")
    assert len(_embed(watched, home, other)[0]) == 24, "what stands elsewhere stays"
    assert sum(calls) == 3


def test_links_and_doubles_count_once(embedder, tmp_path, folder):
    home, first = tmp_path / "index", folder / "000000.png"
    (folder / "a_link.png").symlink_to(first)
    os.link(folder / "000001.png", folder / "hard.png")
    shutil.copy(first, folder / "z_copy.png")
    (folder / "loop").symlink_to(folder)
    (away := tmp_path / "away").mkdir()
    shutil.move(folder / "000003.png", away)
    (folder / "linked").symlink_to(away)
    assert len(search.pictures_in(folder)) == 24 + 2
    index, counts = _embed(embedder, home, folder)
    assert counts["new"] == 24 and counts["doubles"] == 2 and "000003.png" in _names(index)
    first.unlink()  # now the copy is the only one
    index, counts = _embed(embedder, home, folder)
    assert counts["new"] == counts["dropped"] == 1 and "z_copy.png" in _names(index)


def test_another_model_is_refused(embedder, tmp_path, folder):
    own = search.model_print(embedder)
    Index.create(tmp_path / "index", own, 64)
    assert len(Index.open(tmp_path / "index", own)) == 0
    torch.manual_seed(1)
    other = Embedder(build.model(RECIPES["tiny"], embedder.processor).eval(), embedder.processor)
    with pytest.raises(UserError, match="was made by another model"):
        Index.open(tmp_path / "index", search.model_print(other))


def test_damaged_indices_are_one_line(tmp_path):
    vectors = index_bench.vectors(40, 8, 1)
    home = tmp_path / "index"
    index = Index.create(home, "m", 8)
    index.add([Row(f"{i}.png", 1, 1, str(i)) for i in range(40)], vectors)
    index.save_passed()
    (part,) = index.parts
    assert Index.open(home, "m").nearest(vectors[3], 1)[0][0] == "3.png"

    def fails(what=""):
        with pytest.raises(UserError, match=what) as found:
            Index.open(home, "m").nearest(vectors[3], 5)
        assert "\n" not in str(found.value)

    good = part.read_bytes()
    for damaged in (b"", good[:20], good[:-7], b"\xff" * 60, good[:8] + b"[" * 500 + good[508:]):
        part.write_bytes(damaged)
        fails()
    rows = [[f"{i}.png", 1, 1, str(i)] for i in range(40)]
    for wrong in (rows[:-1], [[1, 2]] * 40, [[7, 1, 1, "x"]] * 40, {"a": 1}, "x" * 40):
        save_file({"vectors": vectors}, part, {"rows": json.dumps(wrong)})
        fails("is damaged")
    for tensors in ({"vectors": vectors[:, :4].clone()}, {"vectors": vectors.half()}, {"weights": vectors}):
        save_file(tensors, part, {"rows": json.dumps(rows)})
        fails("is no index of this program")
    save_file({"vectors": vectors * float("nan")}, part, {"rows": json.dumps(rows)})
    fails("not finite")
    part.write_bytes(good)
    for name, text in (("passed.json", "[]"), ("passed.json", '{"a": 1}'), ("about.json", "{}"), ("about.json", "[")):
        kept = (home / name).read_bytes()
        (home / name).write_text(text)
        fails("is no index of this program")
        (home / name).write_bytes(kept)
    (home / "vectors.faiss").write_bytes(b"IwFl")  # of no use to it: read by nobody
    assert Index.open(home, "m").nearest(vectors[3], 1)[0][0] == "3.png"


def test_one_process_writes_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("papers.mm_gem.index.PATIENCE_S", 0)
    index = Index.create(tmp_path, "m", 8)
    with index.held(), pytest.raises(UserError, match="another process is writing"), index.held():
        pass


@pytest.mark.slow
def test_a_killed_embedding_goes_on(embedder, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(700):
        Image.effect_noise((96, 96), 1 + i / 8).convert("RGB").save(folder / f"{i}.png")
    for part in (embedder.model, embedder.processor):
        part.save_pretrained(tmp_path / "model")
    words = [sys.executable, "-c", "from papers.mm_gem import search; from common import run; search.PART = 64; "
             "run.main(search.main)", "embed", str(folder), "--checkpoint", str(tmp_path / "model"), "--index",
             str(tmp_path / "index")]
    process = subprocess.Popen(words, cwd=ROOT)
    parts = tmp_path / "index" / "parts"
    while len(list(parts.glob("*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (parts / ".000099-x.safetensors.1.part").write_bytes(b"half")
    model = search.model_print(embedder)
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert 2 <= len(before) < 11, "it was killed in the middle"
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is embedded twice"
    index = Index.open(tmp_path / "index", model)
    assert _names(index) == sorted(f"{i}.png" for i in range(700)) and not list(parts.glob(".*"))
    assert f"{700 - 64 * len(before)} new" in done.stdout


@pytest.mark.long
def test_a_million_vectors(tmp_path):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    args = index_bench.Arguments(count=1_000_000, width=64, kinds=("exact", "ivf"), folder=tmp_path)
    exact, ivf = index_bench.study(args)
    assert ivf["recall"] > 0.9
    size = args.count * args.width * 4
    assert exact["peak_bytes"] < 0.5 * size, "exact search reads the parts one after the other"
    assert ivf["peak_bytes"] < 3.5 * size
    print(index_bench.page([exact, ivf]))


def test_the_benchmark_compares_with_exact_search(tmp_path):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    index_bench.write(tmp_path / "index", 3000, 32)
    args = [index_bench.Arguments(width=32, queries=5, folder=tmp_path / "index", one=kind)
            for kind in index_bench.KINDS]
    records = index_bench.with_recall([index_bench.one(each) for each in args])
    assert records[0]["recall"] == 1 and all(0.5 < record["recall"] <= 1 for record in records)
    assert index_bench.page(records).count("\n") == 5
