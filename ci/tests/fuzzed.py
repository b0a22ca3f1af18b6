"""The readers of what people are given: a small folder for each, and the call that reads it."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import run
from common.data import captions, conversations, images, tracking, video
from common.data.picture import read_picture
from common.metrics.trackers import files as answers
from common.run import readme
from papers.maskco import data as maskco
from papers.shiftvit.recipes import RECIPES, Recipe
from tools import report, tables


@dataclass(frozen=True)
class Reader:
    write: Callable[[Path], list[Path]]
    """Fills a folder; returns its files that are damaged, one at a time."""
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = ()
    """That its docstring names, besides `UserError` and `Unreadable`."""
    quick: bool = True


READERS: dict[str, Reader] = {}


def _add(name: str, read: Callable[[Path], object], *errors: type[Exception], quick: bool = True) -> Callable:
    def add(write: Callable[[Path], list[Path]]) -> Callable[[Path], list[Path]]:
        READERS[name] = Reader(write, read, errors, quick)
        return write

    return add


def _write(root: Path, **texts: str | bytes) -> list[Path]:
    return [_file(root / name, text) for name, text in texts.items()]


def _file(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _json(path: Path, value: object) -> Path:
    return _file(path, json.dumps(value))


def _picture(kind: str = "PNG") -> bytes:
    pixels = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    Image.fromarray(pixels).save(stream := io.BytesIO(), kind)
    return stream.getvalue()


# Tracking -------------------------------------------------------------------------------------------------

BOXES = "1,2,30,40\n2,3,30,40\n3.5,4,30,40\n"


def _frames(folder: Path, pattern: str = "{:08d}.jpg", first: int = 1) -> None:
    for i in range(3):
        _file(folder / pattern.format(first + i))


@_add("got10k", tracking.open_sequences)
def _got10k(root: Path) -> list[Path]:
    folder = root / "GOT-10k_Train_000001"
    _frames(folder)
    return [
        _file(root / "list.txt", f"{folder.name}\n"), _file(folder / "groundtruth.txt", BOXES),
        _file(folder / "absence.label", "0\n0\n1\n"), _file(folder / "cover.label", "8\n7\n0\n"),
        _file(folder / "meta_info.ini", "[METAINFO]\nresolution: (240, 180)\n"),
    ]


@_add("lasot", lambda root: [tracking.open_sequences(root, split) for split in ("train", "test")])
def _lasot(root: Path) -> list[Path]:
    found = [_file(root / "testing_set.txt", "airplane-2\n")]
    for number in (1, 2):
        folder = root / "airplane" / f"airplane-{number}"
        _frames(folder / "img")
        found += [_file(folder / "groundtruth.txt", BOXES), _file(folder / "full_occlusion.txt", "0,0,1"),
                  _file(folder / "out_of_view.txt", "0,0,1")]
    return found


@_add("trackingnet", tracking.open_sequences)
def _trackingnet(root: Path) -> list[Path]:
    _frames(root / "TRAIN_0" / "frames" / "a", "{}.jpg", 0)
    return [_file(root / "TRAIN_0" / "anno" / "a.txt", BOXES)]


@_add("otb", tracking.open_sequences)
def _otb(root: Path) -> list[Path]:
    _frames(root / "Basketball" / "img", "{:04d}.jpg")
    return [_file(root / "Basketball" / "groundtruth_rect.txt", BOXES.replace(",", "\t"))]


@_add("vot", tracking.open_sequences)
def _vot(root: Path) -> list[Path]:
    _frames(root / "bag")
    regions = "1,2,30,40\n1,2,30,2,30.5,40,1,40\nm3,4,5,6,2,3,7,3\n"
    return [_file(root / "list.txt", "bag\n"), _file(root / "bag" / "groundtruth.txt", regions)]


@_add("tracking without a limit", lambda root: tracking.open_sequences(root, limit=0.5, report=root / "report.txt"))
def _tolerant(root: Path) -> list[Path]:
    found = _got10k(root)
    for number in (2, 3):
        folder = root / f"GOT-10k_Train_00000{number}"
        _frames(folder)
        for file in found[1:]:
            _file(folder / file.name, file.read_bytes())
    _file(root / "list.txt", "".join(f"GOT-10k_Train_00000{number}\n" for number in (1, 2, 3)))
    return found


@_add("answers of a tracker", lambda root: answers.read_result(root / "a.csv"), ValueError)
def _answers(root: Path) -> list[Path]:
    numbers = np.arange(3.0)
    result = answers.Result(np.ones((3, 4)), numbers, numbers, numbers, (240, 180), {"speed": "eager"}, "a machine")
    answers.write_result(root / "a.csv", result)
    return [root / "a.csv"]


# COCO, captions, conversations ----------------------------------------------------------------------------


def _coco(root: Path, kind: str = "instances") -> list[Path]:
    found = []
    for split in ("train2017", "val2017"):
        pictures = [{"id": i, "file_name": f"{i}.png", "width": 160, "height": 120} for i in range(3)]
        for picture in pictures:
            _file(root / split / picture["file_name"], _picture())
        marks = [{"id": i, "image_id": i % 3, "category_id": i % 2 + 5, "bbox": [1, 2.5, 60, 70], "iscrowd": 0,
                  "caption": f"a cat {i}", "phrase": f"cat {i}"} for i in range(5)]
        names = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
        content = {"images": pictures, "annotations": marks, "categories": names}
        found.append(_json(root / "annotations" / f"{kind}_{split}.json", content))
    return found


_add("coco objects", lambda root: tracking.open_coco(root, "train"))(_coco)
_add("coco categories", maskco.open_labelled)(_coco)
_add("regions", lambda root: captions.read_regions(root, "train"))(_coco)


@_add("captions", lambda root: [captions.read_captions(root, split) for split in ("train", "val")])
def _captions(root: Path) -> list[Path]:
    return _coco(root, "captions")


@_add("a table of splits", lambda root: captions.read_captions(root, "train"))
def _split_table(root: Path) -> list[Path]:
    found = _coco(root, "captions")
    rows = [f"{split}2017,{i}.png,{split}\n" for split in ("train", "val") for i in range(3)]
    return [_file(root / "annotations" / "caption_split.csv", "folder,file,split\n" + "".join(rows)), found[0]]


def _read_conversations(root: Path) -> None:
    conversations.read_conversations(root / "talk.json", strict=True)


def _conversations(root: Path) -> list[Path]:
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
    return [_json(root / "talk.json", [
        {"id": str(i), "image": ["0.png", f"{i}.png"][i % 2 :], "conversations": talk, "category": "kind"}
        if i % 2 else {"id": i, "image": f"{i}.png", "conversations": talk * 2} for i in (1, 3, 5)
    ])]


_add("conversations, strict", _read_conversations)(_conversations)
_add("conversations", lambda root: conversations.read_conversations(root / "talk.json", report=root / "bad.txt"))(
    _conversations
)


# Videos ---------------------------------------------------------------------------------------------------


def _videos(root: Path) -> None:
    for split in ("train", "val"):
        video.open_videos(root, split)


def _clips(root: Path, *names: str) -> None:
    for name in names:
        _file(root / name)


@_add("ucf101", _videos)
def _ucf101(root: Path) -> list[Path]:
    names = ("Archery/v_1.avi", "Biking/v_2.avi", "Biking/v_3.avi")
    _clips(root / "UCF-101", *names)
    train = "".join(f"{name} {number}\n" for name, number in zip(names, (1, 2, 2)))
    lists = root / "ucfTrainTestlist"
    return [_file(lists / "classInd.txt", "1 Archery\n2 Biking\n"), _file(lists / "trainlist01.txt", train),
            _file(lists / "testlist01.txt", "\n".join(names))]


@_add("hmdb51", _videos)
def _hmdb51(root: Path) -> list[Path]:
    _clips(root, "run/1.avi", "run/2.avi", "walk/3.avi", "walk/4.avi")
    lists = root / "testTrainMulti_7030_splits"
    return [_file(lists / "run_test_split1.txt", "1.avi 1\n2.avi 2\n"),
            _file(lists / "walk_test_split1.txt", "3.avi 1\n4.avi 2\n5.avi 0\n")]


@_add("something-something", _videos)
def _ssv1(root: Path) -> list[Path]:
    for number in (1, 2):
        _file(root / "20bn-something-something-v1" / str(number) / "00001.jpg")
    stem = "something-something-v1"
    return [_file(root / f"{stem}-labels.csv", "Doing something\nNot; doing\n"),
            _file(root / f"{stem}-train.csv", "1;Doing something\n2;Not; doing\n"),
            _file(root / f"{stem}-validation.csv", "2;Not; doing\n")]


@_add("kinetics", _videos)
def _kinetics(root: Path) -> list[Path]:
    found = []
    for split in ("train", "val"):
        rows = ["label,youtube_id,time_start,time_end", '"eating, cake",a,0,10', "running,b,3,13"]
        _clips(root / split, "eating, cake/a_000000_000010.mp4", "b_000003_000013.mp4")
        found.append(_file(root / "annotations" / f"{split}.csv", "\n".join(rows)))
    return found


@_add("a list of videos", _videos)
def _list(root: Path) -> list[Path]:
    _clips(root, "a.mp4", "b c.mp4")
    return [_file(root / "train.txt", "a.mp4 0\nb c.mp4 12 1\n"), _file(root / "val.txt", "b c.mp4 1\n"),
            _file(root / "classes.txt", "cat\ndog\n")]


@_add("a list of numbered videos", _videos)
def _numbered(root: Path) -> list[Path]:
    _clips(root, "a.mp4", "b.mp4")
    return [_file(root / "train.txt", "a.mp4 0\nb.mp4 1\n"), _file(root / "val.txt", "b.mp4 1\n")]


@_add("a list of videos in JSON", _videos)
def _json_list(root: Path) -> list[Path]:
    _clips(root, "a.mp4", "b.mp4")
    rows = [{"name": "a", "label": 3}, {"name": "b", "label": "5"}]
    return [_json(root / "annotations" / "train.json", rows), _json(root / "annotations" / "val.json", rows),
            _file(root / "annotations" / "classInd.txt", "3 cat\n5 dog\n")]


def _read_clip(root: Path) -> None:
    with video.open_video(root / "a.mp4") as clip:
        clip.read([0, len(clip) - 1])


@_add("a video", _read_clip)
def _video(root: Path) -> list[Path]:
    video.write_video(root / "a.mp4", [np.full((16, 24, 3), 20 * i, np.uint8) for i in range(6)], fps=25)
    return [root / "a.mp4"]


# Pictures -------------------------------------------------------------------------------------------------


def _read_pictures(root: Path) -> None:
    for path in sorted(root.iterdir()):
        read_picture(path)


@_add("pictures", _read_pictures)
def _pictures(root: Path) -> list[Path]:
    return [_file(root / f"a.{kind.lower()}", _picture(kind)) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM")]


@_add("cifar", lambda root: images.open_images(root, "train"))
def _cifar(root: Path) -> list[Path]:
    pixels = np.zeros((4, 3072), np.uint8)
    for protocol, name in enumerate(("data_batch_1", "data_batch_2"), 1):
        _file(root / name, pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]}, protocol=protocol))
    meta = _file(root / "batches.meta", pickle.dumps({"label_names": ["cat", "dog"]}, protocol=2))
    return [meta, root / "data_batch_1", root / "data_batch_2"]


@_add("shards", lambda root: images.open_images(root, "train"))
def _shards(root: Path) -> list[Path]:
    with tarfile.open(root / "train-000000.tar", "w") as tar:
        for name, content in (("a.png", _picture()), ("a.cls", b"0"), ("b.png", _picture()), ("b.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return [root / "train-000000.tar", _file(root / "classes.txt", "cat\ndog\n")]


# Runs, records and weights --------------------------------------------------------------------------------


def _run_folder(root: Path) -> Path:
    folder = root / "shiftvit" / "smoke" / "20260101-000000"
    config = {"paper": "shiftvit", "recipe_name": "smoke", "recipe": RECIPES["smoke"], "options": run.Options()}
    _file(folder / "config.json", json.dumps(config, default=lambda value: getattr(value, "__dict__", str(value))))
    run.write_json(folder / "environment.json", run.environment() | {"packages": {"torch": "2.11.0"}})
    _file(folder / "log.jsonl", '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25, "val/top1": 50.0}\n')
    record = {
        "paper": "shiftvit", "recipe": "smoke", "data": "digits", "params": 7, "flops": 1e6, "wall_s": 1.5,
        "throughput": 20.0, "peak_mem_bytes": 2**20, "seed": 0, "metrics": [
            run.metric("top1", 50.0, "%", paper_value=79.3, paper_source="table 1") | {"spread": 0.5, "seeds": [0, 1]},
            run.metric("loss", 2.25, "nats"),
        ],
    }
    run.write_results(folder, record)
    _file(folder / "curve.png", _picture())
    return folder


def _page(root: Path) -> None:
    report.page(report.find_runs(root, root / "papers"), root)


@_add("report page", _page)
def _reported(root: Path) -> list[Path]:
    folder = _run_folder(root)
    return [folder / name for name in ("results.json", "config.json", "environment.json", "log.jsonl", "curve.png")]


@_add("table of records", lambda root: tables.table(tables.read_records(root / "shiftvit")))
def _records(root: Path) -> list[Path]:
    record = run.read_json(_run_folder(root / "runs") / "results.json")
    for metric in record["metrics"]:
        metric.pop("seeds", None)
    return [_json(root / "shiftvit" / "results" / f"{seed}.json", record | {"seed": seed}) for seed in (0, 1)]


@_add("log", lambda root: run.read_log(next(root.glob("*/*/*"))))
def _log(root: Path) -> list[Path]:
    return [_run_folder(root) / "log.jsonl"]


def _checkpointed(root: Path) -> Path:
    folder = _run_folder(root)
    layer = torch.nn.Linear(2, 3)
    state = {"optimizer": torch.optim.AdamW(layer.parameters()).state_dict(), "wall_s": 1.5, "classes": ["cat", "dog"]}
    run.save_checkpoint(folder, 2, {"model": layer.state_dict()}, state)
    return folder


@_add("checkpoint", lambda root: run.load_checkpoint(next(root.glob("*/*/*"))))
def _checkpoint(root: Path) -> list[Path]:
    return sorted(_checkpointed(root).glob("checkpoints/*/*"))


@_add("recipe of a run", lambda root: run.load_run(next(root.glob("*/*/*")), Recipe))
def _run(root: Path) -> list[Path]:
    return [_checkpointed(root) / "config.json"]


def _weights(root: Path) -> None:
    for path in sorted(root.iterdir()):
        run.load_weights(path)


@_add("weights", _weights)
def _weight_files(root: Path) -> list[Path]:
    weights = {"module.a": torch.arange(6.0).reshape(2, 3), "module.b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save({"model": weights, "epoch": 3}, root / "a.pth")
    torch.save({"state_dict": weights, "args": [1, "x"]}, root / "old.pth", _use_new_zipfile_serialization=False)
    run.save_weights(root / "a.safetensors", weights)
    return sorted(root.iterdir())


def _fill_twice(root: Path) -> None:
    text = (root / "README.md").read_bytes().decode(errors="surrogateescape")
    once = readme.filled(text, "results", "| a |\n")
    if once is not None and readme.filled(once, "results", "| a |\n") != once:
        raise AssertionError("a README grows")


@_add("markers", _fill_twice)
def _readme(root: Path) -> list[Path]:
    start, end = readme.markers("results")
    return [_file(root / "README.md", f"# A\n\n{start}\n| b |\n{end}\n\n{start}\nrest\n")]


def _search(root: Path) -> None:
    from papers.mm_gem.search import Index

    Index.load(root).nearest(torch.ones(8), 3)


@_add("faiss", _search)
def _index(root: Path) -> list[Path]:
    import pytest

    pytest.importorskip("faiss", reason="needs faiss-cpu")
    from papers.mm_gem.search import Index

    Index.of(torch.nn.functional.normalize(torch.arange(40.0).reshape(5, 8).sin()), list("abcde"), "HNSW8").save(root)
    return [root / "vectors.faiss", root / "names.json"]
