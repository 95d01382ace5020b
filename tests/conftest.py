"""Workers that run side by side (`make test`) share no cache and do not fight for the cores; tests share no state."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from .fresh import python

ROOT = Path(__file__).parents[1]
PACKED = ("modeling_hsvlt", "training", "model_cards", "space")

# Before anything imports torch, transformers or datasets, which read these once. Processes of a test inherit them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hsvlt-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    # Files with long tests first, or a worker would wait for another's last one.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def has_cuda() -> bool:
    import torch  # not before it is known that a test needs it

    return torch.cuda.is_available()


# What is imported lives until the end: a collector that looks through it again and again takes minutes in all.
gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


# A test's files need not outlive a loss of power; a checkpoint's twenty take a tenth of a second to reach the disk.
os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def own_accelerate_state():
    """accelerate keeps its state for the process; each test, like each command, gets one of its own."""
    reset_accelerate()  # what a fixture of the module left
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def own_threads():
    """Commands set how many threads torch takes; with two in each worker, all that comes after waits for the cores."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    yield
    if torch:
        torch.set_num_threads(threads)


def reset_accelerate() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
        state.PartialState._reset_state()


@dataclass
class Wheel:
    """The package as it is installed: `site` holds what the wheel `file` brings, `bin/hsvlt` included."""

    file: Path
    site: Path

    def run(self, *command, folder: Path, status: int = 0, **environment) -> subprocess.CompletedProcess:
        """Runs `python *command` in `folder`, away from the checkout, with the installed package."""
        added = {name: str(value) for name, value in environment.items()}
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1", **added}
        ran = python(*command, cwd=folder, env=environment)
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran

    def hsvlt(self, *arguments, folder: Path, status: int = 0) -> subprocess.CompletedProcess:
        return self.run(self.site / "bin" / "hsvlt", *arguments, folder=folder, status=status)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Wheel:
    """Built once, also for workers that run side by side."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "wheel"
    with FileLock(f"{shared}.lock"):
        if not (shared / "site" / "bin" / "hsvlt").exists():
            source = shared / "source"  # building leaves files beside the sources
            source.mkdir(parents=True)
            for name in (
                "pyproject.toml",
                "README.md",
                "LICENSE",
                "modeling_hsvlt",
                "training",
                "model_cards",
                "space",
            ):
                os.symlink(ROOT / name, source / name)
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", shared, source]
            subprocess.run([*pip, *build], check=True)
            install = ["install", "--no-deps", "--target", shared / "site", *shared.glob("*.whl")]
            subprocess.run([*pip, *install], check=True)
    return Wheel(next(shared.glob("*.whl")), shared / "site")
