"""SIGINT and SIGTERM end a run between two steps, with everything saved, and not in the middle of one."""

import os
import signal
import sys
import threading
import time

FORWARDED_WITHIN = 3.0  # seconds: launchers pass on a signal that the terminal has sent to their processes as well


class Stopped(Exception):  # noqa: N818 (no error: it was asked for)
    """The run was asked to stop, and has come to a place where it can."""


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM is remembered in `signal`, the name of it.

    A second one, some seconds later, raises KeyboardInterrupt at once. Where the program has not left the block
    `seconds` after the first, the process ends with exit status 1: whoever sent the signal is going to kill it anyway,
    and the checkpoints on disk are whole at any moment.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.signal: str | None = None
        self._since = 0.0
        self._timer: threading.Timer | None = None
        self._previous: dict = {}

    def __enter__(self):
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # Python gives no other thread signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _remember(self, number, frame) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which its parent ends
            return
        if self.signal is not None:
            if time.monotonic() - self._since > FORWARDED_WITHIN:
                raise KeyboardInterrupt
            return
        self.signal, self._since = signal.Signals(number).name, time.monotonic()
        self._timer = threading.Timer(self.seconds, self._leave)
        self._timer.daemon = True
        self._timer.start()

    def _leave(self) -> None:
        print(
            f"error: not done {self.seconds:g} seconds after {self.signal} (stop_timeout); the last checkpoint stays.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
