"""One process at a time in a folder that is read, and then replaced."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps two runs out of one folder; it ends with the process that holds it, however that ends.

    Taken alone (`alone=True`) it fails where any other process holds it; shared, it waits for one that has it alone.
    Workers that are forked later do not hold it. The folder is made if there is none.
    """

    def __init__(self, folder: Path):
        self.folder, self._alone = folder, False
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link laid there leads elsewhere
        self._file = os.fdopen(os.open(folder / LOCK_FILE, flags, 0o666), "a+b")

    def take(self, *, alone: bool) -> None:
        """
        Raises:
            BlockingIOError: another process has it.
        """
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        path, held = self.folder / LOCK_FILE, os.fstat(self._file.fileno()).st_ino
        if alone and (not path.exists() or path.stat().st_ino != held):
            raise BlockingIOError  # whoever had it has just replaced the folder, or taken its lock away
        self._alone = alone

    def release(self) -> None:
        """Give it back; one that was held alone leaves no trace."""
        if self._alone:
            self._alone = False
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            if self._made:
                with suppress(OSError):
                    self.folder.rmdir()  # only where it is empty
        self._file.close()


def run_folder(folder: Path) -> Path:
    """The folder whose lock guards `folder`: that of the run, where it is a run's checkpoint."""
    folder = folder.resolve()
    return folder.parent if (folder.parent / "config.yaml").exists() else folder


def rewrite(checkpoint: str, what: str, work: Callable[[Path, Accelerator], Any]) -> Any:
    """What `work` returns for the folder of a checkpoint, in which it alone writes; every process calls this.

    Args:
        what: Is to be written there, in words.

    Raises:
        FileNotFoundError: no folder of a checkpoint.
        ValueError: another process trains there, or changes it.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a checkpoint; {what}, so download a checkpoint of the Hub first."
        )
    accelerator = Accelerator()
    with locked(run_folder(folder), accelerator):
        done = work(folder, accelerator)
    accelerator.end_training()
    return done


def check_launch(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: the launcher started several processes that do not know of each other, and would all write.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {started} processes, and this one is one of {accelerator.num_processes}: on a CPU, "
            "set ACCELERATE_USE_CPU=true before `accelerate launch`, as training/configs/accelerate/"
            "cpu_two_processes.yaml says."
        )


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of a folder, from before anything in it is read; every process calls this.

    Raises:
        ValueError: another process trains there, or changes a checkpoint; or of `check_launch`.
    """
    check_launch(accelerator)
    lock, problem = None, [None]
    if accelerator.is_main_process:
        try:
            lock = FolderLock(folder)
            lock.take(alone=True)
        except BlockingIOError:
            problem = [f"Another process works in {folder}; wait for its end, or choose another folder."]
        except OSError as error:
            problem = [f"{folder} cannot be written to: {error}"]
    try:
        (words,) = broadcast_object_list(problem)
        if words is not None:
            raise ValueError(words)
        yield
    finally:
        if lock is not None:
            lock.release()
