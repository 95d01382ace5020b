"""A command of training/ for a checkpoint that `benchmarks.accuracy.heads --save` wrote.

    python -m benchmarks.accuracy.with_backbone evaluate DIR/hsvlt FOLDER --split validation
    python -m benchmarks.accuracy.with_backbone export DIR/hsvlt TARGET

Its backbone is not one of transformers', so it is registered here first; the options are the command's own.
"""

import importlib
import sys

from benchmarks.peers import efficientnet_lite  # noqa: F401  (registers the backbone)

COMMANDS = ("evaluate", "fit_thresholds", "calibrate", "tag", "export")


def main(argv: list[str] | None = None) -> int:
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}")
        return 0 if name in ("-h", "--help") else 2
    return importlib.import_module(f"training.{name}").main(options)


if __name__ == "__main__":
    sys.exit(main())
