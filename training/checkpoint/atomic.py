"""Folders that a kill at any moment leaves whole, and a thread that writes them beside the training."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
