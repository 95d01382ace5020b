"""What is where on this machine: the files that the package brings, runs, and how many cores there are."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path


def shipped(name: str) -> Path:
    """The folder `model_cards` or `space`: beside this one in a checkout, in it where the package is installed."""
    here = Path(__file__).parent
    return here / name if (here / name).is_dir() else here.parent / name


def user_cache() -> Path:
    """The user's cache folder for what this package computes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hsvlt"


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by their short names."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("configs").glob("*.yaml"))}


def checkpoint_folder(text: str) -> str:
    """A checkpoint as it was named, or best/ of the run that it names.

    Raises:
        FileNotFoundError: a run that has no checkpoint yet.
    """
    folder = Path(text)
    if not folder.is_dir() or (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return text
    if not (folder / "best").is_dir():
        raise FileNotFoundError(f"{text} is a run without best/, which the end of its first epoch makes.")
    return str(folder / "best")


def run_of(checkpoint: str | Path) -> Path:
    """The run whose best/ a checkpoint is; else the checkpoint."""
    folder = Path(checkpoint)
    return folder.parent if folder.name == "best" else folder


def last_run() -> str:
    """The checkpoint that was written last among those of the runs below runs/.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path.parent for path in Path("runs").glob("**/best/config.json")]
    if not found:
        raise FileNotFoundError("There is no run below runs/ in this folder: name a checkpoint, or train one first.")
    return str(max(found, key=lambda folder: (folder / "config.json").stat().st_mtime))


def cores() -> int:
    """Cores that this process may use: of the machine, of its affinity, and of its container's share."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def native_precision() -> str:
    """The 16 bits that this machine has instructions for, `bf16` or `fp16`; else `no`: emulated ones take longer."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if cpu and not torch.backends.mps.is_available() else "no"


def free_cores() -> int:
    """Processes that may decode images beside one that computes: its share of the cores, less one; at most 8."""
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def keep_freed_memory() -> None:
    """From now on large blocks that are freed stay with this process, for the next of their size (glibc alone).

    By default glibc gives each back to the system, and every step takes fresh pages again: 4.0 of 50 CPU seconds of
    training the nano preset, now 1.2; and 37 ms an image of EfficientNet-Lite0 in batches of 8, now 20.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: below it, a block comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what the heap may keep at its end
