"""What a paper's README says at a glance: the rows of `ROWS` in the table below its title. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

ROWS = ("Verdict", "Largest run", "Authors' code", "Only a GPU can tell")


def glance(readme: Path) -> dict[str, str]:
    """The table's rows, by name, as Markdown; empty where there is no README or no such table."""
    if not readme.is_file():
        return {}
    rows = re.findall(r"^\| ([^|]+?) \| (.+?) \|$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: text for name, text in rows if name in ROWS}


def plain(text: str) -> str:
    """Markdown as plain text: names of links without their addresses, no marks of code or emphasis."""
    return re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))


def table(papers: Path, titles: dict[str, str]) -> str:
    """Markdown: a row for each paper that has a glance; `titles` by folder."""
    found = {paper: glance(papers / paper / "README.md") for paper in titles}
    rows = [
        f"| [{titles[paper]}](papers/{paper}/README.md) | {' | '.join(said.get(row, '') for row in ROWS)} |"
        for paper, said in found.items() if said
    ]
    head = [f"| paper | {' | '.join(ROWS)} |", "|---" * (len(ROWS) + 1) + "|"]
    return "\n".join([*head, *rows, ""]) if rows else ""
