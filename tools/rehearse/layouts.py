"""Data sets as people have them on disk, made of a few real pictures and two videos by links: a million names, and no
more bytes than those of the few.

``lay_out(dataset, root)`` gives a recipe's `dataset` its real counts; with `part` 0 a few of everything, all classes
among them, for when only a step is to be tried.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from common.data.video import write_video
from common.run import UserError

LINKS = 60_000  # of a file; ext4 takes 65,000
FRAMES = 300  # of a video: ten seconds, as Kinetics has them


class Sources:
    """The files that everything links to, made when asked for, in a folder beside the data."""

    def __init__(self, home: Path):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)

    def pictures(self, count: int) -> Iterator[Path]:
        """Endless JPEGs of 500 x 375 px, ImageNet's mean: parts of scikit-learn's two photographs."""
        files = [self._picture(i) for i in range(max(24, count // LINKS + 1))]
        return itertools.cycle(files)

    def _picture(self, number: int) -> Path:
        path = self.home / f"{number}.jpg"
        if not path.exists():
            _part(number).save(path, quality=90)
        return path

    def video(self, suffix: str, size: tuple[int, int]) -> Path:
        path = self.home / f"{size[0]}{suffix}"
        if not path.exists():
            frames = (np.array(_part(i % 48).resize(size)) for i in range(FRAMES))
            write_video(path, frames, fps=30, crf="23", preset="fast")
        return path

    def frames(self, count: int, name: str, pattern: str, first: int) -> Path:
        """A folder of frames, links themselves, for links to it."""
        folder = self.home / name
        if not folder.exists():
            folder.mkdir()
            for number, picture in zip(range(first, first + count), self.pictures(count)):
                os.link(picture, folder / pattern.format(number))
        return folder


@functools.cache
def _photos() -> list[Image.Image]:
    return [Image.fromarray(array) for array in load_sample_images().images]


def _part(number: int) -> Image.Image:
    x, y = number // 2 * 5 % 140, number // 2 * 3 % 52
    return _photos()[number % 2].crop((x, y, x + 500, y + 375))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, text: str) -> None:
    _folder(path.parent)
    path.write_text(text, encoding="utf-8")


def _imagenet(root: Path, part: float, sources: Sources) -> None:
    classes = [f"n{number:08d}" for number in range(1000)]
    for split, whole in (("train", 1_281_167), ("val", 50_000)):
        count = max(len(classes), int(whole * part))
        pictures = sources.pictures(count)
        for number, name in enumerate(classes):
            folder = _folder(root / split / name)
            for i in range(number, count, len(classes)):
                os.link(next(pictures), folder / f"{name}_{i}.JPEG")


def _captioned_pictures(root: Path, part: float, sources: Sources) -> None:
    """Conceptual Captions as it is downloaded: pictures in folders of ten thousand."""
    for split, whole in (("train", 3_318_333), ("val", 15_840)):
        count = max(600, int(whole * part))
        pictures = sources.pictures(count)
        for first in range(0, count, 10_000):
            folder = _folder(root / split / f"{first // 10_000:05d}")
            for i in range(first, min(count, first + 10_000)):
                os.link(next(pictures), folder / f"{i:09d}.jpg")


def _coco(root: Path, part: float, sources: Sources) -> None:
    for split, images, boxes in (("train", 118_287, 860_001), ("val", 5_000, 36_781)):
        images, boxes = max(600, int(images * part)), max(1200, int(boxes * part))
        folder, pictures = _folder(root / f"{split}2017"), sources.pictures(images)
        for i in range(images):
            os.link(next(pictures), folder / f"{i:012d}.jpg")
        content = {
            "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 500, "height": 375} for i in range(images)],
            "categories": [{"id": i + 1, "name": f"thing {i + 1}"} for i in range(80)],
            "annotations": [
                {"id": i, "image_id": i % images, "category_id": i % 80 + 1, "iscrowd": 0,
                 "bbox": [20 + i % 150, 20 + i % 100, 60 + i % 200, 60 + i % 150]}
                for i in range(boxes)
            ],
        }
        _write(root / "annotations" / f"instances_{split}2017.json", json.dumps(content))


# Tracking -------------------------------------------------------------------------------------------------


def _boxes(frames: int) -> str:
    return "".join(f"{40 + i % 200},{30 + i % 120},{90 + i % 30},{80 + i % 20}\n" for i in range(frames))


def _got10k(root: Path, part: float, sources: Sources) -> None:
    frames = 149  # the mean
    for split, word, whole in (("train", "Train", 9_335), ("val", "Val", 180), ("test", "Test", 180)):
        names = [f"GOT-10k_{word}_{i:06d}" for i in range(1, max(3, int(whole * part)) + 1)]
        home = sources.frames(frames, f"got10k-{split}", "{:08d}.jpg", 1)
        _write(home / "groundtruth.txt", _boxes(1 if split == "test" else frames))
        _write(home / "meta_info.ini", "[METAINFO]\nresolution: (500, 375)\n")
        for name, flag in (("cover", 8), ("absence", 0)):
            _write(home / f"{name}.label", f"{flag}\n" * frames)
        _write(root / split / "list.txt", "\n".join(names) + "\n")
        for name in names:
            (root / split / name).symlink_to(home)


def _lasot(root: Path, part: float, sources: Sources) -> None:
    frames = 2_512  # the mean
    home = sources.frames(frames, "lasot", "{:08d}.jpg", 1)
    names = [(f"class{i:02d}", f"class{i:02d}-{j}") for i in range(70) for j in range(1, 21)]
    names = names[: max(3, int(len(names) * part))]
    for kind, name in names:
        folder = _folder(root / kind / name)
        (folder / "img").symlink_to(home)
        _write(folder / "groundtruth.txt", _boxes(frames))
        for flag in ("full_occlusion", "out_of_view"):
            _write(folder / f"{flag}.txt", ",".join("0" * frames) + "\n")
    test = [name for _, name in names if int(name.split("-")[1]) % 5 == 1]
    _write(root / "testing_set.txt", "\n".join(test) + "\n")


def _trackingnet(root: Path, part: float, sources: Sources) -> None:
    frames = 471  # the mean
    home = sources.frames(frames, "trackingnet", "{}.jpg", 0)
    for chunk, whole in (*((f"TRAIN_{i}", 2_511) for i in range(12)), ("TEST", 511)):
        for i in range(max(1, int(whole * part))):
            name = f"{chunk}_{i:05d}"
            _folder(root / chunk / "frames")
            (root / chunk / "frames" / name).symlink_to(home)
            _write(root / chunk / "anno" / f"{name}.txt", _boxes(1 if chunk == "TEST" else frames))


def _tracking(*names: str) -> Callable[[Path, float, Sources], None]:
    builders = {"GOT-10k": _got10k, "LaSOT": _lasot, "TrackingNet": _trackingnet, "COCO": _coco}

    def make(root: Path, part: float, sources: Sources) -> None:
        for name in names:
            builders[name](root / name, part, sources)

    return make


# Video ----------------------------------------------------------------------------------------------------


def _ucf101(root: Path, part: float, sources: Sources) -> None:
    classes = [f"Action{i:03d}" for i in range(101)]
    _write(root / "ucfTrainTestlist" / "classInd.txt", "".join(f"{i} {c}\n" for i, c in enumerate(classes, 1)))
    video = sources.video(".avi", (320, 240))
    for name, whole in (("trainlist01", 9_537), ("testlist01", 3_783)):
        lines = []
        for i in range(max(len(classes), int(whole * part))):
            label = i % len(classes)
            path = f"{classes[label]}/v_{classes[label]}_{name[:2]}_{i:05d}.avi"
            _folder((root / "UCF-101" / path).parent)
            os.link(video, root / "UCF-101" / path)
            lines.append(f"{path} {label + 1}\n" if name.startswith("train") else f"{path}\n")
        _write(root / "ucfTrainTestlist" / f"{name}.txt", "".join(lines))


def _hmdb51(root: Path, part: float, sources: Sources) -> None:
    video = sources.video(".avi", (320, 240))
    for number in range(51):
        name, lines = f"action{number:02d}", []
        folder = _folder(root / "hmdb51_org" / name)
        for i in range(100 if part else 2):
            os.link(video, folder / f"{name}_{i}.avi")
            lines.append(f"{name}_{i}.avi {1 if i % 10 < 7 and (part or not i) else 2}\n")
        _write(root / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt", "".join(lines))


def _ssv1(root: Path, part: float, sources: Sources) -> None:
    classes = [f"Doing [something] {i}" for i in range(174)]
    _write(root / "something-something-v1-labels.csv", "".join(f"{name}\n" for name in classes))
    home = sources.frames(45, "ssv1", "{:05d}.jpg", 1)
    videos, number = _folder(root / "20bn-something-something-v1"), 0
    for name, whole in (("train", 86_017), ("validation", 11_522)):
        lines = []
        for i in range(max(len(classes), int(whole * part))):
            number += 1
            (videos / str(number)).symlink_to(home)
            lines.append(f"{number};{classes[i % len(classes)]}\n")
        _write(root / f"something-something-v1-{name}.csv", "".join(lines))


def _kinetics(root: Path, part: float, sources: Sources) -> None:
    classes = [f"doing thing {i}" for i in range(400)]
    for split, whole in (("train", 240_436), ("val", 19_796)):
        lines, count = ["label,youtube_id,time_start,time_end,split\n"], max(len(classes), int(whole * part))
        for i in range(count):
            name, video = classes[i % len(classes)], sources.home / f"{i // LINKS}.mp4"
            if not video.exists():
                video.write_bytes(sources.video(".mp4", (340, 256)).read_bytes())
            folder = root / split / name
            if i < len(classes):
                _folder(folder)
            os.link(video, folder / f"{split[0]}{i:010d}_000010_000020.mp4")
            lines.append(f"{name},{split[0]}{i:010d},10,20,{split}\n")
        _write(root / "annotations" / f"{split}.csv", "".join(lines))


# Images and text ------------------------------------------------------------------------------------------

CAPTION = "a photograph of an old temple roof under a bright sky, seen from below between two trees in summer"


def shard(path: Path, samples: int, sources: Sources) -> None:
    """``KEY.jpg`` beside ``KEY.txt``."""
    with tarfile.open(path, "w") as tar:
        for i, picture in zip(range(samples), sources.pictures(samples)):
            for suffix, data in (("jpg", picture.read_bytes()), ("txt", CAPTION.encode())):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _shards(count: int) -> Callable[[Path, float, Sources], None]:
    """Shards of a thousand pairs, all links to one: a tenth of the real number, whose index is then extrapolated."""

    def make(root: Path, part: float, sources: Sources) -> None:
        one = sources.home / "shard.tar"
        if not one.exists():
            shard(one, 1000, sources)
        _folder(root)
        for i in range(max(1, int(count * part / 1000 / 100))):
            os.link(one, root / f"train-{i:06d}.tar")
        os.link(one, root / "val-000000.tar")

    return make


def _llava(root: Path, part: float, sources: Sources) -> None:
    """624,610 conversations about an image and 40,688 of text alone, 1.3 kB each."""
    pictures = sources.pictures(24)
    for i in range(24):
        os.link(next(pictures), _folder(root / "images") / f"{i}.jpg")
    rows = []
    for i in range(max(600, int(665_298 * part))):
        seen = i % 16 != 0
        turns = [{"from": "human", "value": ("<image>\n" if seen else "") + f"What is to be seen in place {i}?"},
                 {"from": "gpt", "value": CAPTION}] * 6
        turns = [turns[0], turns[1], *({**turn, "value": turn["value"].replace("<image>\n", "")} for turn in turns[2:])]
        rows.append({"id": str(i), "conversations": turns} | ({"image": f"images/{i % 24}.jpg"} if seen else {}))
    _write(root / "conversations_train.json", json.dumps(rows))


def _pairs_and_regions(root: Path, part: float, sources: Sources) -> None:
    _shards(4_000_000)(root, part, sources)
    _coco(root, part, sources)


SETS: dict[str, Callable[[Path, float, Sources], None]] = {
    "ImageNet-1K": _imagenet,
    "COCO": _coco,
    "Conceptual Captions": _captioned_pictures,
    "GOT-10k": _got10k,
    "GOT-10k, LaSOT, TrackingNet, COCO": _tracking("GOT-10k", "LaSOT", "TrackingNet", "COCO"),
    "LaSOT, GOT-10k, TrackingNet, COCO": _tracking("GOT-10k", "LaSOT", "TrackingNet", "COCO"),
    "UCF101": _ucf101,
    "HMDB51": _hmdb51,
    "Something-Something v1": _ssv1,
    "Kinetics-400": _kinetics,
    "CapsFusion-30M": _shards(30_000_000),
    "LLaVA-1.5 mixture": _llava,
    "image-text pairs": _shards(12_000_000),
    "image-text pairs and regions": _pairs_and_regions,
}


def lay_out(dataset: str, root: Path, part: float = 0.0) -> None:
    """Makes `root` in the layout of a data set, with so large a part of its real number of files: 1 all of them."""
    if dataset not in SETS:
        raise UserError(f"no layout of {dataset!r}; there are {', '.join(SETS)}")
    SETS[dataset](root, part, Sources(root.parent / f"{root.name}.sources"))
