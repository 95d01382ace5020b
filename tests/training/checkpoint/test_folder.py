"""What is on disk after every way a save can end."""

import errno
import hashlib
import json
import os
import threading

import pytest

from training.checkpoint.folder import (
    MARKER,
    STATE_FOLDER,
    CheckpointError,
    CheckpointWriter,
    atomic_folder,
    checkpoints,
    newest_good,
    prune,
    recover,
    recover_run,
    reseal,
    verify,
    write_marker,
)


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "runs" / "best"
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(text)
            assert not target.exists() or (target / "sub" / "file").read_text() == "one"
        assert (target / "sub" / "file").read_text() == text
    assert contents(target.parent) == ["best"], "nothing may be left beside it"


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


def sealed(run, step, text="weights"):
    with atomic_folder(run / f"checkpoint-{step}") as folder:
        (folder / STATE_FOLDER).mkdir()
        (folder / "config.json").write_text("{}")
        (folder / STATE_FOLDER / "tensors.safetensors").write_text(text * 100)
        write_marker(folder, step=step)
    return run / f"checkpoint-{step}"


def test_the_marker_lists_every_file_with_its_hash(tmp_path):
    folder = sealed(tmp_path, 3)
    marker = verify(folder)
    assert marker["step"] == 3 and set(marker["files"]) == {"config.json", f"{STATE_FOLDER}/tensors.safetensors"}
    assert marker["files"]["config.json"] == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / "notes.txt").write_text("added later")
    verify(folder)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TENSORS = f"{STATE_FOLDER}/tensors.safetensors"
DAMAGE = {
    "one bit": (lambda folder: flip(folder / TENSORS), r"tensors.safetensors is not what was written"),
    "cut": (lambda folder: os.truncate(folder / TENSORS, 5), r"tensors.safetensors is not what was written"),
    "gone": (lambda folder: (folder / TENSORS).unlink(), r"tensors.safetensors is missing"),
    "no marker": (lambda folder: (folder / MARKER).unlink(), r"has no checkpoint.json"),
    "half a marker": (lambda folder: os.truncate(folder / MARKER, 40), r"checkpoint.json is damaged"),
    "a list": (lambda folder: (folder / MARKER).write_text("[]"), r"checkpoint.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    hurt, message = DAMAGE[damage]
    good, newest = sealed(tmp_path, 8), sealed(tmp_path, 12)
    assert newest_good(tmp_path) == newest
    hurt(newest)
    with pytest.raises(CheckpointError, match=message):
        verify(newest)
    assert newest_good(tmp_path) == good
    said = capsys.readouterr().err
    assert "kept as damaged-checkpoint-12, going back to checkpoint-8" in said
    # Out of the way: it must not count among the newest that are kept.
    assert checkpoints(tmp_path) == [good] and (tmp_path / "damaged-checkpoint-12").is_dir()


def test_nothing_good_is_said_and_nothing_is_touched(tmp_path):
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        newest_good(tmp_path)
    flip(sealed(tmp_path, 4) / TENSORS)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be resumed.*--init_from"):
        newest_good(tmp_path)
    assert contents(tmp_path) == ["checkpoint-4"]


def test_other_format_versions_say_why_they_are_not_read(tmp_path):
    folder = sealed(tmp_path, 4)
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, "format_version": 3}))
    with pytest.raises(CheckpointError, match=r"format version 3 and this code reads 2: resume with the version"):
        verify(folder)
    old = tmp_path / "old"
    (old / "last" / STATE_FOLDER).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"last/ is of format version 1: start from those .*--init_from"):
        newest_good(old)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_marker_reaches_no_file_outside_its_folder(tmp_path, name):
    folder = sealed(tmp_path, 4)
    (tmp_path / "outside").write_text("secret")
    marker = json.loads((folder / MARKER).read_text())
    marker["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (folder / MARKER).write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(folder)


def test_a_tool_that_changes_a_file_on_purpose_reseals(tmp_path):
    folder = sealed(tmp_path, 4)
    (folder / "config.json").write_text('{"thresholds": [0.3]}')
    with pytest.raises(CheckpointError):
        verify(folder)
    reseal(folder)
    assert verify(folder)["step"] == 4


def test_the_newest_stay_and_a_kill_in_the_middle_of_a_removal_leaves_no_half(tmp_path, monkeypatch):
    for step in (2, 8, 10, 12):
        sealed(tmp_path, step)
    prune(tmp_path, 2)
    assert contents(tmp_path) == ["checkpoint-10", "checkpoint-12"]
    sealed(tmp_path, 14)

    def killed(path, **options):
        if path.exists():
            (path / MARKER).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoint.folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 2)
    monkeypatch.undo()
    assert contents(tmp_path) == [".checkpoint-10.new", "checkpoint-12", "checkpoint-14"]
    recover_run(tmp_path)
    assert contents(tmp_path) == ["checkpoint-12", "checkpoint-14"]


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
