"""Captions, conversations and the generated scenes: what is read is what is there; wrong files are named. Caption
metrics against COCO's own evaluation code."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import captions, conversations
from common.data.picture import Unreadable
from common.data.tiny.scenes import COLORS, RELATIONS, scenes, word_tokenizer
from common.metrics import captions as metrics
from common.run import UserError

FIXTURES = Path(__file__).parent / "fixtures"
COCO = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco" / "coco_small.tar"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return scenes(60, 20, 48, root=tmp_path_factory.mktemp("scenes") / "scenes")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# Metrics ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_scores():
    return json.loads((FIXTURES / "caption_metrics.json").read_text())


def test_metrics_equal_cocos_evaluation(coco_scores):
    rows = coco_scores["rows"]
    candidates, references = [r["candidate_tokens"] for r in rows], [r["references_tokens"] for r in rows]
    cider, rouge = metrics.cider_d(candidates, references), list(map(metrics.rouge_l, candidates, references))
    for row, c, r in zip(rows, cider, rouge):
        assert (c, r) == pytest.approx((row["cider_d"], row["rouge_l"]), abs=1e-6)
        single = metrics.bleu([row["candidate_tokens"]], [row["references_tokens"]])
        assert single == pytest.approx(row["bleu"], abs=1e-6)
    assert metrics.bleu(candidates, references) == pytest.approx(coco_scores["corpus"]["bleu"], abs=1e-6)
    found = metrics.scores([r["candidate"] for r in rows], [r["references"] for r in rows])  # with our tokenizer
    assert found["cider_d"] == pytest.approx(coco_scores["corpus"]["cider_d"], abs=1e-6)
    assert found["rouge_l"] == pytest.approx(coco_scores["corpus"]["rouge_l"], abs=1e-6)


def test_tokens_are_cocos(coco_scores):
    texts = [(text, tokens) for row in coco_scores["rows"] for text, tokens in
             zip([*row["references"], row["candidate"]], [*row["references_tokens"], row["candidate_tokens"]])]
    wrong = [(text, metrics.tokenize(text), tokens) for text, tokens in texts if metrics.tokenize(text) != tokens]
    # Java's keeps the stop of an abbreviation at the end of a sentence.
    assert [tokens for *_, tokens in wrong] == ["some cars on the freeway are exiting onto sunset blvd."]


@pytest.mark.parametrize("text, tokens", [
    ("A man's dog doesn't run!", "a man 's dog does n't run"), ("3.5 x-rays, (two)", "3.5 x-rays two"), ("", ""),
])
def test_tokenize(text, tokens):
    assert metrics.tokenize(text) == tokens


@pytest.mark.parametrize("answer, truths, right", [
    ("Red.", ["red"], True), ("the red one", ["red one"], True), ("red blue", ["red"], False), ("", ["red"], False),
    ("two", ["one", "two"], True), ("A.", ["A"], True), ("", ["A"], False), ("the", ["A"], False), ("!", ["?"], False),
])
def test_exact_match(answer, truths, right):
    assert metrics.exact_match(answer, truths) is right


def test_metrics_of_perfect_and_empty_candidates():
    references = [["a red circle", "one red circle"], ["two blue squares left", "blue squares"]]
    perfect = [texts[0] for texts in references]
    assert metrics.bleu(perfect, references)[2] == pytest.approx(1, abs=1e-6)
    assert all(metrics.rouge_l(c, r) == pytest.approx(1) for c, r in zip(perfect, references))
    assert min(metrics.cider_d(perfect, references)) > 1
    assert metrics.bleu(["", ""], references)[0] < 1e-5 and metrics.cider_d(["", ""], references) == [0, 0]
    assert metrics.rouge_l("", ["a"]) == 0
    with pytest.raises(ValueError):
        metrics.cider_d(["a"], references)


# Scenes ------------------------------------------------------------------------------------------------------


def test_scenes_are_written_the_same_every_time(root, tmp_path):
    again = scenes(60, 20, 48, root=tmp_path / "again")
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(files) == 80 + 6 + 1
    assert all((root / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert (scenes(60, 20, 48, seed=1, root=tmp_path / "b") / "train/000000.png").read_bytes() != (
        root / "train/000000.png"
    ).read_bytes()


def test_what_is_said_is_what_is_shown(root):
    """Colour, number and place of the drawn objects, found in the pixels, agree with captions, boxes and answers."""
    regions = captions.read_regions(root, "train")
    said = {row.image: row.captions for row in captions.read_captions(root, "train")}
    for image, texts in said.items():
        pixels = np.asarray(Image.open(image)).astype(int)
        boxes = [r for r in regions if r.image == image]
        for region in boxes:
            x, y, w, h = (int(v) for v in region.box_xywh_px)
            assert x >= 0 and y >= 0 and x + w <= 48 and y + h <= 48
            _, color, shape = region.phrase.split()
            inside = pixels[y : y + h, x : x + w].reshape(-1, 3)
            near = np.abs(inside - np.array(COLORS[color])).max(1) <= 20
            assert near.mean() > {"circle": 0.6, "square": 0.95, "triangle": 0.35}[shape]
            assert f"{color} {shape}" in texts[0]
        found = next((relation for relation in RELATIONS if relation in texts[0]), None)
        assert len(boxes) == (2 if found else {"a": 1, "two": 2, "three": 3}[texts[0].split()[0]])
        if found:
            first, second = (np.array(r.box_xywh_px[:2]) + np.array(r.box_xywh_px[2:]) / 2 for r in boxes)
            axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[found]
            assert sign * (first - second)[axis] > 0 and texts[1].split(" . ")[0].startswith(boxes[1].phrase)


def test_no_answer_is_given_away(root):
    rows = conversations.read_conversations(root / "conversations_train.json", strict=True)
    assert len(rows) == 120 and any(len(row.messages) > 2 for row in rows)
    for row in rows:
        text = [m["content"][-1]["text"] for m in row.messages]
        for i in range(1, len(text), 2):
            earlier = set(" ".join(text[:i]).split())
            assert not set(text[i].split()) & {*COLORS, "circle", "square", "triangle"} & earlier
    held_out = conversations.read_conversations(root / "conversations_val.json", strict=True)
    assert Counter(len(row.messages) for row in held_out) == {2: len(held_out)}
    assert {row.category for row in held_out} == {"describe", "colour", "shape", "count", "relation"}


def test_the_words_are_all_known(root):
    tokenizer = word_tokenizer()
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
    for split in ("train", "val"):
        for row in conversations.read_conversations(root / f"conversations_{split}.json"):
            for message in row.messages:
                assert tokenizer.unk_token_id not in tokenizer(message["content"][-1]["text"])["input_ids"]
    assert tokenizer.decode(tokenizer("USER: a red circle .")["input_ids"]) == "USER : a red circle ."


# Captions ----------------------------------------------------------------------------------------------------


def test_captions_of_both_splits(root):
    rows = captions.read_captions(root, "train")
    assert len(rows) == 60 and all(len(row.captions) == 2 for row in rows)
    assert captions.read_captions(root, "test") == captions.read_captions(root, "val") != rows
    data = captions.Captions(rows)
    image, texts = data[7]
    assert image.mode == "RGB" and image.size == (48, 48) and texts == data.captions(7) == rows[7].captions


def test_of_the_two_names_of_a_split_one_counts(root, tmp_path):
    (tmp_path / "annotations").mkdir()
    for name, split in (("val2017", "val"), ("test2017", "train")):
        content = (root / "annotations" / f"captions_{split}.json").read_text()
        (tmp_path / "annotations" / f"captions_{name}.json").write_text(content)
    found = {split: captions.read_captions(tmp_path, split) for split in ("val", "test")}
    folders = {split: {row.image.parent.name for row in rows} for split, rows in found.items()}
    assert folders == {"val": {"val2017"}, "test": {"test2017"}}


def test_a_split_table_overrides_the_folders(root, tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        content = (root / "annotations" / f"captions_{split}.json").read_text()
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(content)
    table = "folder,file,split\ntrain2017,000001.png,test\nval2017,000002.png,train\nval2017,000003.png,train\n"
    (tmp_path / "annotations" / "caption_split.csv").write_text(table)
    names = {split: [(r.image.parent.name, r.image.name) for r in captions.read_captions(tmp_path, split)]
             for split in ("train", "val")}
    assert names["train"] == [("val2017", "000002.png"), ("val2017", "000003.png")]
    assert names["val"] == [("train2017", "000001.png")]


@pytest.mark.skipif(not COCO.is_file(), reason="needs ../shared/data/coco/coco_small.tar")
def test_captions_of_coco(tmp_path):
    with tarfile.open(COCO) as archive:
        wanted = [m for m in archive if "annotations/" in m.name and m.name.endswith((".json", ".csv"))]
        archive.extractall(tmp_path, wanted, filter="data")
    (home,) = (path.parent for path in tmp_path.rglob("annotations"))
    train, test = (captions.read_captions(home, split) for split in ("train", "val"))
    assert (len(train), len(test)) == (239, 60) and sum(len(r.captions) for r in train + test) == 1496
    regions = captions.read_regions(home, "val")
    assert len(regions) == 353 and {r.image for r in regions} <= {r.image for r in test}  # the table divides boxes too


@pytest.mark.parametrize("prepare, message", [
    (lambda p: None, "has no captions for 'train': expected"),
    (lambda p: (p / "annotations/captions_train.json").write_text("{"), "no COCO annotation file"),
    (lambda p: (p / "annotations/captions_train.json").write_text("[]"), "no COCO annotation file"),
    (lambda p: (p / "annotations/captions_train.json").write_text('{"images": []}'), "no COCO annotation file"),
])
def test_wrong_caption_folders(tmp_path, prepare, message):
    (tmp_path / "annotations").mkdir()
    prepare(tmp_path)
    with pytest.raises(UserError, match=message):
        captions.read_captions(tmp_path, "train")


def test_a_folder_without_a_split_is_told_from_a_wrong_one(root, tmp_path):
    (tmp_path / "annotations").mkdir()
    for read in (captions.read_captions, captions.read_regions):
        with pytest.raises(captions.NoSplit):
            read(tmp_path, "val")
        with pytest.raises(UserError) as wrong:
            read(root, "has no")
        assert wrong.type is UserError


def test_captions_that_are_not_utf8_are_unreadable(tmp_path):
    _shard(tmp_path / "a.tar", {"a": {"png": _png("red"), "txt": b"caf\xe9"}})
    with pytest.raises(Unreadable, match=r"a\.tar@\d+ is not in UTF-8"):
        captions.CaptionShards([tmp_path / "a.tar"])[0]


@pytest.mark.parametrize("name", ["../../outside.png", "/etc/passwd"])
def test_annotations_name_pictures_of_their_own_folder(root, tmp_path, name):
    for kind, read in (("captions", captions.read_captions), ("instances", captions.read_regions)):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = json.loads((root / "annotations" / f"{kind}_train.json").read_text())
        content["images"][2]["file_name"] = name
        (tmp_path / "annotations" / f"{kind}_train.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{kind}_train.json: image \d+: .* lies outside"):
            read(tmp_path, "train")
        content["images"][2]["file_name"] = str(tmp_path / "train" / "000002.png")  # whole, but of the folder
        (tmp_path / "annotations" / f"{kind}_train.json").write_text(json.dumps(content))
        assert read(tmp_path, "train")


def test_missing_caption_folder_and_split(tmp_path, root):
    with pytest.raises(UserError, match="no data folder"):
        captions.read_captions(tmp_path / "none", "train")
    with pytest.raises(UserError, match="no split 'dev'"):
        captions.read_captions(root, "dev")


def _shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_caption_shards(tmp_path, monkeypatch):
    _shard(tmp_path / "train-0.tar", {"a": {"png": _png("red"), "txt": b"a red square\n", "json": b"{}"}})
    _shard(tmp_path / "train-1.tar", {"b": {"png": _png("blue"), "txt": b"blau\n\n  zwei "},
                                      "c": {"png": _png("lime"), "txt": b" \n"}})
    shards = sorted(tmp_path.glob("*.tar"))
    monkeypatch.setattr("common.data.index.SETTLED_NS", 0)
    data = captions.CaptionShards(shards)
    assert len(data) == 3 and data[0][1] == ("a red square",) and data[1][1] == ("blau", "zwei")
    assert data[1][0].getpixel((0, 0)) == (0, 0, 255) and "train-1.tar@" in data.name(1)
    with pytest.raises(Unreadable, match=r"train-1\.tar@\d+ has an empty caption"):
        data[2]
    monkeypatch.setattr("tarfile.open", None)  # a second index would fail
    assert len(captions.CaptionShards(shards)) == 3


def test_keys_of_shards_end_at_the_first_dot_of_a_files_name(tmp_path):
    _shard(tmp_path / "a.tar", {
        "./a": {"png": _png("red"), "txt": b"red"}, "v1.0/a": {"png": _png("lime"), "txt": b"green"},
    })
    data = captions.CaptionShards([tmp_path / "a.tar"])
    assert [data.captions(i) for i in range(len(data))] == [("red",), ("green",)]


def test_wrong_caption_shards(tmp_path):
    _shard(tmp_path / "a.tar", {"a": {"png": _png("red")}})
    with pytest.raises(UserError, match=r"1 samples lack image or \.txt, such as a"):
        captions.CaptionShards([tmp_path / "a.tar"])
    _shard(tmp_path / "b.tar", {})
    with pytest.raises(UserError, match=r"no samples KEY\.jpg with KEY\.txt"):
        captions.CaptionShards([tmp_path / "b.tar"])
    (tmp_path / "c.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="no readable webdataset shard"):
        captions.CaptionShards([tmp_path / "c.tar"])


# Conversations ---------------------------------------------------------------------------------------------


def _entry(*turns, **fields):
    who = ("human", "gpt")
    return {"id": 3, "conversations": [{"from": who[i % 2], "value": t} for i, t in enumerate(turns)], **fields}


def _read(tmp_path, entries, **options):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(entries))
    return conversations.read_conversations(path, **options)


def test_images_stand_before_their_turn(tmp_path):
    entries = [
        _entry("What is it?\n<image>", "red", "Sure?", "yes", image="a/b.png"), _entry("Hello", "Hi"),
        _entry("<image><image>\nSame?", "no", image=["a.png", "b.png"]),
    ]
    one, text, two = _read(tmp_path, entries)
    assert one.images == (tmp_path / "a/b.png",) and text.images == () and len(two.images) == 2
    assert one.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert [m["role"] for m in one.messages] == ["user", "assistant"] * 2 and one.answer == "yes"
    assert two.messages[0]["content"][:2] == [{"type": "image"}] * 2
    (moved,) = _read(tmp_path, entries[:1], images=tmp_path / "elsewhere")
    assert moved.images == (tmp_path / "elsewhere/a/b.png",)


BAD = [
    (_entry("hm?", "yes", image=["a.png", "b.png"]), "2 images, but 0 marks"), (_entry("", "yes"), "an empty question"),
    (_entry("hm?"), "expected questions and answers in pairs"), (_entry(), "expected questions and answers in pairs"),
    ({"id": 1}, "malformed, KeyError"), ("text", "malformed"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "0 turns"),
    ({"conversations": [{"from": "system", "value": "x"}]}, "from 'system', not 'human'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "malformed"),
    (_entry("hm?", ""), "id 3: an empty answer"), (_entry("hm?", "yes", "and?"), "3 turns"),
    (_entry("<image> hm?", "yes", image="../a.png"), r"\.\./a\.png lies outside"),
    (_entry("<image> hm?", "yes", image="a/../../a.png"), "lies outside"),
    (_entry("<image> hm?", "yes", image="/dev/stdin"), "/dev/stdin lies outside"),
    (_entry("<image><image> hm?", "yes", image=["a.png", "b.png"]), "id 3: 2 images; expected 1 at most"),
    ({"id": "\x1b]0;x", "conversations": []}, r"id \\x1b\]0;x: 0 turns"),
]


def test_odd_conversations_are_taken_as_llavas_code_takes_them(tmp_path):
    first = {"from": "gpt", "value": "Show me something."}
    led = _entry("<image>\nWhat is it?", "a van", image="a.png")
    led["conversations"].insert(0, first)
    rows = _read(tmp_path, [
        led, _entry("Is a mark needed?", "no", image="a.png"), _entry("Where does <image> go?", "In front: <image>"),
        _entry("Which, <image> or <image> ", " The left.\n", image="a.png"),
        _entry("<image>\nIt?", "a pump", " <image> this? ", " a <image> valve ", image="a.png"),
        _entry("<image>", "  ", " And? ", "", " So? ", "yes", image="a.png"),
    ], strict=True, most_images=1)

    def said(row):
        return [part.get("text", "<>") for message in row.messages for part in message["content"]]

    assert [len(row.images) for row in rows] == [1, 0, 0, 1, 1, 1]
    assert said(rows[0]) == ["<>", "What is it?", "a van"]
    assert said(rows[1]) == ["Is a mark needed?", "no"]
    assert said(rows[2]) == ["Where does <image> go?", "In front: <image>"]
    assert said(rows[3]) == ["<>", "Which,  or", " The left.\n"]
    assert said(rows[4]) == ["<>", "It?", "a pump", "<>", "this?", " a  valve "]
    assert said(rows[5]) == ["<>", "", "  ", " And? ", "", " So? ", "yes"]


def test_captions_as_conversations(tmp_path):
    (row,) = _read(tmp_path, [_entry("Sum it up.\n<image>", " a van ", image="a.png")], captions=True, strict=True)
    assert row.messages[1]["content"][0]["text"] == " a van "
    assert _read(tmp_path, [_entry("<image>", "", image="a.png")], captions=True, strict=True)
    for bad in (_entry("hm?", "x", image="a.png"), _entry("<image>", "x", "<image>", "y", image="a.png")):
        with pytest.raises(UserError, match="expected one question with the mark <image>"):
            _read(tmp_path, [bad], captions=True, strict=True)


@pytest.mark.parametrize("entry, message", BAD)
def test_malformed_conversations(tmp_path, entry, message):
    good = _entry("Hello", "Hi")
    with pytest.raises(UserError, match=message):
        _read(tmp_path, [good, entry], strict=True, most_images=1)
    report = tmp_path / "bad.txt"
    for _ in range(2):
        rows = _read(tmp_path, [good, entry], report=report, most_images=1)
        assert len(rows) == 1, "one may be left out in training"
        (line,) = report.read_text().splitlines()
        assert line.startswith("entry 1: ")
    with pytest.raises(UserError, match=r"2 of 3 conversations cannot be read, the first entry 1"):
        _read(tmp_path, [good, entry, entry], most_images=1)


@pytest.mark.parametrize("content, message", [
    ("{", "no whole JSON file"), ("[" * 99999, "no whole JSON file"), ("{}", "found dict"),
    ("[]", "found an empty one"),
])
def test_wrong_conversation_files(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        conversations.read_conversations(tmp_path / "x.json")
    with pytest.raises(UserError, match="no conversation file"):
        conversations.read_conversations(tmp_path / "none.json")
