"""transformers' own tests of a model, a configuration and a processor, run on ours.

What a maintainer of transformers would run before taking a model in: ``tests/test_modeling_common.py`` and its like,
from the source distribution of the version in question, unchanged. Some modules that they import are not distributed;
small ones of our own stand in for them: `generation.py` here, and the texts below.

A paper's file ``tests/suite.py`` holds the test classes (``from tests.test_modeling_common import ModelTesterMixin``).
Its long test calls `run_suite`, which has them collected by a pytest of its own, because importing the mixins takes
20 s, and because another version of transformers than the installed one may be wanted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from common.data.tiny import written_once
from common.run.files import cache_dir

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "is_training_test",
         "torch_compile_test")
STAND_INS = {
    "tests/__init__.py": "",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": (HERE / "generation.py").read_text(encoding="utf-8"),
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    # Values that a config must keep, none of them its default.
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'dtype': 'float16', "
    "'output_hidden_states': True, 'chunk_size_feed_forward': 3, 'architectures': ['A'], 'id2label': {0: 'a', 1: 'b'}, "
    "'label2id': {'a': 0, 'b': 1}, 'problem_type': 'regression'}\n",
    # Pictures of the processors' tests: one beside the tests in place of all addresses.
    "utils/fetch_hub_objects_for_ci.py": "import os\n\n\ndef url_to_local_path(url, return_url_if_not_found=True):\n"
    "    return os.path.join(os.path.dirname(__file__), 'picture.png')\n",
    "pytest.ini": "[pytest]\naddopts = -ra --import-mode=importlib -p no:cacheprovider -p no:hypothesispytest\n"
    + "markers =\n"
    + "".join(f"    {mark}: transformers' own\n" for mark in MARKS),
}


def pip(*words: str) -> None:
    """Runs pip; without a network, say, the test is skipped."""
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip {words[0]} {words[-1]} does not work here: {done.stderr.strip().splitlines()[-1]}")


def other_version(version: str) -> Path:
    """A folder with that transformers, for the front of PYTHONPATH; fetched once."""

    def write(folder: Path) -> None:
        pip("install", "-q", "--no-deps", "--target", str(folder), f"transformers=={version}")

    return written_once("", write, f"transformers {version}", cache_dir("transformers") / version)


def suite(version: str) -> Path:
    """A folder with the packages ``tests`` and ``utils`` that go with this version of transformers; fetched once."""

    def write(folder: Path) -> None:
        pip("download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder),
             f"transformers=={version}")
        (packed,) = folder.glob("*.tar.gz")
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        (folder / f"transformers-{version}" / "tests").rename(folder / "tests")
        packed.unlink()

    root = written_once("", write, f"tests of transformers {version}", cache_dir("transformers") / f"tests-{version}")
    picture = root / "utils" / "picture.png"
    picture.parent.mkdir(exist_ok=True)
    Image.radial_gradient("L").convert("RGB").resize((40, 30)).save(picture)
    for name, text in STAND_INS.items():
        path = root / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return root


def environment(version: str | None = None) -> dict[str, str]:
    """Variables of a process that has this transformers (None: the installed one) and nothing from the network."""
    front = [str(other_version(version))] if version else []
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*front, str(ROOT)]), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_TEST_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def run_suite(file: Path, version: str | None = None, *, least: int) -> None:
    """Runs a paper's ``suite.py``; fails unless all tests of it pass, and at least so many."""
    from importlib.metadata import version as installed

    folder = suite(version or installed("transformers"))
    variables = environment(version)
    variables["PYTHONPATH"] = f"{folder}{os.pathsep}{variables['PYTHONPATH']}"
    settings = ["-c", str(folder / "pytest.ini"), "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", "-q", *settings, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert not done.returncode, "a test of transformers' suite fails: see above"
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found[1]) >= least, f"fewer than {least} tests ran"
