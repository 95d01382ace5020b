"""Look a data set over before training: images, labels, duplicates.

    hsvlt check DATASET --output DIR

Nothing is changed and nothing is left out here. DIR gets report.json (every finding in full), imbalance.png, and
exclude.txt, a list of images that `hsvlt train CONFIG.yaml --exclude DIR/exclude.txt` leaves out: those that
cannot be read, and copies, of which the one in the most held-out split stays. Ends with 0 when training can start, with
1 when something would break it, and with 2 when there is nothing to check.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .options import DatasetOptions, command, option, refuse_to_replace
from .say import counted, say_next

REPORT_FILES = ("report.json", "imbalance.png", "exclude.txt")


@dataclass(kw_only=True)
class CheckOptions(DatasetOptions):
    # Findings here, whatever training does about them, and rows keep their numbers.
    missing_images: str = field(init=False, default="skip")
    unlisted_images: str = field(init=False, default="skip")
    exclude: str | None = field(init=False, default=None)
    output: Path | None = option(None, "where to write; null: runs/check_data/NAME", metavar="DIR")
    overwrite: bool = option(False, "replace a report that is in DIR")
    examples: int = option(5, "of each kind to print")
    text_encoder: str | None = option(None, "compare label names by their meaning as well", metavar="FOLDER")
    max_distance: int = option(6, "bits of 64 that copies differ in")
    max_pixels: int | None = option(None, "larger images are refused; null: as in training")
    num_workers: int = field(default_factory=os.cpu_count, metadata={"help": "threads that decode; all cores here"})


def run(args: CheckOptions) -> bool:
    """Checks, prints and writes; returns whether training can start."""
    from .check.report import check_dataset, print_report, write_report

    folder = args.output or Path("runs", "check_data", Path(args.dataset).resolve().name)
    if not args.overwrite:
        refuse_to_replace(folder, REPORT_FILES, "--output")
    names = ("text_encoder", "max_distance", "max_pixels", "num_workers")
    report = check_dataset(args, **{name: getattr(args, name) for name in names})
    print_report(report, args.examples)
    for name in REPORT_FILES:  # not every report has all of them
        (folder / name).unlink(missing_ok=True)
    write_report(report, folder)
    excluded = report.get("excluded", [])
    print(f"\nWritten: {folder}, with {counted(len(excluded), 'row')} to leave out in exclude.txt")
    broken = any(finding["breaks_training"] and finding["examples"] for finding in report["findings"])
    if broken:
        say_next("check", args.dataset, "--output", folder, "--overwrite", like=args)
    else:
        leave_out = ["--exclude", folder / "exclude.txt"] if excluded else []
        say_next("train", "photos", args.dataset, *leave_out, like=args)
    return not broken


main = command(run, CheckOptions, "check", __doc__, status=lambda clean: 0 if clean else 1)


if __name__ == "__main__":
    sys.exit(main())
