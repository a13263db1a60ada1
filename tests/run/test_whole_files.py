"""What a full disk and a kill leave of a checkpoint."""

import errno
import os
from pathlib import Path

import pytest

import h2s.run.whole_files


def names(folder) -> set[str]:
    return {f.name for f in folder.iterdir()}


def test_a_full_disk_leaves_the_last_checkpoint(build, tmp_path, monkeypatch):
    trainer = build(losses=(2, 1, 1))
    plain = os.fsync

    def full(handle):
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*No space left.* MB are free there"):
        trainer.train()
    assert names(tmp_path / "run") == {"checkpoint-1", "unfinished-checkpoint"}
    monkeypatch.undo()
    again = build(losses=(2, 1, 1))
    again.train(resume_from_checkpoint=True)
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-3"}


def test_the_disk_holds_a_checkpoint_before_its_name_says_so(build, tmp_path, monkeypatch):
    """Every file and the folder itself are synced, then renamed, then the rename is synced."""
    trainer = build(losses=(1,))
    done = []
    plain, rename = h2s.run.whole_files._sync, Path.rename
    monkeypatch.setattr(h2s.run.whole_files, "_sync", lambda path: (done.append(path.name), plain(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append("renamed"), rename(path, to))[1])
    trainer.train()
    at = done.index("renamed")
    assert set(done[:at]) == names(tmp_path / "run" / "checkpoint-1") | {"checkpoint-1"}
    assert done[at + 1 :] == ["run"]
