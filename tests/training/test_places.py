"""Runs and checkpoints are found by the names that a user has for them."""

import os
import platform
import resource

import pytest
import torch

from training import evaluate, tag
from training.check_data import CheckOptions
from training.options import CommandParser, ScoringOptions, command
from training.places import checkpoint_folder, last_run, run_of

from ..forked import forked


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old", "deeper/older")):
        best = tmp_path / "runs" / name / "best"
        best.mkdir(parents=True)
        (best.parent / "config.yaml").touch()
        (best / "config.json").touch()
        os.utime(best / "config.json", (1000 - age, 1000 - age))
    return tmp_path / "runs"


def test_a_run_stands_for_its_best_checkpoint(runs):
    assert checkpoint_folder("runs/new") == checkpoint_folder("runs/new/") == "runs/new/best"
    assert checkpoint_folder("runs/new/best") == "runs/new/best"
    assert checkpoint_folder("org/name") == "org/name"
    assert CommandParser(ScoringOptions).read(["runs/new", "photos"]).checkpoint == "runs/new/best"


def test_a_run_without_a_checkpoint_says_so(runs, capsys):
    (runs / "begun").mkdir()
    (runs / "begun" / "config.yaml").touch()
    for module in (evaluate, tag):
        assert module.main(["runs/begun", "photos", "target"][: 2 if module is evaluate else 3]) == 2
        assert "error: runs/begun is a run without best/" in capsys.readouterr().err


def test_the_last_run_is_the_one_whose_checkpoint_is_newest(runs):
    assert last_run() == "runs/new/best"
    os.utime(runs / "deeper" / "older" / "best" / "config.json", (2000, 2000))
    assert last_run() == "runs/deeper/older/best"
    assert str(run_of(last_run())) == "runs/deeper/older"


def test_no_run_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no run below runs/"):
        last_run()


def print_faults():
    """Page faults of twenty tensors of 16 MiB, one after the other, as they come and in a command."""
    a_command = command(lambda options: None, CheckOptions, "check", None)
    for setting in (lambda: None, lambda: a_command(["data"])):
        setting()
        torch.ones(2**22)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**22)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_commands_take_freed_memory_again():
    plain, kept = map(int, forked(print_faults).stdout.split())
    assert plain > 20 * 100 > 1000 > kept  # a page is 4 KiB, or 64 elsewhere
