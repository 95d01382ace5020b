"""Folders are whole after every way a save can end."""

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from training.checkpoint.atomic import CheckpointWriter, atomic_folder, recover

from .test_folder import contents


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "runs" / "best"
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(text)
            assert not target.exists() or (target / "sub" / "file").read_text() == "one"
        assert (target / "sub" / "file").read_text() == text
    assert contents(target.parent) == ["best"], "nothing may be left beside it"


def test_weights_may_be_read_by_whoever_may_read_their_folder(tmp_path):
    for mask in (0o022, 0o027, 0o077):
        before = os.umask(mask)
        try:
            with atomic_folder(tmp_path / "checkpoint") as folder:
                (folder / "config.json").write_text("{}")
                save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        finally:
            os.umask(before)
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint").iterdir()}
        assert modes == {0o666 & ~mask}


def test_a_save_that_fails_leaves_the_old_folder(tmp_path):
    target = tmp_path / "last"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("good")
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as folder:
        (folder / "half").write_text("ba")
        raise OSError("disk full")
    assert contents(target) == ["file"] and contents(tmp_path) == ["last"], "the half must not fill the disk"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("better")
    assert contents(target) == ["file"] and contents(tmp_path) == ["last"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    target, left = tmp_path / "out", tmp_path / ".out.new"
    left.mkdir()
    (left / "of a killed process").touch()
    (left / "link").symlink_to(tmp_path)
    with atomic_folder(target) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(BlockingIOError, match=r"Another process writes .*out; wait"), atomic_folder(target):
            pass
        (folder / "more").write_text("first")
    assert contents(target) == ["file", "more"] and contents(tmp_path) == ["out"]


def test_a_kill_between_the_renames_is_undone(tmp_path):
    target, old = tmp_path / "last", tmp_path / ".last.old"
    old.mkdir()
    (old / "file").write_text("good")
    recover(target)
    assert (target / "file").read_text() == "good" and not old.exists()

    old.mkdir()  # a kill after both renames: the new folder counts
    recover(target)
    assert (target / "file").read_text() == "good" and not old.exists()


def test_every_file_and_folder_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(type(tmp_path), "rename", lambda self, to: (calls.append("rename"), rename(self, to))[1])
    with atomic_folder(tmp_path / "run" / "best") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    new = f"{tmp_path}/run/.best.new"
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert {new, f"{new}/sub", f"{new}/sub/file"} <= set(before)
    assert after == [f"{tmp_path}/run", str(tmp_path)]
    assert fsync is not os.fsync


def test_the_writer_writes_one_at_a_time_beside_the_caller_and_keeps_the_error():
    writer, gate, done = CheckpointWriter(), threading.Event(), []
    assert writer.error(wait=True) is None
    writer.submit(lambda: (gate.wait(10), done.append(1)))
    assert writer.error(wait=False) is None and not done, "the caller goes on"
    gate.set()
    assert writer.error(wait=True) is None and done == [1]

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.submit(full)
    assert "No space left" in str(writer.error(wait=True))
    assert "No space left" in str(writer.error(wait=False)), "asking does not clear it"


def test_no_thread_outlives_its_write():
    """It would keep OpenMP threads, by which every step of training becomes slower on few cores."""
    writer, order = CheckpointWriter(), []
    for number in range(3):
        writer.submit(lambda number=number: order.append((number, threading.current_thread())))
    assert writer.error(wait=True) is None
    for _, thread in order:
        thread.join(timeout=10)
    assert [(number, thread.is_alive()) for number, thread in order] == [(0, False), (1, False), (2, False)]
