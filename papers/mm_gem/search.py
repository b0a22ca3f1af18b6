"""An index of a folder of pictures, searched by text or by picture.

    python -m papers.mm_gem.search embed FOLDER [--checkpoint RUN] [--index pictures.index]
    python -m papers.mm_gem.search find "two red circles ." [--checkpoint RUN] [--index pictures.index]

`embed` writes as it goes: killed, it goes on where it was; called again, it takes in what is new or changed and drops
what has gone. A picture that several names or links lead to is in the index once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import run
from common.data.index import SUFFIXES
from common.data.loader import progress
from common.data.picture import Unreadable, read_picture
from common.data.text import printable
from common.run import UserError, drawing
from papers.mm_gem.embedder import BATCH, Embedder, Files, load
from papers.mm_gem.features import fingerprint
from papers.mm_gem.index import Index, Kind, Row
from papers.mm_gem.processing import MMGEMProcessor

PART = 1024  # pictures that are written at a time: most that a kill loses


@dataclass
class Embed:
    """Embed all pictures in a folder, or bring its index up to date."""

    folder: Annotated[Path, tyro.conf.Positional]
    checkpoint: Path | None = None
    """Run folder, or model folder; without one, the newest run."""
    index: Path = Path("pictures.index")
    """Folder to write."""
    kind: Kind = "auto"
    """How it will be searched: exactly, or with FAISS's inverted file or graph; auto: exactly up to 200,000 pictures,
    by the inverted file beyond."""
    workers: int = 2
    """Processes that read and decode."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class Find:
    """Find the pictures nearest to a text or a picture."""

    query: Annotated[str, tyro.conf.Positional]
    """A text, or the file of a picture."""
    checkpoint: Path | None = None
    """The model that made the index; without one, the newest run's."""
    index: Path = Path("pictures.index")
    count: int = 8
    """Pictures to show."""
    out: Path = Path("hits.png")
    """Picture of the hits to write; beside it, under the same name, hits.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def pictures_in(folder: Path) -> list[Path]:
    """The files of pictures in a folder and those below it, by name, each once however many links lead to it."""
    found, seen = {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES:
                found.setdefault(os.path.realpath(os.path.join(place, name)))
    return sorted(map(Path, found))


class _Readings(Dataset):
    """(number, size, time, digest, prepared image (3, S, S) or None, reason why not) of files, read in workers."""

    def __init__(self, files: Sequence[Path], processor: MMGEMProcessor):
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[int, int, int, str, Tensor | None, str]:
        size = time_ns = 0
        try:
            picture = read_picture(self.files[number])  # refuses pipes and the like
            with open(self.files[number], "rb") as file:
                stat = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size, time_ns = stat.st_size, stat.st_mtime_ns
            return number, size, time_ns, digest, self.processor.pixels([picture])[0], ""
        except OSError as error:
            return number, size, time_ns, "", None, str(error) or "unreadable"


def embed(embedder: Embedder, index: Index, folder: Path, files: Sequence[Path]) -> dict[str, int]:
    """Brings an index up to date with the picture `files` of a folder: how many are new, dropped, doubles, unreadable.
    """
    home, there = os.path.join(os.path.realpath(folder), ""), {str(file): _stat(file) for file in files}
    dropped = index.drop(lambda row: row.name.startswith(home) and there.get(row.name) != (row.size, row.time_ns))
    known, digests = set(), set()
    for row in index.rows():
        known.add(row.name)
        digests.add(row.digest)
    index.passed = {  # looked at again: what has changed, and doubles of what has gone
        name: [size, time_ns, reason] for name, (size, time_ns, reason) in index.passed.items()
        if not name.startswith(home)
        or (there.get(name) == (size, time_ns) and (reason in digests or not _is_digest(reason)))
    }
    left = [file for file in files if str(file) not in known and str(file) not in index.passed]
    counts = {"new": 0, "dropped": dropped, "doubles": 0, "unreadable": 0}
    rows, vectors = [], []

    def write() -> None:
        if rows:
            index.add(rows, torch.cat(vectors))
            counts["new"] += len(rows)
        index.save_passed()
        rows.clear()
        vectors.clear()

    for batch in _batches(embedder, left):
        fresh, pixels = [], []
        for number, size, time_ns, digest, picture, reason in batch:
            name = str(left[number])
            if picture is None:
                index.passed[name] = [*there[name], reason]
                counts["unreadable"] += 1
            elif digest in digests:
                index.passed[name] = [size, time_ns, digest]
                counts["doubles"] += 1
            else:
                digests.add(digest)
                fresh.append(Row(name, size, time_ns, digest))
                pixels.append(picture)
        if fresh:
            rows += fresh
            vectors.append(embedder.prepared(torch.stack(pixels)))
        if len(rows) >= PART:
            write()
    write()
    return counts


def _stat(file: Path) -> tuple[int, int]:
    """Size and time; of what cannot be looked at, zeros."""
    try:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return 0, 0


def _is_digest(reason: str) -> bool:
    return len(reason) == 64 and set(reason) <= set("0123456789abcdef")


def _batches(embedder: Embedder, files: Sequence[Path]) -> Iterator[list[tuple]]:
    readings = _Readings(files, embedder.processor)
    loader = DataLoader(readings, batch_size=BATCH, num_workers=min(embedder.workers, len(files)), collate_fn=list)
    return progress(loader, f"{len(files):,} pictures")


def model_print(embedder: Embedder) -> str:
    """What tells this model and its preparation of pictures from others."""
    return fingerprint(embedder.model, embedder.processor.image_processor.to_dict(), embedder.model.config.standardize)


def main() -> None:
    args = tyro.cli(Embed | Find, prog="python -m papers.mm_gem.search", description="Search pictures.")
    if isinstance(args, Find) and args.count < 1:
        raise UserError(f"--count {args.count}: at least 1 picture")
    embedder = load(args.checkpoint, run.start_world(run.Options(device=args.device)))
    if isinstance(args, Embed):
        _embed(embedder, args)
    else:
        _find(embedder, args)


def _embed(embedder: Embedder, args: Embed) -> None:
    embedder.workers = args.workers
    files = pictures_in(args.folder)
    if not files:
        raise UserError(f"no pictures in {args.folder}; expected files ending in {', '.join(sorted(SUFFIXES))}")
    model = model_print(embedder)
    if (args.index / "about.json").exists():
        index = Index.open(args.index, model)
    else:
        index = Index.create(args.index, model, embedder.model.config.joint_width, args.kind)
    with index.held():
        index = Index.open(args.index, model)  # as the process before us left it
        counts = embed(embedder, index, args.folder, files)
        if not len(index):
            raise UserError("no readable picture to embed")
        if index.searched != "exact":
            index.structure()
    unreadable = [name for name, (_, _, reason) in index.passed.items() if not _is_digest(reason)]
    if unreadable:
        print(f"{len(unreadable)} files are no readable pictures, such as {printable(unreadable[0])}")
    print(f"{len(index):,} pictures in {args.index}: {counts['new']:,} new, {counts['dropped']:,} gone or changed, "
          f"{counts['doubles']:,} doubles left out")


def _find(embedder: Embedder, args: Find) -> None:
    index = Index.open(args.index, model_print(embedder))
    is_file = os.path.isfile(args.query)  # Path.is_file raises on a text longer than a name may be
    query = embedder.images(Files([Path(args.query)])) if is_file else embedder.texts([args.query])
    found = index.nearest(query[0], args.count)
    pictures, rows = [], []
    for name, similarity in found:
        try:
            pictures.append(np.asarray(read_picture(name)))
        except Unreadable:
            pictures.append(np.full((64, 64, 3), 230, np.uint8))
        there = os.path.isfile(name)
        rows.append({"file": name, "similarity": similarity, "there": there})
        print(f"{similarity:6.3f}  {printable(name)}{'' if there else '  (has gone since it was embedded)'}")
    captions = [f"{row['similarity']:.3f}" + ("" if row["there"] else " (gone)") for row in rows]
    drawing.gallery(args.out, pictures, captions, ["black"] * len(found), columns=4)
    told = {"query": args.query, "index": str(args.index), "searched": index.searched, "hits": rows}
    run.write_json(args.out.with_suffix(".json"), told)
    print(f"drawn in {args.out}, listed in {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    run.main(main)
