"""The command line that benchmarks share: figures as JSON, and errors in one sentence."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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


def machine_options(parser: argparse.ArgumentParser, *, rounds: int, dtype: str, compiled: str) -> None:
    """What several benchmarks ask alike: rounds, threads, device, data type and whether to compile."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help=dtype)
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of this process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run_benchmark(
    run: Callable[[argparse.Namespace], Any],
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
) -> int:
    """What `run` gives, written where `--json` says. 0, or 2 when something was refused, which is printed."""
    args = parser.parse_args(argv)
    try:
        figures = run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0
