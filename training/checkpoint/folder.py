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
from pathlib import Path

from torch import nn

FORMAT_VERSION = 2  # 1 (last/, no hashes) was never released
MARKER = "checkpoint.json"
STATE_FOLDER = "training_state"


class CheckpointError(RuntimeError):
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
        if path.is_file() and path != folder / MARKER
    }
    marker = {"format_version": FORMAT_VERSION, **facts, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1))


def verify(folder: Path) -> dict:
    """Hold every file of a sealed folder against its hash, and return the marker.

    Files that were added later are no concern of the marker.

    Raises:
        CheckpointError: no marker, one of another format version, or a file that is missing or was changed.
    """
    try:
        marker = json.loads((folder / MARKER).read_text())
        version, files = marker["format_version"], dict(marker["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MARKER}, so it was not written by a run of this version") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MARKER} is damaged ({error!r})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version} and this code reads {FORMAT_VERSION}: resume with the version of "
            "the code that wrote it, or start a new run from its weights with --init_from"
        )
    for name, expected in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MARKER} names {name!r}, which is outside its folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is not what was written (its SHA-256 differs)")
    return marker


def reseal(folder: Path) -> None:
    """Renew the marker, if `folder` has one, after a tool changed a file on purpose."""
    path = folder / MARKER
    if path.is_file():
        marker = json.loads(path.read_text())
        facts = {name: value for name, value in marker.items() if name not in ("format_version", "files")}
        write_marker(folder, **facts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
