"""Commands that can be killed often: forks of a server that has imported everything, each a process of its own.

Only the seconds of importing are saved; the processes, their signals, files and connections are real ones.
"""

import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .strikes import Strike

SERVER = multiprocessing.get_context("forkserver")
LATE = ("loop.setup", "loop.fit", "loop.finish", "tagging.run", "publish.hub")  # what commands import as they need it
SERVER.set_forkserver_preload([*(f"training.{module}" for module in LATE), "kornia.augmentation"])


def _run(
    main: str, argv: list[str], environment: dict[str, str], output: str, file_limit: int | None, strike: Strike | None
) -> None:
    os.setsid()  # so that its data workers die with it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where this runs in the background
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, which would import everything again
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if strike is not None:
        strike.install()
    sys.exit(importlib.import_module(main).main(argv))


class Command:
    """`main(argv)` of a module on `processes` CPU processes, started as `torchrun` would start them.

    A strike is for the first of them.
    """

    def __init__(
        self,
        main: str,
        argv: list[str],
        output: Path,
        processes: int = 1,
        *,
        file_limit: int | None = None,
        strike: Strike | None = None,
    ):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.output = output
        self._ranks = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            if processes > 1:
                environment |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            arguments = (main, argv, dict(environment), str(output), file_limit, None if rank else strike)
            process = SERVER.Process(target=_run, args=arguments)
            process.start()
            self._ranks.append(process)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self._ranks)

    def signal(self, number: int) -> None:
        """To every process and its data workers, as a batch system sends it."""
        for process in self._ranks:
            os.killpg(process.pid, number)

    def kill(self) -> list[int]:
        """SIGKILL to every process and its data workers; exit statuses, of those too that had ended."""
        for process in self._ranks:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet a group of its own, or gone
                process.kill()
        for process in self._ranks:
            process.join()
        return [process.exitcode for process in self._ranks]

    def wait_for_first(self, seconds: float = 600) -> None:
        """Until the first process ends, for which a strike is."""
        self._ranks[0].join(seconds)

    def wait(self, seconds: float = 600) -> list[int]:
        """Exit statuses; a run that is not over by then is killed and raises."""
        until = time.monotonic() + seconds
        for process in self._ranks:
            process.join(max(until - time.monotonic(), 0.01))
        if any(process.is_alive() for process in self._ranks):
            self.kill()
            raise TimeoutError(f"The run did not end within {seconds:.0f} s:\n{self.tail()}")
        return [process.exitcode for process in self._ranks]

    def wait_until(self, reached: Callable[[], bool], interval: float = 0.01, seconds: float = 600) -> bool:
        """Whether `reached()` came true while the run was alive."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            if reached():
                return True
            time.sleep(interval)
        return False

    def tail(self, characters: int = 3000) -> str:
        return self.output.read_text(errors="replace")[-characters:] if self.output.exists() else ""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
