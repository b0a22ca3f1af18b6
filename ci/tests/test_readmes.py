"""The commands READMEs show reach a parser that takes every word of them."""

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tyro

from common.run import ROOT

READMES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("papers/*/README.md")),
    *sorted(ROOT.glob("common/*/README.md")),
]
MISSING = {"mmengine", "mmcv", "mmdet", "mmseg", "faiss", "vot", "deepspeed"}  # some papers' own, not everyone's


class Parsed(BaseException):
    pass


def _commands(text):
    """Indented commands and those between backquotes, continued lines joined, what explains them left out."""
    lines = re.findall(r"^    ((?:make |\.venv/bin/python -m ).*)$", re.sub(r"\\\n\s*", "", text), re.M)
    quoted = re.findall(r"`((?:make |(?:\.venv/bin/)?python -m )[^`]*)`", " ".join(text.split()))
    commands = {re.split(r"\s+#|\s{2,}", line)[0] for line in lines + quoted}
    return {command for command in commands if " " in command.removeprefix("make ")  # else a verb is spoken of
            and not any(word in command for word in ("...", "vit_shift"))}


def _made(command, folder):
    """What a make line would run: the words of each call of its Python, none where it runs something else."""
    stub = folder / "python"
    stub.write_text('#!/bin/sh\ncase "$1" in tools/needs.py) exit 0 ;; '
                    f'tools/*) exec "{sys.executable}" "$@" ;; esac\nprintf "%s\\n" "CALL" "$@"\n')
    stub.chmod(0o755)
    words = [re.sub(r"^(DATA|CHECKPOINT|INPUT)=.*", rf"\1={folder}", word) for word in shlex.split(command)[1:]]
    done = subprocess.run(["make", *words, f"PYTHON={stub}"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return [call.splitlines() for call in done.stdout.split("CALL\n")[1:]]


def _parse(words, monkeypatch):
    """Runs a module up to the point where its command line has been read."""
    words = words[1:] if words[:1] == ["-u"] else words
    assert words[0] == "-m", words
    words = words[1:]
    if words[0] == "common.run.launch":
        int(words[1])
        words = words[2:]
    if words[0] in ("pytest", "pip") or ".scripts." in words[0] or len(words) == 1:  # these have no parser
        assert importlib.util.find_spec(words[0]), words[0]
        return

    def then_stop(parser):
        def parse(*args, **kwargs):
            parser(*args, **kwargs)
            raise Parsed
        return parse

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(tyro, "cli", then_stop(tyro.cli))
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", _of_commands)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    monkeypatch.undo()


def _of_commands(commands, *, parse=tyro.extras.subcommand_cli_from_dict):
    """Reads the words of one of several commands, and does not run it."""
    def stopped(function):
        @functools.wraps(function)
        def stop(*_, **__):
            raise Parsed
        return stop

    parse({name: stopped(function) for name, function in commands.items()})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_commands_parse(readme, tmp_path, monkeypatch):
    for command in sorted(_commands(readme.read_text(encoding="utf-8"))):
        try:
            if command.startswith("make "):
                for call in _made(command, tmp_path):
                    _parse(call, monkeypatch)
            else:
                _parse(shlex.split(command)[1:], monkeypatch)
        except ModuleNotFoundError as error:
            if error.name not in MISSING:
                raise
        except SystemExit as error:
            assert not error.code, command  # --help
