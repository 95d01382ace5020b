"""Functions in processes of their own, without the seconds that each would take to import what training needs.

They are forked from a process that imported once and ran nothing: a fork of pytest itself, whose thread pools have run,
can hang.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("accelerate.commands.launch", "datasets", "kornia.augmentation", "pytest", "sklearn.metrics"),
        *("training.evaluate", "training.loop.finish", "training.loop.fit", "training.loop.setup", "training.tag"),
        *("training.tagging.loop", "training.report.page", "transformers.trainer"),
    ]
)


@dataclass
class Ended:
    """Of all processes together; the status is the largest."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> str:
    """For `--main_process_port`: by default every launch takes 29500, also that of a test in another worker."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def forked(function: Callable, *arguments, processes: int = 1, timeout: float = 300, **environment: str) -> Ended:
    """`function(*arguments)`, of a module's top level, in so many processes that know of each other as a launcher's do.

    What it returns, if it is a number, is the status of its process.
    """
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", **environment}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
        environment |= {"LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        started = [
            SERVER.Process(
                target=_run, args=(function, arguments, environment, rank if processes > 1 else None, folder)
            )
            for rank in range(processes)
        ]
        end = time.monotonic() + timeout
        for process in started:
            process.start()
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        for process in started:
            process.kill()
            process.join()
        stdout, stderr = (
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"{name}-*"))) for name in ("out", "err")
        )
        return Ended(max(abs(process.exitcode) for process in started), stdout, stderr)


def _run(function: Callable, arguments: tuple, environment: dict, rank: int | None, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}-{rank or 0}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ |= environment
    os.fsync = lambda descriptor: None  # as in conftest.py
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    multiprocessing.set_start_method(None, force=True)  # workers of a loader start as in any command
    import torch

    torch.set_num_threads(1)
    status = function(*arguments)
    sys.exit(status if isinstance(status, int) else 0)
