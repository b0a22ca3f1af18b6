"""Damaged forms of files: bytes, lines, numbers, and parts of JSON, zip archives and safetensors."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from typing import Any

NUMBERS = (
    b"", b"0", b"-0", b"-1", b"1", b"7", b"nan", b"-inf", b"1e308", b"5e-324", b"1_000", b"0x10", b"2147483648",
    b"9223372036854775808", b"99999999999", b"9" * 30, b"9" * 400, "٣".encode(), b"--", b"1.5",
)
BYTES = (
    b"\x00", b"\xff\xfe", b"\n", b",", b"\r", b'"', b"\\", "é".encode("latin1"), b"\xef\xbb\xbf", b"[", b"{", b"<",
    b"-->",
)
VALUES: tuple[Any, ...] = (
    None, True, [], {}, "", 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, int("9" * 400), "x", "../..",
    "/dev/zero", "\x00", "\ud800", "$x$", [0] * 5, {"x": None}, [[]], "9" * 30, "\n|",
)
DEEP = b'[{"a":' * 50_000


def mutated(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(_ways(content))(content, rng)
    return content


def _ways(content: bytes) -> list:
    if content[:2] == b"PK":
        return [_member, _member, _some_bytes]
    if len(content) > 8 and content[8:9] == b"{":
        return [_header, _header, _some_bytes]
    text = [_some_bytes, _some_bytes, _number, _number, _line, _line, _cut]
    return text + [_json, _json, _json, _json, _deep] * (b"{" in content[:200] or b"[" in content[:200])


def _some_bytes(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randint(0, len(content)), rng.choice((0, 1, 1, 2, 8))
    inserted = rng.choice((b"", bytes([rng.randrange(256)]), rng.choice(BYTES), content[at : at + 64]))
    return content[:at] + inserted + content[at + length :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


def _number(content: bytes, rng: random.Random) -> bytes:
    """Another number, or word, in place of one."""
    found = list(re.finditer(rb"[-+.\w]+", content))
    if not found:
        return content
    word = rng.choice(found)
    return content[: word.start()] + rng.choice((*NUMBERS, rng.choice(found)[0])) + content[word.end() :]


def _line(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.choice(lines)
    lines[at : at + rng.randint(0, 1)] = rng.choice(([], [other], [b""], [lines[at] + other], [b"# " + other]))
    return b"\n".join(lines)


def _deep(content: bytes, rng: random.Random) -> bytes:
    at = rng.choice((0, content.find(b"[") + 1, content.find(b":") + 1))
    return content[:at] + DEEP + content[at:] * rng.randint(0, 1)


def _json(content: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a JSON file, or in a line of it."""
    lines = [content] if rng.random() < 0.5 else content.split(b"\n")
    at = rng.randrange(len(lines))
    start = lines[at][: len(lines[at]) - len(lines[at].lstrip(b"# "))]
    try:
        value = json.loads(lines[at].lstrip(b"# "))
    except (ValueError, RecursionError):
        return content
    lines[at] = start + json.dumps(_changed(value, rng)).encode()
    return b"\n".join(lines)


def _changed(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value = value.copy()
    kind = rng.random()
    if kind < 0.15:
        del value[key]
    elif kind < 0.25 and isinstance(value, list):
        value.insert(key, value[rng.randrange(len(value))])
    elif kind < 0.25:
        value[rng.choice(("x", "", "0", "id", "\x00"))] = value.pop(key)
    else:
        value[key] = _changed(value[key], rng)
    return value


def _member(content: bytes, rng: random.Random) -> bytes:
    """A zip archive, one of whose files is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged before
        return content
    if not files:
        return content
    name = rng.choice(list(files))
    files[name] = rng.choice((_some_bytes, _some_bytes, _cut, _number))(files[name], rng)
    if rng.random() < 0.1:
        del files[name]
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    header = rng.choice((_json, _number, _some_bytes))(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
