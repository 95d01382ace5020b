"""Workers that run side by side (`make test`) share no cache and do not fight for the cores."""

import atexit
import os
import shutil
import tempfile

# Before anything imports torch, transformers or datasets, which read these once. Processes of a test inherit them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hsvlt-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
