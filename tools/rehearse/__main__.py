"""Walks full-scale recipes without their data and without a GPU: ``python -m tools.rehearse [PAPER [RECIPE]]``.

What it looks at, per recipe: the data in their real layout and number (--data whole), views through its augmentation
(--views), the first step of its own training on a pretended GPU, its learning rates, its memory and its hours. Whole
papers are written into papers/PAPER/results/rehearsal.md.
"""

from __future__ import annotations

import multiprocessing

import tyro

from common.run import UserError
from common.run import main as run_main
from tools.list import full_scale, papers
from tools.rehearse.jobs import Arguments, walk_paper


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m tools.rehearse", description=__doc__)
    chosen = [args.paper] if args.paper else papers()
    jobs = []
    for paper in chosen:
        if paper not in papers():
            raise UserError(f"unknown paper {paper!r}; the papers are {', '.join(papers())}")
        known = full_scale(paper)
        if args.recipe and args.recipe not in known:
            raise UserError(f"{args.recipe!r} is no full-scale recipe of {paper}; they are {', '.join(known)}")
        jobs.append((paper, [args.recipe] if args.recipe else known, args))
    with multiprocessing.get_context("spawn").Pool(min(args.processes, len(jobs))) as pool:
        stale = [line for found in pool.imap(walk_paper, jobs, chunksize=1) for line in found]
    if stale:
        raise UserError("\n".join(stale))


if __name__ == "__main__":
    run_main(main)
