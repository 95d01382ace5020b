"""A process that is struck at its n-th file event: the same moment on every machine, fast or slow.

A file event is whatever Python tells its audit hooks before it opens a file to write, makes, links, renames or removes
something, changes its mode or exchanges two folders (renameat2, which is looked up before), and a sync. Paths that
libraries open in code of their own (safetensors, Arrow) are not seen; what comes before and after them is.
"""

import errno
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Position of the path, and of the descriptor of the folder that a bare name is in.
_EVENTS = {
    "open": (0, None), "os.mkdir": (0, 2), "os.rename": (0, 2), "os.remove": (0, 1), "os.rmdir": (0, 1),
    "os.link": (1, 3), "os.symlink": (1, 2), "os.chmod": (0, 2), "os.truncate": (0, None),
}  # fmt: skip
_TAKES_ROOM = {"open", "os.mkdir", "os.link", "os.symlink", "sync"}


@dataclass(frozen=True)
class Strike:
    """What strikes, at which event of those in `folder`.

    Args:
        how: "kill", the process with its data workers; "interrupt", SIGINT; "full", from then on nothing more can be
            written; "" only writes the events down.
        at: counted from 1.
        in_save: count only while a checkpoint is being written, which begins with making its `.NAME.new`.
        seen: file to write the events to, one a line.
    """

    folder: Path
    how: str = ""
    at: int = 0
    in_save: bool = False
    seen: Path | None = None

    def install(self) -> None:
        """In this process, for good; not in those that it forks."""
        process, inside, count, folder = os.getpid(), False, 0, str(self.folder)
        seen = None if self.seen is None else os.open(self.seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        last = ""

        def happens(event: str, path: str) -> None:
            nonlocal inside, count
            if not path.startswith(folder) or os.getpid() != process:
                return
            was_inside, inside = inside, inside or (event == "os.mkdir" and path.endswith(".new"))
            if self.in_save and not (was_inside and is_saving(self.folder)):
                return
            count += 1
            if seen is not None:
                os.write(seen, f"{event} {path}\n".encode(errors="surrogateescape"))
            if self.how == "kill" and count == self.at:
                os.killpg(0, signal.SIGKILL)
            elif self.how == "interrupt" and count == self.at:
                os.kill(process, signal.SIGINT)
            elif self.how == "full" and count >= self.at and event in _TAKES_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        def hook(event: str, arguments: tuple) -> None:
            nonlocal last
            if event == "ctypes.dlsym" and arguments[1] == "renameat2":
                happens("exchange", last)
            elif event in _EVENTS:
                position, beside = _EVENTS[event]
                if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _OPENS_TO_WRITE):
                    return
                path = _absolute(arguments[position], arguments[beside] if beside is not None else -1)
                if path is not None:
                    last = path if path.startswith(folder) else last
                    happens(event, path)

        plain = os.fsync

        def fsync(descriptor) -> None:
            happens("sync", os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else -1}"))
            plain(descriptor)

        os.fsync = fsync
        sys.addaudithook(hook)


def _absolute(path, folder: int) -> str | None:
    if isinstance(path, int):
        return None
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


def is_saving(run: Path) -> bool:
    """Whether a folder is being written there, or replaced; still so after a kill."""
    return run.is_dir() and any(
        entry.name.endswith((".new", ".old")) and entry.is_dir(follow_symlinks=False) for entry in os.scandir(run)
    )


def events_of(path: Path) -> list[str]:
    return path.read_text(errors="surrogateescape").splitlines()


def saves(events: list[str]) -> list[int]:
    """At which event each save of a checkpoint begins."""
    begins = {}
    for number, event in enumerate(events, start=1):
        if event.startswith("os.mkdir ") and ".checkpoint-" in event and event.endswith(".new"):
            begins.setdefault(event, number)
    return list(begins.values())


def spread(total: int, count: int) -> list[int]:
    """`count` numbers from 1 to `total`, as far from each other as can be; each once."""
    return sorted({1 + number * (total - 1) // max(count - 1, 1) for number in range(count)}) if total else []
