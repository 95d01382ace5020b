"""Files and folders that a kill at any moment leaves whole, and a thread that writes them beside the training."""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_EXCHANGE, _HERE = 2, -100  # Linux: RENAME_EXCHANGE, AT_FDCWD


def write_file(path: Path, data: bytes | str) -> None:
    """Write all of a file or nothing of it; it is on disk when this returns. Text becomes UTF-8.

    What is written first has a name that nobody can guess and that nothing has yet, so that a link laid there is not
    followed; a link at `path` itself is replaced.
    """
    with whole_file(path) as written, written.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; when the block ends without an error it takes the place of `path`."""
    path = Path(path)
    written = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.new")
    try:
        yield written
        _sync(written)
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def remove_unfinished(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what `whole_file` began in a folder when its process was killed; for where nobody else writes.

    Args:
        names: of the files that were to be; None: all.
    """
    begun = None if names is None else {name[:100] for name in names}
    for path in folder.glob(".*.new"):
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.new", path.name, re.DOTALL)
        if match and (begun is None or match[1] in begun) and (path.is_symlink() or not path.is_dir()):
            path.unlink()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends without an error it takes `target`'s place.

    The old `target` exists until the new one is complete and on disk. Linux exchanges the two in one step; elsewhere a
    kill between two renames leaves the old one under `.{name}.old`, from where `recover` brings it back. An error
    removes what was written, so that a full disk is not left full.

    Raises:
        BlockingIOError: another process writes the same folder.
    """
    target = target.resolve()  # through a link, which stays one
    written, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    held = _folder_of_our_own(written, target)
    try:
        recover(target)
        for left in written.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield written
        same_modes(written)
        for path in [*written.rglob("*"), written]:
            _sync(path)
        if not target.exists():
            written.rename(target)
        elif _exchange(written, target):
            old = written
        else:
            try:
                target.rename(old)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EXDEV):
                    raise
                raise OSError(f"{target} is a mount point and cannot be replaced: mount the folder above it.") from None
            written.rename(target)
    except BaseException:
        recover(target)
        shutil.rmtree(written, ignore_errors=True)
        raise
    finally:
        os.close(held)
    for folder in (target.parent, target.parent.parent):  # the name in its folder, and that folder's in its own
        _sync(folder)
    shutil.rmtree(old, ignore_errors=True)


def _folder_of_our_own(written: Path, target: Path) -> int:
    """Make `written`, or take what a killed process left; returns a descriptor, whose lock ends with the process."""
    while True:
        written.mkdir(parents=True, exist_ok=True)
        held = os.open(written, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise BlockingIOError(f"Another process writes {target}; wait for its end, or choose another.") from None
        except OSError:  # a file system that has no such locks
            pass
        if written.exists() and os.path.samestat(os.fstat(held), written.stat()):  # not renamed by its writer since
            return held
        os.close(held)


def same_modes(folder: Path) -> None:
    """Let whoever may read a new folder read its files too: safetensors gives its own to their owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(path.stat().st_mode | folder.stat().st_mode & 0o666)


def recover(target: Path) -> None:
    """Undo a half-finished replacement of `target` by `atomic_folder`."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def move_aside(path: Path, prefix: str) -> Path:
    """Rename `path` to the first free of `prefix-NAME`, `prefix-2-NAME`, ...; returns that."""
    names = (f"{prefix}-{path.name}" if number == 1 else f"{prefix}-{number}-{path.name}" for number in range(1, 10**6))
    aside = next(aside for name in names if not (aside := path.with_name(name)).exists())
    path.rename(aside)
    return aside


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), ctypes.c_uint(_EXCHANGE)) == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointWriter:
    """Writes beside the training, one checkpoint at a time, so that at most one copy of the state is in memory.

    Each write has a thread of its own, which ends with it. One that stayed would keep its OpenMP threads, and where
    there are more of these than cores libgomp lets all of them sleep between two operations: on two cores a training
    step took 1.4 times as long from the first checkpoint on.
    """

    def __init__(self):
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Run `write` in the background, after the one before it has ended."""
        self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(write)
        self._thread.shutdown(wait=False)

    def error(self, *, wait: bool) -> BaseException | None:
        """What the write in hand failed with; None where it went well or, without `wait`, where it is not done."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        return self._pending.exception()

    def close(self) -> None:
        """Wait for the write in hand."""
        if self._thread is not None:
            self._thread.shutdown()
