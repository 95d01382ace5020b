"""Which checkpoints a run has, which of them are good, and which may go."""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from .atomic import move_aside, recover
from .folder import CheckpointError, verify
from .lock import LOCK_FILE

SET_ASIDE = ".overwritten-"


def recover_run(folder: Path) -> None:
    """Undo whatever a killed run left half done in its folder: best/ is brought back, unfinished folders go."""
    recover(folder / "best")
    for unfinished in folder.glob(".*.new"):
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink()


def holds_files(folder: Path) -> bool:
    """Whether there is anything in a run's folder but its lock and what an overwriting run set aside."""
    return any(not _is_aside(path) for path in folder.iterdir())


def set_aside(folder: Path) -> None:
    """Move all that a run left into a folder within its own, for another run to begin there.

    The folder itself stays, which may be a link, a mount point, or watched by somebody.

    Raises:
        OSError: something cannot be moved, a mount point for example; then all is where it was.
    """
    if holds_files(folder):
        aside = Path(tempfile.mkdtemp(prefix=SET_ASIDE, dir=folder))
        for path in [path for path in folder.iterdir() if not _is_aside(path)]:
            try:
                path.rename(aside / path.name)
            except OSError as error:
                for moved in aside.iterdir():
                    moved.rename(folder / moved.name)
                aside.rmdir()
                raise OSError(
                    f"{path} cannot be moved aside ({error.strerror}), so nothing was: choose another --output_dir."
                ) from error


def remove_set_aside(folder: Path) -> None:
    """Remove what `set_aside` moved, once the run that took its place has something whole."""
    for aside in folder.glob(f"{SET_ASIDE}*"):
        shutil.rmtree(aside, ignore_errors=True)


def _is_aside(path: Path) -> bool:
    return path.name == LOCK_FILE or path.name.startswith(SET_ASIDE)


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
            aside = move_aside(damaged, "damaged")
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
