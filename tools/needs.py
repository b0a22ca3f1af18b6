"""Says which packages an environment of one's own lacks: ``python tools/needs.py [PAPER]``. Standard library only."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lacking(paper: str = "") -> list[str]:
    """Of what pyproject.toml and the paper's requirements.txt ask for on this system."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.findall(r'^  "(.+)",$', text[text.index("dependencies = ["): text.index("[project.optional")], re.M)
    if paper:
        asked += (ROOT / "papers" / paper / "requirements.txt").read_text(encoding="utf-8").splitlines()
    missing = []
    for line in asked:
        name, _, condition = line.partition(";")
        name = re.split(r"[<>=!\[ ]", name.strip())[0]
        if not name or name.startswith("#") or ("sys_platform" in condition and sys.platform == "darwin"):
            continue
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


if __name__ == "__main__":
    paper = sys.argv[1] if len(sys.argv) > 1 else ""
    if missing := lacking(paper):
        files = f" -r papers/{paper}/requirements.txt" if paper else ""
        print(f"error: {sys.executable} lacks {', '.join(missing)}: pip install -c constraints.txt -e '.[dev]'{files}",
              file=sys.stderr)
        sys.exit(2)
