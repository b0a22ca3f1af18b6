"""Readers of data sets."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from ci.tests.fuzzed import add, file, json_file, picture
from common.data import captions, conversations, images, tracking, video
from common.data.picture import read_picture
from common.metrics.trackers import files as answers
from papers.maskco import data as maskco

# Tracking -------------------------------------------------------------------------------------------------

BOXES = "1,2,30,40\n2,3,30,40\n3.5,4,30,40\n"


def _frames(folder: Path, pattern: str = "{:08d}.jpg", first: int = 1) -> None:
    for i in range(3):
        file(folder / pattern.format(first + i))


@add("got10k", tracking.open_sequences)
def _got10k(root: Path) -> list[Path]:
    folder = root / "GOT-10k_Train_000001"
    _frames(folder)
    return [
        file(root / "list.txt", f"{folder.name}\n"), file(folder / "groundtruth.txt", BOXES),
        file(folder / "absence.label", "0\n0\n1\n"), file(folder / "cover.label", "8\n7\n0\n"),
        file(folder / "meta_info.ini", "[METAINFO]\nresolution: (240, 180)\n"),
    ]


@add("lasot", lambda root: [tracking.open_sequences(root, split) for split in ("train", "test")])
def _lasot(root: Path) -> list[Path]:
    found = [file(root / "testing_set.txt", "airplane-2\n")]
    for number in (1, 2):
        folder = root / "airplane" / f"airplane-{number}"
        _frames(folder / "img")
        found += [file(folder / "groundtruth.txt", BOXES), file(folder / "full_occlusion.txt", "0,0,1"),
                  file(folder / "out_of_view.txt", "0,0,1")]
    return found


@add("trackingnet", tracking.open_sequences)
def _trackingnet(root: Path) -> list[Path]:
    _frames(root / "TRAIN_0" / "frames" / "a", "{}.jpg", 0)
    return [file(root / "TRAIN_0" / "anno" / "a.txt", BOXES)]


@add("otb", tracking.open_sequences)
def _otb(root: Path) -> list[Path]:
    _frames(root / "Basketball" / "img", "{:04d}.jpg")
    return [file(root / "Basketball" / "groundtruth_rect.txt", BOXES.replace(",", "\t"))]


@add("vot", tracking.open_sequences)
def _vot(root: Path) -> list[Path]:
    _frames(root / "bag")
    regions = "1,2,30,40\n1,2,30,2,30.5,40,1,40\nm3,4,5,6,2,3,7,3\n"
    return [file(root / "list.txt", "bag\n"), file(root / "bag" / "groundtruth.txt", regions)]


@add("tracking without a limit", lambda root: tracking.open_sequences(root, limit=0.5, report=root / "report.txt"))
def _tolerant(root: Path) -> list[Path]:
    found = _got10k(root)
    for number in (2, 3):
        folder = root / f"GOT-10k_Train_00000{number}"
        _frames(folder)
        for path in found[1:]:
            file(folder / path.name, path.read_bytes())
    file(root / "list.txt", "".join(f"GOT-10k_Train_00000{number}\n" for number in (1, 2, 3)))
    return found


@add("answers of a tracker", lambda root: answers.read_result(root / "a.csv"), ValueError)
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
        for entry in pictures:
            file(root / split / entry["file_name"], picture())
        marks = [{"id": i, "image_id": i % 3, "category_id": i % 2 + 5, "bbox": [1, 2.5, 60, 70], "iscrowd": 0,
                  "caption": f"a cat {i}", "phrase": f"cat {i}"} for i in range(5)]
        names = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
        content = {"images": pictures, "annotations": marks, "categories": names}
        found.append(json_file(root / "annotations" / f"{kind}_{split}.json", content))
    return found


add("coco objects", lambda root: tracking.open_coco(root, "train"))(_coco)
add("coco categories", maskco.open_labelled)(_coco)
add("regions", lambda root: captions.read_regions(root, "train"))(_coco)


@add("captions", lambda root: [captions.read_captions(root, split) for split in ("train", "val")])
def _captions(root: Path) -> list[Path]:
    return _coco(root, "captions")


@add("a table of splits", lambda root: captions.read_captions(root, "train"))
def _split_table(root: Path) -> list[Path]:
    found = _coco(root, "captions")
    rows = [f"{split}2017,{i}.png,{split}\n" for split in ("train", "val") for i in range(3)]
    return [file(root / "annotations" / "caption_split.csv", "folder,file,split\n" + "".join(rows)), found[0]]


def _read_conversations(root: Path) -> None:
    conversations.read_conversations(root / "talk.json", strict=True)


def _conversations(root: Path) -> list[Path]:
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
    return [json_file(root / "talk.json", [
        {"id": str(i), "image": ["0.png", f"{i}.png"][i % 2 :], "conversations": talk, "category": "kind"}
        if i % 2 else {"id": i, "image": f"{i}.png", "conversations": talk * 2} for i in (1, 3, 5)
    ])]


add("conversations, strict", _read_conversations)(_conversations)
add("conversations", lambda root: conversations.read_conversations(root / "talk.json", report=root / "bad.txt"))(
    _conversations
)


# Videos ---------------------------------------------------------------------------------------------------


def _videos(root: Path) -> None:
    for split in ("train", "val"):
        video.open_videos(root, split)


def _clips(root: Path, *names: str) -> None:
    for name in names:
        file(root / name)


@add("ucf101", _videos)
def _ucf101(root: Path) -> list[Path]:
    names = ("Archery/v_1.avi", "Biking/v_2.avi", "Biking/v_3.avi")
    _clips(root / "UCF-101", *names)
    train = "".join(f"{name} {number}\n" for name, number in zip(names, (1, 2, 2)))
    lists = root / "ucfTrainTestlist"
    return [file(lists / "classInd.txt", "1 Archery\n2 Biking\n"), file(lists / "trainlist01.txt", train),
            file(lists / "testlist01.txt", "\n".join(names))]


@add("hmdb51", _videos)
def _hmdb51(root: Path) -> list[Path]:
    _clips(root, "run/1.avi", "run/2.avi", "walk/3.avi", "walk/4.avi")
    lists = root / "testTrainMulti_7030_splits"
    return [file(lists / "run_test_split1.txt", "1.avi 1\n2.avi 2\n"),
            file(lists / "walk_test_split1.txt", "3.avi 1\n4.avi 2\n5.avi 0\n")]


@add("something-something", _videos)
def _ssv1(root: Path) -> list[Path]:
    for number in (1, 2):
        file(root / "20bn-something-something-v1" / str(number) / "00001.jpg")
    stem = "something-something-v1"
    return [file(root / f"{stem}-labels.csv", "Doing something\nNot; doing\n"),
            file(root / f"{stem}-train.csv", "1;Doing something\n2;Not; doing\n"),
            file(root / f"{stem}-validation.csv", "2;Not; doing\n")]


@add("kinetics", _videos)
def _kinetics(root: Path) -> list[Path]:
    found = []
    for split in ("train", "val"):
        rows = ["label,youtube_id,time_start,time_end", '"eating, cake",a,0,10', "running,b,3,13"]
        _clips(root / split, "eating, cake/a_000000_000010.mp4", "b_000003_000013.mp4")
        found.append(file(root / "annotations" / f"{split}.csv", "\n".join(rows)))
    return found


@add("a list of videos", _videos)
def _list(root: Path) -> list[Path]:
    _clips(root, "a.mp4", "b c.mp4")
    return [file(root / "train.txt", "a.mp4 0\nb c.mp4 12 1\n"), file(root / "val.txt", "b c.mp4 1\n"),
            file(root / "classes.txt", "cat\ndog\n")]


@add("a list of numbered videos", _videos)
def _numbered(root: Path) -> list[Path]:
    _clips(root, "a.mp4", "b.mp4")
    return [file(root / "train.txt", "a.mp4 0\nb.mp4 1\n"), file(root / "val.txt", "b.mp4 1\n")]


@add("a list of videos in JSON", _videos)
def _json_list(root: Path) -> list[Path]:
    _clips(root, "a.mp4", "b.mp4")
    rows = [{"name": "a", "label": 3}, {"name": "b", "label": "5"}]
    return [json_file(root / "annotations" / "train.json", rows), json_file(root / "annotations" / "val.json", rows),
            file(root / "annotations" / "classInd.txt", "3 cat\n5 dog\n")]


def _read_clip(root: Path) -> None:
    with video.open_video(root / "a.mp4") as clip:
        clip.read([0, len(clip) - 1])


@add("a video", _read_clip)
def _video(root: Path) -> list[Path]:
    video.write_video(root / "a.mp4", [np.full((16, 24, 3), 20 * i, np.uint8) for i in range(6)], fps=25)
    return [root / "a.mp4"]


# Pictures -------------------------------------------------------------------------------------------------


def _read_pictures(root: Path) -> None:
    for path in sorted(root.iterdir()):
        read_picture(path)


@add("pictures", _read_pictures)
def _pictures(root: Path) -> list[Path]:
    return [file(root / f"a.{kind.lower()}", picture(kind)) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM")]


@add("cifar", lambda root: images.open_images(root, "train"))
def _cifar(root: Path) -> list[Path]:
    pixels = np.zeros((4, 3072), np.uint8)
    for protocol, name in enumerate(("data_batch_1", "data_batch_2"), 1):
        file(root / name, pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]}, protocol=protocol))
    meta = file(root / "batches.meta", pickle.dumps({"label_names": ["cat", "dog"]}, protocol=2))
    return [meta, root / "data_batch_1", root / "data_batch_2"]


def _shard(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@add("shards", lambda root: images.open_images(root, "train"))
def _shards(root: Path) -> list[Path]:
    shard = _shard(root / "train-000000.tar", a_png=picture(), a_cls=b"0", b_png=picture(), b_cls=b"1")
    return [shard, file(root / "classes.txt", "cat\ndog\n")]


def _read_shards(root: Path) -> None:
    shards = captions.CaptionShards(sorted(root.iterdir()))
    for i in range(len(shards)):
        shards[i]


@add("shards with captions", _read_shards)
def _caption_shards(root: Path) -> list[Path]:
    return [_shard(root / "0.tar", a_png=picture(), a_txt=b"a cat\n", b_png=picture(), b_txt=b"a dog\ntwo\n")]
