"""Where things made once are kept."""

import os
import tempfile

import pytest

from common.run.files import cache_dir


def test_a_home_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_dir("kernels")
    assert folder == tmp_path / f"vision-reproductions-{os.getuid()}" / "kernels" and folder.is_dir()
    assert folder.parent.stat().st_mode & 0o077 == 0 and cache_dir("kernels") == folder

    other = os.getuid() + 1
    folder.parent.rename(tmp_path / f"vision-reproductions-{other}")
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match=r"belongs to another user or .* set XDG_CACHE_HOME"):
        cache_dir("kernels")
