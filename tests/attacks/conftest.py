"""What the attacks start from. They use commands and files alone, so that they can be tried on an older commit."""

import importlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ..training.tiny_checkpoint import save_checkpoint, save_images
from ..training.tiny_run import write_recipe


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    from training.train import main

    folder = tmp_path_factory.mktemp("attacked")
    assert main([write_recipe(folder), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of a finished run."""
    run = tmp_path / "run"
    shutil.copytree(finished_once, run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(finished_once), str(run)))
    return run


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "checkpoint")
    save_images(folder / "photos")
    return folder


@pytest.fixture
def checkpoint(saved_once, tmp_path):
    return shutil.copytree(saved_once / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def photos(saved_once, tmp_path):
    return shutil.copytree(saved_once / "photos", tmp_path / "photos")


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def killed_at(monkeypatch, name):
    """Training is interrupted where it would begin to `fit` or `finish`."""

    def killed(run):
        raise KeyboardInterrupt

    for module in (importlib.import_module(f"training.loop.{name}"), importlib.import_module("training.train")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, killed)


@contextmanager
def held_by_another(folder):
    """Another process works in a folder."""
    hold = f"import fcntl; f = open({str(folder / '.lock')!r}, 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate(b"\n")
        (folder / ".lock").unlink(missing_ok=True)


def files(folder):
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """A Ctrl-C of a test that old code lets through fails that test, in place of ending them all (`make attacks`)."""
    try:
        return (yield)
    except KeyboardInterrupt as error:
        if "ATTACKS" not in os.environ:
            raise
        raise AssertionError("Ctrl-C was not caught") from error
