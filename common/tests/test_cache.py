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


@pytest.mark.parametrize("how", ["open to others", "another's"])
def test_a_home_that_others_may_write_to_is_not_believed(monkeypatch, tmp_path, how):
    """What lies in a cache is loaded, and some of it run: kernels, weights, wheels, indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    planted = tmp_path / "scratch/vision-reproductions/kernels"
    planted.mkdir(parents=True)
    os.chmod(planted, 0o777 if how == "open to others" else 0o700)
    if how == "another's":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        with pytest.raises(PermissionError):  # here the temporary folder is another's as well
            cache_dir("kernels")
    else:
        assert cache_dir("kernels") == tmp_path / "tmp" / f"vision-reproductions-{os.getuid()}" / "kernels"
        os.chmod(planted, 0o700)
        assert cache_dir("kernels") == planted


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert cache_dir("tiny").parent.parent == tmp_path
