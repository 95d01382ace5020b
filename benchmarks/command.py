"""The command line that benchmarks share: figures as JSON, and errors in one sentence."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def benchmark_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, with `--json`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def run_benchmark(
    run: Callable[[argparse.Namespace], Any],
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    refused: tuple[type[Exception], ...] = (ValueError, OSError, ImportError),
) -> int:
    """What `run` gives, written where `--json` says. 0, or 2 when one of `refused` was raised; it is printed."""
    args = parser.parse_args(argv)
    try:
        figures = run(args)
    except refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0
