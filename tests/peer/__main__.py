"""transformers' own tests, run against our models: `make peer-test`, or `python -m tests.peer [pytest's options]`.

Downloads the source distribution of the transformers that is installed, once, to `build/`. Fails on a failure that
`not_applicable.py` does not list, on an entry there that has become stale, and on another number of skipped tests than
pinned there. With options, such as `-k save_load`, the numbers are not compared.
"""

import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

# Before transformers is imported: skips must not depend on the machine.
os.environ.update(
    TRANSFORMERS_TEST_DEVICE="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", RUN_SLOW="0"
)

import pytest  # noqa: E402

from . import upstream  # noqa: E402
from .not_applicable import NOT_APPLICABLE, SKIPPED  # noqa: E402


class Tally:
    """Outcomes by tester."""

    def __init__(self):
        self.outcomes = defaultdict(dict)  # tester -> test -> outcome

    def pytest_runtest_logreport(self, report):
        _, tester, test = report.nodeid.split("::")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[tester][test] = report.outcome


def main(argv: list[str]) -> int:
    upstream.unpack()
    tally, start = Tally(), time.monotonic()
    files = [str(path) for path in sorted(Path(__file__).parent.glob("peer_*.py"))]
    # The markers of upstream are its own.
    options = ["-o", "addopts=", "-q", "--timeout=300", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", "-W", "ignore"]
    failed = pytest.main([*files, *options, *argv], plugins=[tally]) != 0
    print(f"\ntransformers {upstream.VERSION}, {time.monotonic() - start:.0f} s")
    for tester, outcomes in sorted(tally.outcomes.items()):
        counts = Counter(outcomes.values())
        line = f"{tester:24} {counts['passed']:4} passed {counts['failed']:4} failed {counts['skipped']:4} skipped"
        if not argv and counts["skipped"] != SKIPPED.get(tester):
            failed = True
            line += f", but not_applicable.py says {SKIPPED.get(tester)}"
        print(line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
