"""The layouts that lists and folders of videos come in: from a data folder's files to (path, label) of every video."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data.video.files import SUFFIXES
from common.data.video.frames import hidden
from common.run import UserError

EXPECTED = """expected one of
  UCF101       {root}/ucfTrainTestlist/{{classInd,trainlist01,testlist01}}.txt and {root}/UCF-101/<Class>/v_*.avi
  HMDB51       {root}/testTrainMulti_7030_splits/<class>_test_split1.txt and {root}/<class>/*.avi
  SSv1         {root}/something-something-v1-{{labels,train,validation}}.csv and
               {root}/20bn-something-something-v1/<id>/00001.jpg
  Kinetics     {root}/annotations/{{train,val}}.csv and {root}/train/[<label>/]<id>_000010_000020.mp4
  lists        {root}/{{train,val}}.txt with lines "path label" or "path frames label", labels from 0, or .json
  folders      {root}/{{train,val}}/<class>/<video file, or folder or zip of frames>"""


@dataclass
class Found:
    """What a layout makes of a split: (path, label) in order, names of the classes, lines that say nothing."""

    rows: list[tuple[Path, int]]
    classes: list[str]
    bad: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


class _Shelf:
    """Finds listed videos on disk: by their name, or with a suffix that the list does not have or has otherwise."""

    def __init__(self) -> None:
        self.folders: dict[Path, dict[str, Path]] = {}

    def find(self, folder: Path, name: str) -> Path | None:
        path = folder / on_disk(name)
        stems = self.folders.get(path.parent)
        if stems is None:
            stems = self.folders[path.parent] = {}
            for entry in sorted(os.listdir(path.parent)) if os.path.isdir(path.parent) else ():
                suffix = Path(entry).suffix.lower()
                if not hidden(entry):
                    stems[entry] = path.parent / entry
                    if suffix in SUFFIXES or suffix == ".zip":
                        stems.setdefault(Path(entry).stem, path.parent / entry)
        stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
        return stems.get(path.name) or stems.get(stem)

    def first(self, folders: Iterable[Path], *names: str) -> Path:
        """Where one of the names is, in the order given; the first place there is if it is nowhere."""
        folders = list(folders)
        places = (self.find(folder, name) for name in names for folder in folders)
        return next(filter(None, places), folders[0] / on_disk(names[0]))


def on_disk(name: str) -> str:
    """The file name that a list in UTF-8 means, whatever the locale: names on disk are bytes."""
    return os.fsdecode(name.encode(errors="surrogatepass"))


def as_text(name: str) -> str:
    """The other way: a file's name as text, fit to be printed whatever its bytes are."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is missing: {EXPECTED.format(root=path.parent.parent)}")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 in line {line}: {error.reason}; save it as UTF-8") from None


def _lines(path: Path) -> list[str]:
    return [line.rstrip("\n") for line in io.StringIO(_read(path), newline=None) if line.strip()]


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:  # int() also reads 1_000
        raise ValueError(f"{text!r} is no number")
    return int(text)


def _rows(lines: Iterable[Any], parse: Callable[[Any], tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[str]]:
    rows, bad = [], []
    for line in lines:
        try:
            rows.append(parse(line))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            bad.append(f"line {str(line)[:200]!r}")
    return rows, bad


def _class_ids(path: Path) -> dict[str, int]:
    """UCF101's classInd.txt, "1 Archery": the id of every class, in the order of the ids."""
    ids: dict[str, int] = {}
    for line in _lines(path):
        number, _, name = line.strip().replace("\t", " ").partition(" ")
        try:
            value = _number(number)
        except ValueError:
            value = None
        if value is None or not name or name in ids or value in ids.values():
            raise UserError(f"{path} has a line {line!r}, expected a number and a class of its own: 1 ApplyEyeMakeup")
        ids[name.strip()] = value
    if not ids:
        raise UserError(f"{path} is empty, expected a number and a class in each line: 1 ApplyEyeMakeup")
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _ucf101(root: Path, split: str, fold: int) -> Found | None:
    """Class ids of classInd.txt count from 1, labels here from 0."""
    lists = root / "ucfTrainTestlist"
    if not lists.exists():
        return None
    classes = list(_class_ids(lists / "classInd.txt"))
    number = {name: i for i, name in enumerate(classes)}
    folders = [next((f for f in (root / "UCF-101", root / "videos") if f.is_dir()), root)]
    shelf = _Shelf()

    def parse(line: str):
        relative = line.split()[0]  # the training list repeats the id behind it
        return shelf.first(folders, relative), number[relative.split("/")[0]]

    rows, bad = _rows(_lines(lists / f"{'train' if split == 'train' else 'test'}list{fold:02d}.txt"), parse)
    return Found(rows, classes, bad)


def _hmdb51(root: Path, split: str, fold: int) -> Found | None:
    """Classes in the order of the alphabet, not of a directory listing."""
    lists = root / "testTrainMulti_7030_splits"
    if not lists.exists():
        return None
    files = sorted(file for file in lists.glob(f"*_test_split{fold}.txt") if not hidden(file.name))
    classes = [file.name.removesuffix(f"_test_split{fold}.txt") for file in files]
    videos = next((f for f in (root / "hmdb51_org", root / "videos") if f.is_dir()), root)
    found, shelf = Found([], classes), _Shelf()
    wanted = 1 if split == "train" else 2  # 0: in neither
    for label, (file, name) in enumerate(zip(files, classes)):
        folder = videos / name
        uses, bad = _rows(_lines(file), lambda line: (line.split()[0], _number(line.split()[1])))
        found.rows += [(shelf.first([folder], video), label) for video, use in uses if use == wanted]
        found.bad += bad
    return found


def _ssv1(root: Path, split: str, _fold: int) -> Found | None:
    if not (root / "something-something-v1-labels.csv").exists():
        return None
    classes = _lines(root / "something-something-v1-labels.csv")
    number = {name: i for i, name in enumerate(classes)}
    frames, shelf = root / "20bn-something-something-v1", _Shelf()

    def parse(line: str):
        video, label = line.split(";", 1)
        return shelf.first([frames], video), number[label]

    file = root / f"something-something-v1-{'train' if split == 'train' else 'validation'}.csv"
    rows, bad = _rows(_lines(file), parse)
    return Found(rows, classes, bad)


def _kinetics(root: Path, split: str, _fold: int) -> Found | None:
    """Videos of any suffix, flat or in folders of their class, whose spaces may be _; their times may be left out."""
    if not (root / "annotations" / f"{split}.csv").exists():
        return None
    lines, shelf = _table(root / "annotations" / f"{split}.csv"), _Shelf()
    numbering = root / "annotations" / "train.csv"
    train = lines if split == "train" or not numbering.exists() else _table(numbering)
    classes = sorted({line["label"] for line in train})
    number = {name: i for i, name in enumerate(classes)}
    _refuse_unknown(root, split, {line["label"] for line in lines} - set(classes))

    def parse(line: dict[str, str]):
        video, label = line["youtube_id"], line["label"]
        start, end = (_number(line[key].strip()) for key in ("time_start", "time_end"))
        folders = [root / split / on_disk(f) for f in (label, label.replace(" ", "_"), ".")]
        return shelf.first(folders, f"{video}_{start:06d}_{end:06d}.mp4", video), number[label]

    rows, bad = _rows(lines, parse)
    return Found(rows, classes, bad)


def _table(path: Path) -> list[dict[str, str]]:
    try:
        lines = list(csv.DictReader(io.StringIO(_read(path), newline="")))
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}") from None
    columns = {"label", "youtube_id", "time_start", "time_end"}
    if lines and not columns <= lines[0].keys():
        raise UserError(f"{path} has columns {', '.join(map(str, lines[0]))}, expected {', '.join(sorted(columns))}")
    return [line for line in lines if line["label"]]


def _list(root: Path, split: str, fold: int) -> Found | None:
    """Lists of lines or of JSON objects with "name" and "label". Names need no suffix: a folder or zip of frames, as
    the authors of CtP prepare them, in `root` or its videos, frames or zips.

    Labels count from 0, in the order of classes.txt; or they are the numbers that classInd.txt gives the classes.
    """
    file = _list_file(root, split, fold)
    if file is None:
        return None
    numbering = file if split == "train" else _list_file(root, "train", fold) or file
    entries, bad = _entries(file)
    labels = [label for _, label in (entries if numbering == file else _entries(numbering)[0])]
    folders, shelf = [root, *(root / name for name in ("videos", "frames", "zips"))], _Shelf()
    if (ids := next((f for f in (file.parent / "classInd.txt", root / "classInd.txt") if f.exists()), None)):
        number = {value: i for i, value in enumerate(_class_ids(ids).values())}
        classes = list(_class_ids(ids))
    else:
        if (root / "classes.txt").exists():
            classes = _lines(root / "classes.txt")
        elif labels and (min(labels) > 0 or max(labels) >= len(labels)):
            raise UserError(
                f"labels of {numbering} run from {min(labels)} to {max(labels)} over {len(labels)} videos, expected "
                "to start at 0. Name the classes in classes.txt, in order, or with their numbers, as in UCF101's "
                f"classInd.txt (1 ApplyEyeMakeup), beside it"
            )
        else:
            classes = [str(i) for i in range(max(labels, default=-1) + 1)]
        number = {}
    rows = []
    for name, label in entries:
        if number and label not in number:
            raise UserError(f"{file} has label {label}, {ids} has {min(number)} to {max(number)}")
        rows.append((shelf.first(folders, name), number.get(label, label)))
    return Found(rows, classes, bad)


def _list_file(root: Path, split: str, fold: int) -> Path | None:
    """{split}.txt or .json, or of a fold: annotations/test_split_1.json."""
    names = [split, *(f"{name}_split_{fold}" for name in (("train",) if split == "train" else ("val", "test")))]
    places = (folder / f"{name}{suffix}" for folder in (root, root / "annotations") for name in names
              for suffix in (".txt", ".json"))
    return next((place for place in places if place.is_file()), None)


def _entries(file: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """(name, label) of every video of a list, and lines that are none."""
    if file.suffix == ".txt":
        return _rows(_lines(file), _entry)
    try:
        items = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    if not isinstance(items, list):
        raise UserError(f'{file} holds no list, expected [{{"name": ..., "label": ...}}, ...]')
    return _rows(items, lambda item: (str(item["name"]), _number(str(item["label"]))))


def _entry(line: str) -> tuple[str, int]:
    words = line.strip().rsplit(maxsplit=2)
    if len(words) == 3 and all(word.isdigit() for word in words[1:]):  # the number of frames between path and label
        return words[0], _number(words[2])
    path, label = line.strip().rsplit(maxsplit=1)
    return path, _number(label)


def _folders(root: Path, split: str, _fold: int) -> Found | None:
    if not (root / split).is_dir():
        return None
    found = _folder_rows(root / split)
    if split != "train" and (root / "train").is_dir():
        classes = _folder_rows(root / "train").classes
        _refuse_unknown(root, split, {found.classes[label] for _, label in found.rows} - set(classes))
        number = {name: i for i, name in enumerate(classes)}
        found.rows = [(path, number[found.classes[label]]) for path, label in found.rows]
        found.classes = classes
    elif empty := [name for i, name in enumerate(found.classes) if i not in {label for _, label in found.rows}]:
        raise UserError(f"{root / split}: no videos in class folders {empty}")
    return found


def _folder_rows(folder: Path) -> Found:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not hidden(entry.name))
    found = Found([], [as_text(name) for name in names])
    found.skipped["hidden or system files"] += sum(hidden(name) for name in os.listdir(folder))
    for label, name in enumerate(names):
        refuse_loop(folder / name)
        for path in sorted((folder / name).iterdir()):
            if hidden(path.name):
                found.skipped["hidden or system files"] += 1
            elif path.suffix.lower() in SUFFIXES | {".zip"} or path.is_dir():
                refuse_loop(path)
                found.rows.append((path, label))
            else:
                found.skipped[f"files that are no video ({path.suffix.lower() or 'no suffix'})"] += 1
    found.skipped = +found.skipped
    return found


def refuse_loop(path: Path) -> None:
    """`UserError` for a link to a folder that it lies in; other links are followed."""
    if path.is_symlink() and path.is_dir() and path.parent.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{path} links to {path.resolve()}, a folder that it lies in; remove the link")


def _refuse_unknown(root: Path, split: str, unknown: set[str]) -> None:
    if unknown:
        raise UserError(
            f"{root}: {split} has classes that train has not: {', '.join(sorted(unknown)[:10])}; "
            "the training split numbers the classes"
        )


LAYOUTS = (_ucf101, _hmdb51, _ssv1, _kinetics, _list, _folders)
