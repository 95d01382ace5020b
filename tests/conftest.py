"""Workers that run side by side (`make test`) share no cache and do not fight for the cores; tests share no state."""

import atexit
import os
import shutil
import sys
import tempfile

import pytest

# Before anything imports torch, transformers or datasets, which read these once. Processes of a test inherit them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hsvlt-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_accelerate_state():
    """accelerate keeps its state for the process; each test, like each command, gets one of its own."""
    reset_accelerate()  # what a fixture of the module left
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
        state.PartialState._reset_state()
