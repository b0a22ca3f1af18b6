"""The tables that rehearsals leave are those of the recipes as they are."""

import re
import subprocess
import sys

import pytest

from common.run import ROOT
from tools.list import full_scale, papers, recipes


@pytest.mark.parametrize("paper", papers())
def test_a_table_has_a_row_for_each_recipe(paper):
    table = ROOT / "papers" / paper / "results" / "rehearsal.md"
    if not table.exists():
        pytest.skip(f"not rehearsed yet: make rehearse PAPER={paper}")
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == full_scale(paper)
    found = recipes(paper).RECIPES
    for name, ready, _hours, _memory, batch, *_ in rows:
        assert ready == "yes" or ready.startswith("no: ")
        assert not batch or int(batch) <= found[name].batch


def test_95_recipes_are_full_scale():
    told = subprocess.run([sys.executable, "tools/list.py", "--full-scale"], cwd=ROOT, capture_output=True, text=True)
    assert len(told.stdout.splitlines()) == sum(len(full_scale(paper)) for paper in papers()) >= 95


@pytest.mark.long
@pytest.mark.parametrize("paper", papers())
def test_a_table_is_not_stale(paper):
    """Remade and compared: about eight minutes for all on two cores."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.rehearse", paper, "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
