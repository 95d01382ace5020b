"""What strikes at a counted file event strikes there: `make crash-test` rests on it."""

import os
import random
import signal
from pathlib import Path

import pytest

from training.checkpoint.atomic import atomic_folder, write_file

from .crash.__main__ import kill_often, not_inside
from .crash.strikes import Strike, events_of, is_saving, saves, spread
from .forked import forked


def work(folder: Path, strike: Strike) -> int:
    os.setsid()  # a kill is of the whole group
    signal.signal(signal.SIGINT, signal.default_int_handler)
    strike.install()
    try:
        write_file(folder / "one.txt", "1")
        with atomic_folder(folder / "checkpoint-3") as new:
            (new / "weights").write_text("3")
        write_file(folder / "two.txt", "2")
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return error.errno
    return 0


@pytest.fixture
def events(tmp_path):
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    assert forked(work, folder, Strike(folder, seen=tmp_path / "events")).returncode == 0
    return [event.replace(str(folder), "RUN") for event in events_of(tmp_path / "events")]


def test_events_are_written_down_in_their_order(events):
    kinds = [event.split(" ")[0] for event in events]
    assert kinds[:4] == ["open", "sync", "os.rename", "sync"]  # of write_file
    assert [events[number - 1] for number in saves(events)] == ["os.mkdir RUN/.checkpoint-3.new"]
    assert "open RUN/.checkpoint-3.new/weights" in events and "os.rename RUN/.checkpoint-3.new" in events


@pytest.mark.parametrize(("how", "status"), [("kill", 9), ("interrupt", 130), ("full", 28)])
def test_a_strike_is_at_its_event(events, tmp_path, how, status):
    at = 1 + events.index("open RUN/.checkpoint-3.new/weights")
    folder = tmp_path / "struck"
    folder.mkdir()
    assert forked(work, folder, Strike(folder, how, at)).returncode == status
    assert (folder / "one.txt").exists() and not (folder / "two.txt").exists()
    assert not (folder / "checkpoint-3").exists() and is_saving(folder) == (how == "kill")


def test_a_kill_in_a_save_is_in_one_wherever_it_is_meant_to_be(events, tmp_path):
    inside = [event for event in events if ".checkpoint-3.new" in event]
    for at in spread(len(inside) - 4, 3):  # what makes the folder is counted no more than what follows its renaming
        folder = tmp_path / str(at)
        folder.mkdir()
        assert forked(work, folder, Strike(folder, "kill", at, in_save=True)).returncode == 9
        assert is_saving(folder)


def test_spread():
    assert spread(10, 4) == [1, 4, 7, 10] and spread(2, 5) == [1, 2] and spread(0, 3) == [] and spread(7, 1) == [1]


class FinishedBefore:
    """A bench whose runs, as many as `early`, come to their end before they are hit."""

    def __init__(self, folder: Path, early: int):
        self.folder, self.early = folder, early
        (folder / "whole").mkdir()

    def reference(self, processes):
        return self.folder / "whole"

    def events(self, processes):
        return [f"os.mkdir RUN/.checkpoint-{number}.new" for number in (3, 6)]

    def start(self, run, processes, strike=None):
        self.run, self.strike = run, strike
        return self

    def wait_for_first(self):
        pass

    def wait_until(self, reached):
        pass

    def kill(self):
        self.early -= self.strike is not None
        self.run.mkdir(exist_ok=True)
        if self.strike is not None and self.early >= 0:
            (self.run / "results.json").write_text("{}")
            return [0, -signal.SIGKILL]
        if self.strike is not None:
            assert not (self.run / "results.json").exists(), "a run that begins"
            (self.run / ".checkpoint-3.new").mkdir()
        return [-signal.SIGKILL] * 2

    def finish(self, run, processes):
        pass

    def same_end(self, run, processes):
        return True


@pytest.mark.parametrize("early", [0, 2])
def test_a_kill_is_not_counted_until_it_hits_a_run(tmp_path, monkeypatch, early):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    some = kill_often(FinishedBefore(tmp_path, early), 2, 3, random.Random(0))
    assert some == (3, 1, [], True) and not_inside(some) == []


def test_a_run_that_is_never_hit_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(AssertionError, match="came to their end before kill 3 of 3"):
        kill_often(FinishedBefore(tmp_path, 99), 2, 3, random.Random(0))
