"""The parts of a README that programs write: what stands between ``<!-- name:start -->`` and ``<!-- name:end -->``."""

from __future__ import annotations

from pathlib import Path

from common.run.files import UserError, write_text


def markers(name: str) -> tuple[str, str]:
    """The lines that enclose the part."""
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def filled(text: str, name: str, content: str) -> str | None:
    """`text` with `content`, which ends a line, as that part; None if it lacks the markers."""
    start, end = markers(name)
    before, _, rest = text.partition(f"{start}\n")
    _, found, after = rest.partition(end)
    return f"{before}{start}\n{content}{end}{after}" if found else None


def fill(readme: Path, name: str, content: str) -> None:
    """Writes the part anew."""
    new = filled(readme.read_text(encoding="utf-8"), name, content)
    if new is None:
        raise UserError(f"{readme}: add these two lines where the part belongs:\n" + "\n".join(markers(name)))
    write_text(readme, new)
