"""transformers' own tests, run against our models: `make peer-test`, or `python -m tests.peer [pytest's options]`.

Downloads the source distribution of the transformers that is installed, once, to `build/`. Fails on a failure that
`not_applicable.py` does not list, on an entry there that has become stale, and on another number of skipped tests than
pinned there. With options, such as `-k save_load`, neither entries nor numbers are compared.
"""

import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

# Before transformers is imported: which tests are skipped must not depend on the machine.
os.environ.update(
    TRANSFORMERS_TEST_DEVICE="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", RUN_SLOW="0"
)

import pytest

from . import upstream
from .not_applicable import NOT_APPLICABLE, SKIPPED


class Tally:
    """Outcomes by tester, and what the skipped tests say."""

    def __init__(self):
        self.outcomes, self.reasons = defaultdict(dict), []  # tester -> test -> outcome

    def pytest_runtest_logreport(self, report):
        _, tester, test = report.nodeid.split("::")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[tester][test] = report.outcome
        if report.skipped:
            self.reasons.append(str(report.longrepr))

    def contradictions(self) -> list[str]:
        """Where the run disagrees with `not_applicable.py`."""
        skips = {tester: Counter(outcomes.values())["skipped"] for tester, outcomes in self.outcomes.items()}
        wrong = [
            f"{tester} skips {skips.get(tester)} tests, not {SKIPPED.get(tester)}"
            for tester in sorted(skips.keys() | SKIPPED.keys())
            if skips.get(tester) != SKIPPED.get(tester)
        ]
        unused = [entry for entry in NOT_APPLICABLE if not any(str(entry) in reason for reason in self.reasons)]
        return wrong + [f"no test fails as {entry}" for entry in unused]


def main(argv: list[str]) -> int:
    upstream.unpack()
    tally, start = Tally(), time.monotonic()
    files = [str(path) for path in sorted(Path(__file__).parent.glob("peer_*.py"))]
    # Without the project's own options, which refuse markers that are upstream's.
    options = ["-o", "addopts=", "-q", "--timeout=300", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
    status = pytest.main([*files, *options, "-W", "ignore", *argv], plugins=[tally])
    wrong = [] if argv else tally.contradictions()
    print(f"\ntransformers {upstream.VERSION}, {time.monotonic() - start:.0f} s")
    for tester, outcomes in sorted(tally.outcomes.items()):
        counts = Counter(outcomes.values())
        print(f"{tester:24} {counts['passed']:4} passed {counts['failed']:4} failed {counts['skipped']:4} skipped")
    for line in wrong:
        print(f"not_applicable.py: {line}")
    return int(status != 0 or bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
