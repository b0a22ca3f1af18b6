"""transformers' Trainer in a run folder: what no paper's own tests hold."""

import os
import time

from common.run import hf


def test_a_lock_that_a_killed_process_left_is_removed(tmp_path, capsys):
    old, new = (tmp_path / "py311" / name / "lock" for name in ("old", "new"))
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    hf.free_stale_locks(tmp_path)
    assert not old.exists() and new.exists()
    assert "left by a process that was killed" in capsys.readouterr().err
