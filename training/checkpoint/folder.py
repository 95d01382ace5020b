"""What a run leaves on disk, written so that a kill at any moment loses no finished checkpoint.

    RUN/checkpoint-STEP/  plain checkpoint (what `from_pretrained` loads) of the weights at that step, and in
                          training_state/ what `--resume` needs; the newest few are kept
    RUN/best/             plain checkpoint of the epoch with the highest validation mAP

A folder is written beside its place, synced, and renamed into it, so a folder without a dot in front of its name is
whole. checkpoint.json in it lists every file with its SHA-256, which is checked before anything is loaded. Tensors are
safetensors, all else is JSON: nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from torch import nn

from .atomic import atomic_folder, write_file
from .lock import LOCK_FILE

FORMAT_VERSION = 2  # 1 (last/, no hashes) was never released
MARKER = "checkpoint.json"
STATE_FOLDER = "training_state"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is not what was written."""


def save_checkpoint(folder: Path, model: nn.Module, processor, state_dict: dict | None = None) -> None:
    """Write weights, configuration, code and processor into `folder`: all that `from_pretrained` needs.

    Arguments:
        state_dict: in place of the model's own weights, a copy of them that training no longer changes.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def write_marker(folder: Path, **facts) -> None:
    """Seal `folder`: list its files with their sizes and hashes, and `facts`, in checkpoint.json."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in (folder / MARKER, folder / LOCK_FILE)
    }
    marker = {"format_version": FORMAT_VERSION, **facts, "files": files}
    write_file(folder / MARKER, json.dumps(marker, indent=1))


def verify(folder: Path, names: str = "*") -> dict:
    """Hold every file of a sealed folder (or those whose names fit a pattern) against its hash, and return the marker.

    Files that were added later are no concern of the marker.

    Raises:
        CheckpointError: no marker, one of another format version, or a file that is missing or was changed.
    """
    try:
        marker = json.loads((folder / MARKER).read_text())
        version = marker["format_version"]
        listed = marker["files"] if version == FORMAT_VERSION else {}
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} has no {MARKER}, so it was not written by a run of this version") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MARKER} is damaged ({error!r})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version} and this code reads {FORMAT_VERSION}: resume with the version of "
            "the code that wrote it, or start a new run from its weights with --init_from"
        )
    for name, (size, digest) in files.items():
        if not fnmatch(name, names):
            continue
        path = folder / name
        if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MARKER} names {name!r}, which is outside its folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise CheckpointError(f"{path} is not what was written (its SHA-256 differs)")
    return marker


def verify_if_sealed(folder: Path, names: str = "*") -> dict | None:
    """`verify` where there is a marker; None where there is none, as in a checkpoint that no run wrote."""
    return verify(folder, names) if (folder / MARKER).is_file() else None


@contextmanager
def revised(folder: Path) -> Iterator[Path]:
    """Yield a copy of a checkpoint to change, which takes its place in one step, sealed anew if `folder` was sealed.

    Raises:
        CheckpointError: it is sealed, and not what was sealed: a new seal would hide that.
    """
    marker = verify_if_sealed(folder)
    with atomic_folder(folder) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK_FILE, ".*.new"))
        yield copy
        if marker is not None:
            write_marker(copy, **{name: marker[name] for name in marker if name not in ("format_version", "files")})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
