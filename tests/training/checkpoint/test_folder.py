"""What is on disk after every way a save can end."""

import hashlib
import json
import os

import pytest

from training.checkpoint.atomic import atomic_folder
from training.checkpoint.folder import MARKER, STATE_FOLDER, CheckpointError, revised, verify, write_marker
from training.checkpoint.series import newest_good


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_a_tool_changes_a_copy_that_is_sealed_anew_and_nothing_that_was_changed_before(tmp_path):
    folder = sealed(tmp_path, 4)
    with revised(folder) as copy:
        (copy / "config.json").write_text('{"thresholds": [0.3]}')
        assert verify(folder)["step"] == 4, "whole until the copy takes its place"
    assert verify(folder)["step"] == 4 and "0.3" in (folder / "config.json").read_text()
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not what was written"), revised(folder):
        raise AssertionError("a new seal would hide it")
