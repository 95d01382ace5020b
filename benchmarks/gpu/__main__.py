"""Every figure that takes a GPU, in one command and ten minutes: `make gpu`.

    python -m benchmarks.gpu                                      all parts
    python -m benchmarks.gpu --parts speed labels                 some; each works alone
    GPU_DATA=FOLDER python -m benchmarks.gpu --parts accuracy --minutes 30
    python -m benchmarks.gpu --smoke                              tiny and eager, on a CPU: does it run?

A part stops when its share of the time is used, what it did not get to is named, and what an earlier part left is the
next one's. After every figure the results are whole in OUTPUT/results.json and, as tables, in OUTPUT/table.md; a run of
some parts replaces theirs and leaves the others. Models have random weights, except for those of accuracy, whose
packages the extra `train` brings. Nothing is downloaded. GPU_DATA is an imagefolder with the splits train and
validation, and the photographs of input as well.

Timing: warm-up first, then rounds in which all models take turns; a ratio is the median over the rounds (least to
most). Each time is one of some 50 ms of steps in a row, from an idle device to an idle device. Memory is
`torch.cuda.max_memory_allocated`, reset for each model. fp32 is computed as torch does by default: the table says
where that is TF32.
"""

import gc
import os
import shutil
import signal
import sys
import time
import tomllib
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from packaging.requirements import Requirement

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.gpu.parts import GOALS, ROOT, Suite, accuracy_table
from benchmarks.gpu.record import Record
from benchmarks.timing import arithmetic, device_name

# Parts of the time, in order.
SHARES = {
    "tests": 0.06,
    "speed": 0.36,
    "labels": 0.07,
    "hp_dval": 0.05,
    "mltr": 0.05,
    "input": 0.06,
    "training": 0.15,
    "accuracy": 0.20,
}


class TimeUpError(BaseException):
    """A part's time is used. No Exception, so that nothing on the way takes it for its own."""


@contextmanager
def time_limit(seconds: float):
    """Raises TimeUpError inside, after so many seconds; a limit that was set before holds again afterwards."""

    def stop(number, frame):
        raise TimeUpError

    handler, begin = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begin), 0.001))


def wheels() -> list[str]:
    """What is asked for, of the package and its extra `train`, and is not here in that version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    problems = []
    for line in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
        needed = Requirement(line)
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = None
        if found is None or not needed.specifier.contains(found, prereleases=True):
            problems.append(f"{line} (here: {found or 'none'})")
    return problems


def run_part(record: Record, suite: Suite, part: str, seconds: float, begin: float) -> None:
    """Measures units until all are done or the time is used; one that fails is noted and the next one begun."""

    def say(words: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] {part}: {words}", flush=True)

    try:
        units = getattr(suite, part)()
    except ValueError as error:
        say(f"left out: {error}")
        record.left_out(part, [str(error)])
        return
    waiting = [unit.name for unit in units]
    record.left_out(part, waiting)
    try:
        with time_limit(seconds):
            for unit in units:
                start, found = time.monotonic(), {}
                try:
                    found["figures"] = unit.run()
                    line = found["figures"].pop("line")
                except Exception as error:  # the other figures are worth having
                    found["error"] = f"{type(error).__name__}: {error}"
                    line = f"FAILED: {found['error']}"
                taken = time.monotonic() - start
                record.add(part, unit.name, {"command": unit.command, "seconds": taken, **found})
                waiting.remove(unit.name)
                record.left_out(part, waiting)
                say(f"{unit.name}: {line} ({taken:.0f} s)")
                free_memory()
    except TimeUpError:
        if waiting:
            say(f"its time is used; left out: {', '.join(waiting)}")
    free_memory()


def free_memory() -> None:
    """Gives the device's memory back, to the next unit and to processes that it starts."""
    gc.collect()
    torch.cuda.empty_cache()


def run(args) -> dict:
    """Measures the parts; returns what the JSON file holds."""
    if not args.smoke and not torch.cuda.is_available():
        raise ValueError(
            f"no CUDA device is there for torch {torch.__version__} (built for CUDA: {torch.version.cuda}); --smoke "
            "tries the suite without one."
        )
    for problem in wheels():
        print(f"another version than is tested: {problem}", file=sys.stderr)
    data = os.environ.get("GPU_DATA") or None
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"GPU_DATA is {data!r}, which is no folder.")
    suite = Suite(args.smoke, data)
    device = torch.device(suite.device)
    about = {"device": device_name(device), "torch": torch.__version__, "transformers": transformers.__version__}
    record = Record(
        args.output / "results.json", {**about, "arithmetic": arithmetic(device), "smoke": args.smoke}, GOALS
    )
    begin, due = time.monotonic(), 0.0
    whole = sum(SHARES[part] for part in args.parts)
    try:
        for part in (part for part in SHARES if part in args.parts):
            due += 60 * args.minutes * SHARES[part] / whole
            run_part(record, suite, part, begin + due - time.monotonic(), begin)
            if args.page is not None:
                record.put_into(args.page)
    finally:
        shutil.rmtree(suite.folder, ignore_errors=True)
    if "accuracy" in args.parts:
        print(f"\n{accuracy_table(record.units('accuracy'))}")
    print(f"\n{record.goal_table()}\n\nAll of it: {record.file} and {record.file.with_name('table.md')}")
    return {"about": record.about, "parts": record.parts}


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the parts were run, 1 when something in them failed, 2 when something was refused."""
    failed = []

    def run_and_count(args) -> dict:
        figures = run(args)
        units = [unit for part in args.parts for unit in figures["parts"].get(part, {"units": {}})["units"].values()]
        failed.extend(unit["error"] for unit in units if "error" in unit)
        return figures

    parser = benchmark_parser("gpu", __doc__)
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--smoke", action="store_true", help="tiny models, without a GPU as well; figures mean nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--page", type=Path, help="Markdown that takes the tables in, between its two marks")
    return run_benchmark(run_and_count, parser, argv) or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
