"""Whatever stands in a file, its reader reads it or says what is wrong with it: 1,000 damaged forms of each.

    make test-long ARGS="-k fuzz --fuzz-seed 4711"
"""

import contextlib
import random
import resource
import signal
import traceback
from pathlib import Path

import pytest

from ci.tests import fuzzed_data, fuzzed_runs  # noqa: F401 (they fill READERS)
from ci.tests.fuzzed import READERS, Reader
from ci.tests.mutations import mutated
from common.data.picture import Unreadable
from common.run import ROOT, UserError

OURS = f"{ROOT}/"
QUICK, MANY = 20, 1000
SLOWEST_S, MOST_BYTES = 60, 3 * 2**30


@contextlib.contextmanager
def _bounds():
    """Not more than so much time and memory."""
    def late(*_):
        raise TimeoutError(f"not done in {SLOWEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SLOWEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def little_memory():
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def uncaught(name: str, reader: Reader, home: Path, seed: int, count: int) -> dict[str, str]:
    """Where a reader fails otherwise than it should: place -> number of the input, file, error and input."""
    files = reader.write(home)
    reader.read(home)  # what is whole is read
    found: dict[str, str] = {}
    for i in range(count):
        rng = random.Random(f"{seed} {name} {i}")
        path = rng.choice(files)
        whole = path.read_bytes()
        damaged = mutated(whole, rng)
        path.write_bytes(damaged)
        try:
            with _bounds():
                reader.read(home)
        except (UserError, Unreadable, *reader.errors) as error:
            assert str(error)
        except Exception as error:
            place = [f"{f.filename.removeprefix(OURS)}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
                     if f.filename.startswith(OURS) and "site-packages" not in f.filename][-1]
            what = f"input {i}, {path.relative_to(home)}, {str(error)[:200]!r}: {_difference(whole, damaged)}"
            found.setdefault(f"{type(error).__name__} in {place}", what)
        finally:
            path.write_bytes(whole)
    return found


def _difference(whole: bytes, damaged: bytes) -> str:
    start = next((i for i, (a, b) in enumerate(zip(whole, damaged)) if a != b), min(len(whole), len(damaged)))
    start = max(0, start - 30)
    return f"...{damaged[start : start + 90]!r}..."


def _check(name: str, home: Path, seed: int, count: int) -> None:
    found = uncaught(name, READERS[name], home, seed, count)
    assert not found, f"seed {seed}\n" + "\n".join(f"{place}: {what}" for place, what in found.items())


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.quick])
def test_fuzzed(name, tmp_path, little_memory):
    _check(name, tmp_path, 0, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_fuzzed_at_length(name, tmp_path, little_memory, pytestconfig):
    _check(name, tmp_path, pytestconfig.getoption("--fuzz-seed"), MANY)
