"""An index of pictures on disk: their embeddings, in parts that are written as they are made.

    about.json             format, the model's fingerprint, width, how it is searched
    parts/NAME.safetensors "vectors" (n, D) of length 1, float32; in its metadata "rows": of each its file, the file's
                           size and time in nanoseconds, and the digest of its bytes
    passed.json            files that were looked at and are not in it, with the reason

It holds numbers and names alone, so that reading a stranger's runs nothing. Exact search needs no more than that. For
very many pictures there is FAISS's inverted file (kind "ivf") or graph ("hnsw"); that structure is made of the parts,
and kept in the cache, since FAISS's own files are not for strangers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.data.loader import progress
from common.run import UserError, read_json, write_json, written_whole
from common.run.files import cache_dir

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

FORMAT = 2
EXACT_MOST = 200_000
"""Above so many pictures, kind "auto" is "ivf"; see results/bench."""
PATIENCE_S = 10  # with a lock: a killed process's loaders live on for a few seconds, and hold it
PROBES = 32  # lists that a query looks into
Kind = Literal["auto", "exact", "ivf", "hnsw"]


@dataclass(frozen=True)
class Row:
    """A file as it was when it was embedded."""

    name: str
    size: int
    time_ns: int
    digest: str


class Index:
    """Rows with their vectors; `Index.open` reads it, `Index.create` makes an empty one."""

    def __init__(self, folder: Path, about: dict[str, Any], parts: dict[Path, int], passed: dict[str, list]):
        """`parts`: how many rows each has."""
        self.folder, self.parts, self.passed = folder, parts, passed
        self.model, self.width, self.kind = about["model"], about["width"], about["kind"]
        self._structure: Any = None

    # Files -----------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, model: str, width: int, kind: Kind = "auto") -> Index:
        about = {"format": FORMAT, "model": model, "width": width, "kind": kind}
        write_json(folder / "about.json", about)
        return cls(folder, about, {}, {})

    @classmethod
    def open(cls, folder: Path, model: str) -> Index:
        """`UserError` if it is damaged, or was made by another model than that of the fingerprint `model`."""
        try:
            about = read_json(folder / "about.json")
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ValueError("about.json is not of this version")
            width = about["width"]
            if type(width) is not int or width < 1 or about["kind"] not in ("auto", "exact", "ivf", "hnsw"):
                raise ValueError("about.json has no width and kind")
            if about["model"] != model:
                raise UserError(f"{folder} was made by another model: give that one with --checkpoint, or embed anew")
            parts = {path: _count(path, width) for path in sorted((folder / "parts").glob("*.safetensors"))}
            passed = read_json(folder / "passed.json") if (folder / "passed.json").exists() else {}
            if not isinstance(passed, dict) or not all(isinstance(v, list) and len(v) == 3 for v in passed.values()):
                raise ValueError("passed.json is no table of files")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder} is no index of this program ({_short(error)}); make one with embed") from None
        return cls(folder, about, parts, passed)

    def add(self, rows: Sequence[Row], vectors_ND: Tensor) -> None:
        """Writes a part, whole or not at all."""
        digest = hashlib.sha256("\0".join(row.digest for row in rows).encode()).hexdigest()[:16]
        path, number = self.folder / "parts" / f"{len(self.parts):06d}-{digest}.safetensors", len(self.parts)
        while path in self.parts:
            number += 1
            path = path.with_name(f"{number:06d}-{digest}.safetensors")
        self._write(path, rows, vectors_ND)

    def drop(self, gone: Callable[[Row], bool]) -> int:
        """Takes rows out; how many."""
        dropped = 0
        for path in list(self.parts):
            rows = self._rows(path)
            kept = [i for i, row in enumerate(rows) if not gone(row)]
            if len(kept) < len(rows):
                dropped += len(rows) - len(kept)
                if kept:
                    self._write(path, [rows[i] for i in kept], self._vectors(path)[kept])
                else:
                    path.unlink()
                    del self.parts[path]
        return dropped

    def save_passed(self) -> None:
        write_json(self.folder / "passed.json", self.passed)

    def _write(self, path: Path, rows: Sequence[Row], vectors_ND: Tensor) -> None:
        about = {"rows": json.dumps([astuple(row) for row in rows])}
        with written_whole(path) as part:
            save_file({"vectors": vectors_ND.float().contiguous().clone()}, part, about)
        self.parts[path], self._structure = len(rows), None

    def rows(self) -> Iterator[Row]:
        for path in self.parts:
            yield from self._rows(path)

    def _rows(self, path: Path) -> list[Row]:
        """Of a part; read when they are asked for, since a million take hundreds of megabytes."""
        try:
            with safe_open(path, "pt") as file:
                rows = [Row(*row) for row in json.loads(file.metadata()["rows"])]
            if len(rows) != self.parts[path]:
                raise ValueError(f"{len(rows)} rows for {self.parts[path]} vectors")
            if not all(isinstance(row.name, str) and isinstance(row.digest, str) for row in rows):
                raise ValueError("rows without names")
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"the index is damaged ({path.name}: {_short(error)}); embed anew") from None
        return rows

    def _vectors(self, path: Path) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                vectors = file.get_tensor("vectors")
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"the index is damaged ({path.name}: {_short(error)}); embed anew") from None
        if not vectors.isfinite().all():
            raise UserError(f"the index is damaged ({path.name} holds numbers that are not finite); embed anew")
        return vectors

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else writes to it meanwhile; `UserError` if somebody does. What a killed process left half is gone."""
        with open(self.folder / "lock", "ab") as file:
            for left_s in range(PATIENCE_S, -1, -1):
                try:
                    if fcntl:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not left_s:
                        raise UserError(f"another process is writing to {self.folder}") from None
                    time.sleep(1)
            for half in (self.folder / "parts").glob(".*.part"):
                half.unlink(missing_ok=True)
            yield

    # Search ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(self.parts.values())

    @property
    def searched(self) -> str:
        """"exact", "ivf" or "hnsw": how, with the pictures that there are."""
        if self.kind != "auto":
            return self.kind
        return "exact" if len(self) <= EXACT_MOST else "ivf"

    def nearest(self, query_D: Tensor, count: int) -> list[tuple[str, float]]:
        """(file, cosine similarity), the nearest first."""
        if len(query_D) != self.width:
            raise UserError(f"the index has vectors of width {self.width}, the model {len(query_D)}")
        if count < 1:
            raise UserError(f"--count {count}: at least 1 picture")
        values, places = self.search(query_D[None], min(count, len(self)))
        return [(self._name(i), value) for value, i in zip(values[0].tolist(), places[0].tolist()) if i >= 0]

    def _name(self, place: int) -> str:
        for path, count in self.parts.items():
            if place < count:
                return self._rows(path)[place].name
            place -= count
        raise UserError(f"the index is damaged (it has no row {place} more); embed anew")

    def search(self, queries_QD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(cosine similarities (Q, count), places among `rows` (Q, count)); -1 where an approximate search found no
        more."""
        if self.searched == "exact":
            return self._search_exactly(queries_QD, count)
        if self._structure is None:
            self._structure = self.structure()
        values, places = self._structure.search(queries_QD.numpy(), count)
        return torch.from_numpy(values), torch.from_numpy(places)

    def _search_exactly(self, queries_QD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, places, first = torch.empty(len(queries_QD), 0), torch.empty(len(queries_QD), 0, dtype=torch.long), 0
        for path, rows in self.parts.items():
            found = queries_QD.float() @ self._vectors(path).mT
            best = found.topk(min(count, rows), dim=1)
            values, places = torch.cat([values, best.values], 1), torch.cat([places, first + best.indices], 1)
            best = values.topk(min(count, values.shape[1]), dim=1)
            values, places = best.values, places.gather(1, best.indices)
            first += rows
        return values, places

    def structure(self) -> Any:
        """FAISS's index of all vectors, from the cache, or made now and put there."""
        faiss = _faiss()
        stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self.parts]
        home = cache_dir("search") / hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:24]
        key = hashlib.sha256(repr((faiss.__version__, self.searched, PROBES, stats)).encode()).hexdigest()[:24]
        path = home / f"{key}.faiss"
        with contextlib.suppress(RuntimeError):  # it is not there, or damaged
            return faiss.read_index(str(path))
        made = build(self.searched, self.width, len(self), lambda: map(self._vectors, progress(self.parts, "building")))
        with written_whole(path) as part:
            faiss.write_index(made, str(part))
        for old in set(home.glob("*.faiss")) - {path}:
            old.unlink(missing_ok=True)
        return made


def build(kind: str, width: int, count: int, parts: Callable[[], Iterator[Tensor]]) -> Any:
    """FAISS's index of `count` vectors of length 1, which `parts` gives (n, D) at a time, as often as asked."""
    faiss = _faiss()
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = 64
    else:
        lists = max(1, min(4096, int(4 * count**0.5), count // 40))  # k-means wants 39 points a list
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.max_points_per_centroid, index.nprobe = 10, 64, min(PROBES, lists)
        step = max(1, count // (64 * lists))  # evenly spread; all of them would take k-means' time alone
        index.train(torch.cat([vectors[::step] for vectors in parts()]).numpy())
    for vectors in parts():
        index.add(vectors.numpy())
    return index


def _count(path: Path, width: int) -> int:
    """Rows of a part, by its head alone; ValueError if it is no part of an index of this width."""
    with safe_open(path, "pt") as file:
        if list(file.keys()) != ["vectors"]:
            raise ValueError(f"{path.name} holds {', '.join(file.keys())}, not vectors")
        found = file.get_slice("vectors")
        shape = found.get_shape()
        if found.get_dtype() != "F32" or len(shape) != 2 or shape[1] != width or not shape[0]:
            raise ValueError(f"{path.name} has vectors of {found.get_dtype()} {shape}, not of width {width}")
        return shape[0]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("so many pictures are searched by FAISS: pip install -c constraints.txt faiss-cpu") from None
    return faiss
