"""Publish a finished run on the Hub: one commit with a tag, checked before it leaves and again when it has arrived.

    python -m training.push RUN_FOLDER org/name [--tag v1] [--public] [--license apache-2.0] [--dry_run]
    python -m training.push RUN_FOLDER org/prompts --adapter_of org/base   # of an HP-DVAL: its learned contexts alone

What is pushed: weights, configuration with thresholds, processor, the code they need, results.json, per_label.csv where
the run was evaluated, selected_tags.csv, the run's options, and a card filled from all that. Before, the folder is
loaded in a process that cannot import this package, and its logits are compared. RUN_FOLDER may also be the folder of a
checkpoint, or of a PEFT adapter. The repository is private unless you say --public; an existing one stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from .publish.hub import push_run


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused or did not arrive."""
    parser = argparse.ArgumentParser(
        prog="python -m training.push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN_FOLDER", type=Path, help="or a checkpoint's or adapter's folder")
    parser.add_argument("repo_id", metavar="org/name")
    parser.add_argument("--tag", help="name of this version; default: the next free of v1, v2, ...")
    parser.add_argument("--public", action="store_true", help="make a new repository public; default: private")
    parser.add_argument("--license", dest="licence", help="of the weights, as the Hub names it: apache-2.0, mit, ...")
    parser.add_argument("--adapter_of", metavar="org/base", help="push the learned contexts alone, as its adapter")
    parser.add_argument("--adapter_revision", help="commit or tag of org/base to check the adapter on")
    parser.add_argument("--pictures", action="store_true", help="pictures of the data set may be shown on the card")
    parser.add_argument("--dry_run", action="store_true", help="build, check and list; send nothing")
    parser.add_argument("--folder", type=Path, help="leave what was built here; default: nowhere")
    args = vars(parser.parse_args(argv))
    try:
        push_run(args.pop("run"), args.pop("repo_id"), private=not args.pop("public"), **args)
    except (ValueError, OSError, HfHubHTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
