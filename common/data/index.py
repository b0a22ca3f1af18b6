"""One index of a data set for all processes: the pictures in a folder, or the samples in tar shards.

An index is made once and kept in the cache; processes map its arrays into memory and share them there, so that a
million pictures take no more of it with eight loader processes than with one.

It is made anew when the folder, one of the folders in it, or a shard has changed: their sizes and times of change are
compared at each opening. A folder's time tells of files that come, go or are renamed. Not noticed is what changes on a
file system that keeps no such times for folders (some mounts of object stores), or changed on another machine in the
last minute (NFS remembers times that long), and whether a link to a single file still leads somewhere. Where that
matters, delete the cache's folder ``index``. New pixels under an old name need no notice: they are read when asked for.
"""

from __future__ import annotations

import collections.abc
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data.text import printable
from common.run import UserError
from common.run.files import cache_dir, write_json, written_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
SYSTEM = {b"__MACOSX", b"@eaDir", b"lost+found", b"$RECYCLE.BIN", b"System Volume Information", b"Thumbs.db",
          b"desktop.ini"}
"""What systems leave in people's folders. Names that begin with a dot are passed over as well."""
FORMAT = 1  # of the files and of the rules by which they are filled; another number, another index
SETTLED_NS = 2 * 10**9  # times of change have up to two seconds between them; what is younger may change unnoticed
UNUSED_S = 30 * 24 * 3600


class Index:
    """The arrays of an index by name, mapped into memory; `about` says the rest. Pickled as its place on disk."""

    def __init__(self, home: Path, about: dict[str, Any]):
        self.home, self.about = home, about
        self.arrays = {name: np.asarray(np.load(home / file, mmap_mode="r")) for name, file in about["files"].items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self):
        return Index, (self.home, self.about)


def kept(what: str, build: Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]]) -> Index:
    """The index called `what`, from the cache where it is still right, else as `build` makes it.

    `build` returns (about, arrays), none of them empty; about["stamp"] holds `stamp` of every file and folder that it
    has looked into. Its errors are `UserError`s. One process at a time builds, the others wait for it.
    """
    home = cache_dir("index") / hashlib.sha256(f"{FORMAT} {what}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    if index := _read(home):
        return index
    try:
        home.mkdir(exist_ok=True)
        with _alone(home / "lock"):
            if index := _read(home):  # another process has made it meanwhile
                return index
            _tidy(home.parent)
            made = time.time_ns()
            about, arrays = build()
            files = {name: f"{made}-{os.getpid()}-{name}.npy" for name in arrays}
            for name, values in arrays.items():
                with written_whole(home / files[name]) as part, open(part, "wb") as file:
                    np.save(file, values)
            old = _about(home)
            about |= {"made": made, "files": files, "before": list(old.get("files", {}).values())}
            write_json(home / "about.json", about)  # last: now it is whole
            for file in old.get("before", []):  # but not the one before this: who started with it may open it again
                (home / file).unlink(missing_ok=True)
            return Index(home, about)
    except OSError as error:
        raise UserError(f"cannot keep an index in {home}: {error}; make room or set XDG_CACHE_HOME") from None


def stamp(info: os.stat_result) -> list[int]:
    """What shows a change. The last cannot be set back."""
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _about(home: Path) -> dict[str, Any]:
    try:
        about = json.loads((home / "about.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _read(home: Path) -> Index | None:
    """The index in a folder, if there is one that is whole and describes what is there now."""
    about = _about(home)
    try:
        for path, before in about["stamp"].items():
            now = stamp(os.stat(path.encode("utf-8", "surrogateescape")))
            if now != before or now[2] > about["made"] - SETTLED_NS:
                return None
        index = Index(home, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):  # missing, stale or damaged
        return None
    with suppress(OSError):
        os.utime(home / "about.json")
    return index


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Lets one process of this machine in at a time. Where the file system has no locks all come in at once, which is
    slower and does no harm: each writes files of its own, whole."""
    with open(lock, "ab") as file:
        if fcntl:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tidy(cache: Path) -> None:
    """Deletes what nobody has opened for a month."""
    for about in cache.glob("*/about.json"):
        with suppress(OSError):
            if about.stat().st_mtime < time.time() - UNUSED_S:
                shutil.rmtree(about.parent)


# Folders of pictures --------------------------------------------------------------------------------------


class Files(collections.abc.Sequence):
    """Paths of the pictures in an index, made when asked for."""

    def __init__(self, root: Path, index: Index):
        self.root, self.index = root, index

    def __len__(self) -> int:
        return len(self.index["starts"]) - 1

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        number = range(len(self))[number]
        start, end = self.index["starts"][number : number + 2]
        return self.root / os.fsdecode(self.index["names"][start:end].tobytes())


def index_folder(root: Path, *, classes: bool, expected: str = "") -> Index:
    """The pictures in and below a folder, sorted by the parts of their paths; `Files` makes them from it.

    Arrays: names (bytes) and starts (N + 1), the paths below `root` one after another and where each begins; with
    `classes` labels (N,), the number of the folder in `root` that holds it: about["classes"] names those folders. Then
    pictures beside the folders do not count. A link is what it points to.

    about["left_out"] counts what was passed over, by kind. `UserError` where there is no picture at all (its text ends
    in `expected`), or none in a class, or a link that leads back to a folder around it.
    """
    what = f"{'classes' if classes else 'pictures'} {os.fsencode(root.resolve()).decode('utf-8', 'surrogateescape')}"
    return kept(what, lambda: _list(root, classes, expected))


def _list(root: Path, classes: bool, expected: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    walk = _Walk(os.fsencode(root.resolve()), classes)
    try:
        walk.enter(walk.root, b"", ())
    except OSError as error:
        raise UserError(f"cannot list {printable(error.filename or root)}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{root}: folders in folders, more than can be followed") from None
    left_out = dict(walk.left_out.most_common())
    beside = "; left out: " + ", ".join(f"{count} {kind}" for kind, count in left_out.items()) if left_out else ""
    if not walk.labels:
        raise UserError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}){beside}{expected}")
    about = {"stamp": walk.stamps, "classes": walk.classes, "left_out": left_out}
    arrays = {"names": np.frombuffer(walk.names, np.uint8), "starts": np.frombuffer(walk.starts, np.int64)}
    if classes:
        arrays["labels"] = np.frombuffer(walk.labels, np.int64)
        empty = np.flatnonzero(np.bincount(arrays["labels"], minlength=len(walk.classes)) == 0)
        if len(empty):
            raise UserError(f"{root}: no images in class folders {[walk.classes[i] for i in empty]}{beside}")
    if beside:
        tqdm.write(f"{root}{beside.replace(';', ':', 1)}", file=sys.stderr)
    return about, arrays


def _sortable(name: bytes) -> str:
    """Names sort as text in UTF-8 does, whatever the locale."""
    return name.decode("utf-8", "surrogateescape")


class _Walk:
    """What `index_folder` gathers on its way. Paths are bytes: names need not be text."""

    def __init__(self, root: bytes, with_classes: bool):
        self.root, self.with_classes = root, with_classes
        self.suffixes = {suffix[1:].encode() for suffix in SUFFIXES}
        self.names, self.starts, self.labels = bytearray(), array("q", [0]), array("q")
        self.classes: list[str] = []
        self.stamps: dict[str, list[int]] = {}
        self.left_out: Counter[str] = Counter()

    def enter(self, folder: bytes, below_root: bytes, around: tuple[tuple[int, int], ...]) -> None:
        """Adds the pictures of a folder, given also as a prefix of its files' names and with the folders around it."""
        info = os.stat(folder)  # before it is listed: what comes in between makes the index stale
        this = (info.st_dev, info.st_ino)
        if this in around:
            raise UserError(f"{printable(folder)} is a link that leads back to a folder around it: take it away")
        self.stamps[_sortable(folder)] = stamp(info)
        entries = sorted(os.scandir(folder), key=lambda entry: _sortable(entry.name))
        counts = self.with_classes and not around
        for entry in entries if around else tqdm(entries, f"listing {printable(folder)}", disable=len(entries) < 100):
            name = entry.name
            _, dot, suffix = name.rpartition(b".")
            is_picture = bool(dot) and suffix.lower() in self.suffixes
            if name.startswith(b".") or (not is_picture and name in SYSTEM):
                self.left_out["hidden or system"] += 1
                continue
            if not entry.is_file(follow_symlinks=False):
                mode = _mode(entry, is_picture)
                if stat.S_ISDIR(mode):
                    if counts:
                        self.classes.append(printable(name))
                    self.enter(entry.path, below_root + name + b"/", (*around, this))
                    continue
                if not stat.S_ISREG(mode):
                    self.left_out["pipes, sockets or devices"] += 1
                    continue
            if not is_picture:
                self.left_out[f".{printable(suffix)}" if dot else "without suffix"] += 1
            elif counts:
                self.left_out["beside the class folders"] += 1
            else:
                self.names += below_root + name
                self.starts.append(len(self.names))
                self.labels.append(len(self.classes) - 1)


def _mode(entry: os.DirEntry, is_picture: bool) -> int:
    try:
        return entry.stat().st_mode
    except OSError:
        if not is_picture:
            raise UserError(f"{printable(entry.path)} is a link that leads nowhere, or into itself") from None
        return stat.S_IFREG  # a link to nothing is a picture that cannot be read


# Tar shards -----------------------------------------------------------------------------------------------

SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "test"}


def find_shards(root: Path, split: str) -> list[Path]:
    """Tar shards of a split, by name: whatever lies in a folder of the split's name that holds no folders; where there
    is no such folder, train-000000.tar or imagenet1k-train-0000.tar in `root`."""
    folder = root / split
    if not folder.is_dir():
        return [path for path in _tars(root) if _split_of(path.stem) == split]
    return [] if any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir()) else _tars(folder)


def _tars(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == ".tar" and not p.name.startswith(".") and p.is_file())


def _split_of(stem: str) -> str | None:
    words = [word for word in re.split(r"[^a-z]+", stem.lower()) if word in SPLIT_WORDS]
    numbered = re.search(r"[-_.]\d+$", stem) or re.match("|".join(f"{word}-" for word in SPLIT_WORDS), stem)
    return words[-1] if words and numbered else None


def webdataset_key(member: str) -> tuple[str, str]:
    """("v1.0/7", "jpg") of a shard's member v1.0/7.jpg: the key ends at the first dot of the file's own name."""
    folder, slash, name = member.rpartition("/")
    key, _, suffix = name.partition(".")
    return folder + slash + key, suffix


def index_shards(shards: Sequence[str], partner: str) -> Index:
    """The samples in webdataset shards, ``KEY.jpg`` beside ``KEY.partner``, in the order of the pictures.

    Arrays: rows (N, 5) int64, number of the shard, offset and length of the picture, offset and length of its partner,
    in bytes; with the partner "cls" labels (N,), the class numbers that it holds.
    """
    return kept(f"shards {partner} {json.dumps(list(shards))}", lambda: _scan(shards, partner))


def _scan(shards: Sequence[str], partner: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rows, labels, stamps = array("q"), array("q"), {}
    for number, shard in enumerate(tqdm(shards, desc="indexing shards", disable=len(shards) < 4)):
        images, partners, numbers = {}, {}, {}
        try:
            stamps[_sortable(os.fsencode(shard))] = stamp(os.stat(shard))
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if member.size < 0:
                        raise ValueError(f"{member.name} has {member.size} bytes")
                    key, suffix = webdataset_key(member.name)
                    is_image = f".{suffix.lower()}" in SUFFIXES
                    if not is_image and suffix != partner:
                        continue
                    if not member.isreg() or member.issparse():
                        raise ValueError(f"{member.name} is no plain file")
                    (images if is_image else partners)[key] = (member.offset_data, member.size)
                    if suffix == "cls":
                        numbers[key] = _label(tar, member)
                tar.fileobj.seek(tar.offset)  # where Python's reader stopped, at the end or at what it cannot read
                if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise ValueError(f"no header at byte {tar.offset}")
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{printable(shard)} is no readable webdataset shard: {printable(str(error))}") from None
        if unpaired := sorted(images.keys() ^ partners.keys()):
            missing = f"{len(unpaired)} samples lack image or .{partner}, such as {printable(unpaired[0])}"
            raise UserError(f"{printable(shard)}: {missing}")
        for key, place in images.items():
            rows.extend((number, *place, *partners[key]))
            if partner == "cls":
                labels.append(numbers[key])
    if not rows:
        raise UserError(f"no samples KEY.jpg with KEY.{partner} in {printable(shards[0])} and {len(shards) - 1} more")
    arrays = {"rows": np.frombuffer(rows, np.int64).reshape(-1, 5)}
    return {"stamp": stamps}, arrays | ({"labels": np.frombuffer(labels, np.int64)} if partner == "cls" else {})


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read(20)  # a class number is short, whatever the size says
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise ValueError(f"{member.name} holds {text!r}, no class number")
    return int(text)


def read_part(shard: str, offset: int, size: int) -> bytes:
    """The content of a shard's member."""
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)
