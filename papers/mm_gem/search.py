"""An index of a folder of pictures, searched by text or by picture.

    python -m papers.mm_gem.search embed FOLDER [--checkpoint RUN] [--index pictures.index]
    python -m papers.mm_gem.search find "two red circles ." [--checkpoint RUN] [--index pictures.index]

FAISS searches. Its exact index serves a million pictures; for more there is --kind HNSW32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from common import run
from common.data.index import SUFFIXES
from common.data.loader import progress
from common.data.picture import Unreadable, read_picture
from common.data.text import printable
from common.run import UserError, drawing
from papers.mm_gem.embedder import BATCH, Embedder, Files, load


@dataclass
class Embed:
    """Embed all pictures in a folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    checkpoint: Path | None = None
    """Run folder, or model folder; without one, the newest run."""
    index: Path = Path("pictures.index")
    """Folder to write."""
    kind: str = "Flat"
    """FAISS's name of the index: Flat is exact; HNSW32 is faster for millions of pictures."""
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
    """Picture of the hits to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("the search needs FAISS: pip install -c constraints.txt faiss-cpu") from None
    return faiss


class Index:
    """Unit embeddings in a FAISS index, and the names of what they stand for.

    On disk a folder with vectors.faiss and names.json.
    """

    def __init__(self, vectors: Any, names: Sequence[str]):
        self.vectors, self.names = vectors, names

    @classmethod
    def of(cls, vectors_ND: Tensor, names: Sequence[str], kind: str = "Flat") -> Index:
        faiss, rows = _faiss(), np.ascontiguousarray(vectors_ND.numpy())
        try:
            index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
            index.train(rows)
            index.add(rows)
        except RuntimeError as error:
            reason = str(error).rsplit(": ", 1)[-1]
            raise UserError(f"FAISS makes no index of kind {kind!r} of {len(rows)} pictures: {reason}") from None
        return cls(index, names)

    def nearest(self, query_D: Tensor, count: int) -> list[tuple[str, float]]:
        """(name, cosine similarity), the nearest first."""
        if len(query_D) != self.vectors.d:
            raise UserError(f"the index has vectors of width {self.vectors.d}, the model {len(query_D)}")
        try:
            values, rows = (x[0].tolist() for x in self.vectors.search(query_D[None].numpy(), count))
            return [(self.names[row], value) for row, value in zip(rows, values) if row >= 0]  # -1: no more were found
        except (RuntimeError, MemoryError, IndexError) as error:
            raise UserError(f"the index is damaged ({type(error).__name__}: {error}); embed anew") from None

    def save(self, folder: Path) -> None:
        with run.written_whole(folder / "vectors.faiss") as part:
            _faiss().write_index(self.vectors, str(part))
        run.write_json(folder / "names.json", list(self.names))

    @classmethod
    def load(cls, folder: Path) -> Index:
        faiss = _faiss()
        try:
            names = run.read_json(folder / "names.json")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("names.json is no list of names")
            size = (folder / "vectors.faiss").stat().st_size  # no list in it is longer, whatever it says
            faiss.set_deserialization_vector_byte_limit(size)
            faiss.set_deserialization_loop_limit(size)
            # An index may name another file to read its vectors from: at most one beside it.
            index = cls(faiss.read_index(str(folder / "vectors.faiss"), faiss.IO_FLAG_ONDISK_SAME_DIR), names)
        except (OSError, ValueError, RuntimeError, MemoryError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{folder} is no index of this program ({reason}); make one with embed") from None
        if index.vectors.ntotal != len(names):
            raise UserError(f"{folder} has {index.vectors.ntotal} vectors, but {len(names)} names; embed anew")
        return index


def embed(embedder: Embedder, files: Sequence[Path], kind: str = "Flat") -> Index:
    """The index of picture files; unreadable ones are named and left out."""
    vectors, names, unreadable = [], [], []
    for first in progress(range(0, len(files), BATCH), "pictures"):
        pictures = []
        for file in files[first : first + BATCH]:
            try:
                pictures.append(read_picture(file))
                names.append(str(file.resolve()))
            except Unreadable:
                unreadable.append(file)
        if pictures:
            vectors.append(embedder.images(pictures))
    if unreadable:
        print(f"{len(unreadable)} files are no readable pictures, such as {printable(unreadable[0])}")
    if not names:
        raise UserError("no readable picture to embed")
    return Index.of(torch.cat(vectors), names, kind)


def main() -> None:
    args = tyro.cli(Embed | Find, prog="python -m papers.mm_gem.search", description="Search pictures.")
    embedder = load(args.checkpoint, run.start_world(run.Options(device=args.device)))
    if isinstance(args, Embed):
        files = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"no pictures in {args.folder}; expected files ending in {', '.join(sorted(SUFFIXES))}")
        index = embed(embedder, files, args.kind)
        index.save(args.index)
        print(f"{len(index.names):,} pictures in {args.index}")
        return
    index = Index.load(args.index)
    is_file = os.path.isfile(args.query)  # Path.is_file raises on a text longer than a name may be
    query = embedder.images(Files([Path(args.query)])) if is_file else embedder.texts([args.query])
    found = index.nearest(query[0], args.count)
    for name, similarity in found:
        print(f"{similarity:6.3f}  {printable(name)}")
    try:
        pictures = [np.asarray(read_picture(name)) for name, _ in found]
    except Unreadable as error:
        raise UserError(f"a picture has gone since it was embedded ({error}); embed anew") from None
    drawing.gallery(args.out, pictures, [f"{s:.3f}" for _, s in found], ["black"] * len(found), columns=4)
    print(f"drawn in {args.out}")


if __name__ == "__main__":
    run.main(main)
