"""What an index of very many pictures costs: ``python -m papers.mm_gem.index_bench [--count 1000000]``.

Each way of searching runs in a process of its own over the same made vectors: time to build (of one's process), time of
a query, memory beyond an empty process's, and recall: how many of the exact search's ten nearest are found. Embeddings
lie near a surface of few dimensions, and so do these: 24 directions, and noise. Writes results/bench/index_*.{json,md}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from common import run
from common.run.bench import prepare, write_record
from papers.mm_gem.index import Index, Row
from papers.mm_gem.search import PART

KINDS = ("exact", "ivf", "hnsw")
NEAREST = 10
EXPLANATION = """Made vectors. Build: seconds of the process (threads as given) to make what the search needs of the
parts on disk, exact search needing nothing; again: to read that from the cache. Query: milliseconds, one at a time,
everything having been read once. Memory: the process's peak beyond that of one that has only imported. Recall@10: of
the exact search's ten nearest, how many are found."""


@dataclass
class Arguments:
    count: int = 1_000_000
    width: int = 256
    queries: int = 100
    kinds: tuple[str, ...] = KINDS
    threads: int = 1
    folder: Path | None = None
    """Where the vectors are written, 4 bytes each times count times width; else among the temporary files."""
    one: str = ""
    """Measure this kind alone, of the index in --folder, and print it as JSON: what the processes are called with."""
    out: Path = Path(__file__).parent / "results" / "bench"


def vectors(count: int, width: int, seed: int) -> Tensor:
    """(count, width), of length 1; those of another seed lie on the same surface."""
    surface = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, width, generator=generator)
    return F.normalize(torch.randn(count, 24, generator=generator) @ surface + noise, dim=1)


def write(folder: Path, count: int, width: int) -> None:
    """An index of made vectors, as `search.embed` writes it."""
    index = Index.create(folder, "made", width)
    for number, first in enumerate(range(0, count, PART)):
        rows = [Row(f"/pictures/{i:09d}.jpg", 1, 1, f"{i:064x}") for i in range(first, min(count, first + PART))]
        index.add(rows, vectors(len(rows), width, 1 + number))


def one(args: Arguments) -> dict[str, Any]:
    """Figures of one kind, and the places it finds."""
    empty = run.peak_memory_bytes()
    index = Index.open(args.folder, "made")
    index.kind = args.one
    queries, found, seconds = vectors(args.queries, args.width, 10**9), [], {}
    if args.one != "exact":
        for what in ("build", "again"):
            began = time.process_time()
            index._structure = index.structure()
            seconds[what] = time.process_time() - began
    index.search(queries[:1], NEAREST)
    began = time.process_time()
    for query in queries:
        found.append(index.search(query[None], NEAREST)[1][0].tolist())
    seconds["query"] = (time.process_time() - began) / len(queries)
    return {"kind": args.one, "seconds": seconds, "peak_bytes": run.peak_memory_bytes() - empty, "found": found}


def study(args: Arguments) -> list[dict[str, Any]]:
    """A record for each kind, in processes of their own."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder) / "index", args.count, args.width)
        records = []
        for kind in args.kinds:
            words = ["--one", kind, "--folder", f"{folder}/index", "--width", str(args.width), "--queries",
                     str(args.queries), "--threads", str(args.threads)]
            command = [sys.executable, "-m", "papers.mm_gem.index_bench", *words]
            done = subprocess.run(command, cwd=run.ROOT, stdout=subprocess.PIPE, text=True, check=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
    return with_recall(records)


def with_recall(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the first record found is the truth for all."""
    truth = [set(places) for places in records[0]["found"]]
    for record in records:
        hits = sum(len(right & set(places)) for right, places in zip(truth, record.pop("found"), strict=True))
        record["recall"] = hits / sum(map(len, truth))
    return records


def page(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| search | build, s | again, s | query, ms | memory, MB | recall@10 |", "|---|---:|---:|---:|---:|---:|"]
    for record in records:
        seconds, memory = record["seconds"], record["peak_bytes"] / 1e6
        build, again = (f"{seconds[key]:.1f}" if key in seconds else "–" for key in ("build", "again"))
        query = f"{seconds['query'] * 1e3:.3g}"
        lines.append(f"| {record['kind']} | {build} | {again} | {query} | {memory:.0f} | {record['recall']:.3f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m papers.mm_gem.index_bench", description=__doc__)
    if args.kinds[:1] != ("exact",) or set(args.kinds) - set(KINDS):
        raise run.UserError(f"--kinds {' '.join(args.kinds)}: exact first, then of {', '.join(KINDS[1:])}")
    prepare(args.threads)
    if args.one:
        print(json.dumps(one(args)))
        return
    records = study(args)
    text = page(records)
    stamp = f"{args.count:,} vectors of width {args.width}, {args.threads} thread(s)"
    write_record(args.out, "index", "cpu", records, text, stamp=stamp, explanation=EXPLANATION)
    print(text)


if __name__ == "__main__":
    run.main(main)
