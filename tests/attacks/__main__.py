"""Every kind of attack, and whether it succeeded before its fix: `make attacks`, or `python -m tests.attacks`.

Runs the tests of this folder on the code as it is, and on that of an older commit, in a worktree of its own, so it
needs the whole history. A line a kind: on how many variants of it the old code failed, and the code as it is. The exit
status is 0 when all ran and nothing fails now; kinds that never succeeded are named.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEFORE = "b3e60ec"  # the last commit without any of the fixes
MEMORY = 12 * 2**30
TAKEN_ALONG = ("tests/attacks", "tests/conftest.py", "tests/fresh.py", "tests/loopback_hub.py")


def _limit_memory() -> None:
    """What some attacks make old code allocate would take the machine down."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run(root: Path, chosen: list[str]) -> dict[str, list[bool]]:
    """For each kind, whether each variant of it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/attacks", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # A test that hangs, or takes its process down, fails, and the next begins.
        command += ["--timeout=300", "--timeout-method=signal", "-n", "2", "--max-worker-restart=1000", *chosen]
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "TQDM_DISABLE": "1", "ATTACKS": "1"},
            preexec_fn=_limit_memory,
            capture_output=True,
        )
        if not report.is_file():
            raise SystemExit(f"pytest died in {root}: {done.stdout.decode()[-2000:]}")
        kinds = defaultdict(list)
        for case in ET.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                name = case.get("name").partition("[")[0].removeprefix("test_").replace("_", " ")
                kinds[name].append(case.find("failure") is not None or case.find("error") is not None)
    return kinds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help=f"commit to compare with; default: {BEFORE}")
    parser.add_argument("-k", help="only the attacks that this chooses, as pytest's -k")
    args = parser.parse_args(argv)
    chosen = ["-k", args.k] if args.k else []
    known = ["git", "rev-parse", "--quiet", "--verify", f"{args.before}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, capture_output=True).returncode:
        print(
            f"error: there is no commit {args.before} here to compare with; get the whole history with `git fetch "
            "--unshallow`, or run the attacks on the code as it is: pytest tests/attacks.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch) / "before"
        try:
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", old, args.before], cwd=ROOT, check=True)
            for name in TAKEN_ALONG:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, old / name, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / name, old / name)
            before = run(old, chosen)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    now = run(ROOT, chosen)
    print(f"{'failed at ' + args.before:>18}{'fails now':>11}  kind")
    for kind, failed in now.items():
        print(f"{sum(before.get(kind, [])):>10} of {len(failed):<4}{sum(failed):>6} of {len(failed):<2}  {kind}")
    held = [kind for kind in now if kind in before and not any(before[kind])]
    not_run = [kind for kind in now if kind not in before]
    fails = [kind for kind, failed in now.items() if any(failed)]
    if held:
        print(f"held before as well: {', '.join(held)}")
    succeeded = len(now) - len(held) - len(not_run)
    print(
        f"attacks: {len(now)} kinds, {sum(map(len, now.values()))} variants; succeeded before: {succeeded}; "
        f"succeed now: {len(fails)}"
    )
    if not_run:
        print(f"not run on {args.before}: {', '.join(not_run)}")
    return 1 if fails or not_run else 0


if __name__ == "__main__":
    sys.exit(main())
