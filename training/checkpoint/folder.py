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
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import nn

FORMAT_VERSION = 2  # 1 (last/, no hashes) was never released
MARKER = "checkpoint.json"
STATE_FOLDER = "training_state"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not what was written."""


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends without an error it takes `target`'s place.

    The old `target` exists until the new one is complete and on disk. A kill between the two renames leaves it under
    `.{name}.old`, from where `recover` brings it back. An error removes what was written, so that a full disk is not
    left full.
    """
    written, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    recover(target)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        for path in [*written.rglob("*"), written]:
            _sync(path)
        if target.exists():
            target.rename(old)
        written.rename(target)
    except BaseException:
        recover(target)
        shutil.rmtree(written, ignore_errors=True)
        raise
    for folder in (target.parent, target.parent.parent):  # the name in its folder, and that folder's in its own
        _sync(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo a half-finished replacement of `target` by `atomic_folder`."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def recover_run(folder: Path) -> None:
    """Undo whatever a killed run left half done in its folder: best/ is brought back, unfinished folders go."""
    recover(folder / "best")
    for unfinished in folder.glob(".*.new"):
        shutil.rmtree(unfinished)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- what is in a checkpoint


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


def refuse_leads_elsewhere(source: str | Path) -> None:
    """Refuse a checkpoint folder whose own files send the loader to another place; Hub ids pass.

    Raises:
        ValueError: a list of shards that names a file outside the folder, or an adapter whose base is no folder here.
    """
    folder = Path(source)
    index, adapter = folder / "model.safetensors.index.json", folder / "adapter_config.json"
    if index.is_file():
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if Path(shard).name != shard:
                raise ValueError(f"{index} names the file {shard!r}, which is not in its folder: do not load this.")
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        if not Path(str(base)).is_dir():
            raise ValueError(
                f"{folder} is an adapter of {base!r}, and a downloaded file does not choose what is downloaded next: "
                "put the folder of its base there, or merge it first."
            )


# --- which checkpoints a run has


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint-STEP folders, newest first."""
    found = {int(match[1]): path for path in run.glob("*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def newest_good(run: Path) -> Path:
    """The newest checkpoint whose hashes agree; damaged newer ones are renamed `damaged-...`, with a message.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are some, and none is good.
    """
    problems = []
    for folder in checkpoints(run):
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append((folder, str(error)))
            continue
        for damaged, problem in problems:
            aside = damaged.with_name(f"damaged-{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            print(f"{problem}: kept as {aside.name}, going back to {folder.name}.", file=sys.stderr)
        return folder
    if problems:
        raise CheckpointError(
            f"{problems[0][1]}; no checkpoint of {run} can be resumed. Start a new run, from weights that still load "
            "with --init_from."
        )
    old = f"; its last/ is of format version 1: start from those weights with --init_from {run / 'last'}"
    raise FileNotFoundError(
        f"{run} holds no training state to resume from{old if (run / 'last').is_dir() else ': start without --resume'}."
    )


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for folder in checkpoints(run)[keep:]:
        # Renamed first: a kill in the middle of the removal must not leave a folder that looks like a checkpoint.
        gone = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


class CheckpointWriter:
    """Writes in a thread of its own, one checkpoint at a time, so that at most one copy of the state is in memory."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Run `write` in the background, after the one before it has ended."""
        self._pending = self._thread.submit(write)

    def error(self, *, wait: bool) -> BaseException | None:
        """What the write in hand failed with; None where it went well or, without `wait`, where it is not done."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        return self._pending.exception()

    def close(self) -> None:
        """Wait for the write in hand, and end the thread."""
        self._thread.shutdown()
