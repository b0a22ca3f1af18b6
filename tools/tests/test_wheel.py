"""What ``pip install .`` leaves works from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from common.run import ROOT


@pytest.mark.slow
def test_a_wheel_holds_what_is_read(tmp_path):
    source, home = tmp_path / "source", tmp_path / "installed"
    for name in ("common", "papers", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(home)
    read = ("papers/*/requirements.txt", "papers/*/scripts/*.json", "papers/*/results/*.json", "papers/*/weights/*",
            "papers/*/downstream/configs/*.py", "common/run/mm_configs/*.py", "common/run/*.json", "tools/*.jinja",
            "common/kernels/*/*.cu")
    wanted = {path.relative_to(ROOT) for pattern in read for path in ROOT.glob(pattern)}
    assert wanted and not {path for path in wanted if not (home / path).is_file()}
    assert not list(home.rglob("tests"))
    listed = subprocess.run(
        [sys.executable, "-m", "tools.list"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(home)},
        capture_output=True, text=True, check=True,
    )
    assert "shiftvit: " in listed.stdout
