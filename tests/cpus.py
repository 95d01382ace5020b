"""The numerical tests as on other CPUs: `make test-cpus`. Prints a line for each setting; 1 if any of them failed.

Which instructions torch and MKL use, and on how many threads, decides the order in which numbers are added up, and so
the last digits of every output. The last line disturbs them at random (`tests/other_rounding.py`), since the CPUs that
others have cannot all be imitated here.
"""

import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from training.places import cores

ROOT = Path(__file__).parents[1]
# Whatever runs a model or compares what one gave, in this process and in seconds.
FILES = [
    *sorted(path.name for path in Path(__file__).parent.glob("test_modeling_*.py")),
    *("test_convnext_in_rows.py", "test_label_context.py", "test_label_contract.py", "test_label_prompts.py"),
    *("test_losses_multilabel.py", "test_pipeline_multilabel.py"),
    *("training/loop/test_fsdp.py", "training/loop/test_optim.py"),
    *("training/metrics", "training/models", "training/scoring"),
]
# A compiler's kernels and a published size take seconds each, and what one machine repeats says nothing of another.
LEFT_OUT = ("-m", "not slow and not one_machine", "-k", "not compile and not published and not export")
CAPABILITIES = ("default", "avx2", None)
MKL = ("AVX2", None)
THREADS = (1, 2, 4)


def run(capability: str | None, mkl: str | None, threads: int, *options: str) -> bool:
    """Runs the tests with these settings (None: the machine's own) and prints their line; whether all passed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for name, value in (("ATEN_CPU_CAPABILITY", capability), ("MKL_ENABLE_INSTRUCTIONS", mkl)):
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    workers = max(1, min(8, cores() // threads))  # more would fight for the cores
    command = [sys.executable, "-m", "pytest", *LEFT_OUT, "-n", str(workers), "-p", "no:cacheprovider", "--tb=short"]
    start = time.monotonic()
    files = [str(Path("tests") / file) for file in FILES]
    done = subprocess.run([*command, *options, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - start
    summary = done.stdout.strip().rpartition("\n")[2]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", summary)}
    settings = f"torch {capability or 'own':8}MKL {mkl or 'own':5}{threads} thread{'s' * (threads > 1)}"
    passed, failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
    how = "  last digits disturbed" if options else ""
    print(f"{settings:32}{passed:5} passed {failed:3} failed {seconds:5.0f} s{how}", flush=True)
    if done.returncode:
        print(done.stdout[-6000:] + done.stderr[-2000:], flush=True)
    return done.returncode == 0


def main() -> int:
    every = [run(*setting) for setting in product(CAPABILITIES, MKL, THREADS)]
    every.append(run(None, None, 1, "-p", "tests.other_rounding"))
    return 0 if all(every) else 1


if __name__ == "__main__":
    sys.exit(main())
