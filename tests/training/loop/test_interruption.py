"""Signals become a request; a second one, or too long a time, becomes an end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader

from training.data.batches import leave_signals_to_parent
from training.loop.interruption import StopRequest

from ...forked import forked


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_remembered_and_the_handler_is_given_back(name):
    before = signal.getsignal(getattr(signal, name))
    with StopRequest(60) as stop:
        assert stop.signal is None
        signal.raise_signal(getattr(signal, name))
        assert stop.signal == name
        signal.raise_signal(signal.SIGINT)  # a launcher passes on what the terminal has sent already
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_signal_some_seconds_later_interrupts(monkeypatch):
    monkeypatch.setattr("training.loop.interruption.FORWARDED_WITHIN", 0.0)
    with pytest.raises(KeyboardInterrupt), StopRequest(60):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)


def test_a_worker_that_inherits_the_handler_does_nothing_with_it():
    with StopRequest(60) as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(3 if stop.signal is None else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_process_that_does_not_get_done_ends_within_the_bound():
    code = (
        "import signal, time\nfrom training.loop.interruption import StopRequest\n"
        "with StopRequest(0.2):\n    signal.raise_signal(signal.SIGTERM)\n    time.sleep(60)"
    )
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and "not done 0.2 seconds after SIGTERM (stop_timeout)" in ended.stderr
    assert time.monotonic() - start < 30


def read_while_the_group_is_signalled():
    os.setsid()
    loader = DataLoader(range(40), num_workers=2, worker_init_fn=leave_signals_to_parent, prefetch_factor=1)
    with StopRequest(60) as stop:
        for number, _ in enumerate(loader):
            if number == 3:
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.3)
        assert stop.signal == "SIGTERM" and number == 39


def test_workers_survive_a_signal_to_the_whole_group():
    """As a batch system or a terminal sends it; the loader would raise in the middle of a step."""
    ended = forked(read_while_the_group_is_signalled)
    assert ended.returncode == 0, ended.stderr
