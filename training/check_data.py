"""Look a data set over before training: images, labels, duplicates.

    python -m training.check_data DATASET --output DIR

Nothing is changed and nothing is left out here. DIR gets report.json (every finding in full), imbalance.png, and
exclude.txt, a list of images that `training.train CONFIG.yaml --exclude DIR/exclude.txt` leaves out: those that
cannot be read, and copies, of which the one in the most held-out split stays. Ends with 0 when training can start, with
1 when something would break it, and with 2 when there is nothing to check.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import DatasetOptions, dataset_options, option, read_options

if TYPE_CHECKING:
    from .data.rows import Split

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


def unlisted_images(folder: Path, splits: dict[str, Split]) -> list[str]:
    """Image files in `folder` that no row names; empty where the rows hold their images."""
    from .data.rows import ImageFiles

    if not folder.is_dir():
        return []
    files, listed = ImageFiles(folder), False
    for split in splits.values():
        if (split.images[0]["image"] or {}).get("bytes") is not None:
            continue  # and do not read gigabytes to learn the same of the others
        for start in range(0, len(split), 1000):
            for image in split.images[start : start + 1000]["image"]:
                if image:
                    listed = True
                    files.holds(os.path.relpath(image["path"], folder))
    return [str(folder / name) for name in files.unlisted()] if listed else []


def check(args: CheckOptions) -> dict:
    """Loads, looks and says what report.json holds; findings that name rows get their file names."""
    from .check.findings import (
        Finding,
        check_labels,
        duplicate_findings,
        exclusions,
        find_duplicates,
        inspect_images,
        note_findings,
    )
    from .data.load import load

    try:
        loaded = load(args.dataset, report_labels=True, **dataset_options(args))
    except ValueError as error:
        finding = Finding("data_that_cannot_be_loaded", True, "Correct this first; then check again.", [str(error)])
        return {"dataset": args.dataset, "findings": [asdict(finding)]}
    splits, label_names = loaded.splits, loaded.label_names
    labels = {name: split.labels for name, split in splits.items()}
    embeddings = None
    if args.text_encoder is not None:
        from modeling_hsvlt.label_prompts import encode_labels, load_text_encoder

        encoder, tokenizer = load_text_encoder(args.text_encoder)
        embeddings = encode_labels(label_names, encoder, tokenizer).numpy()
    images = {name: split.images for name, split in splits.items()}
    limit = {} if args.max_pixels is None else {"max_pixels": args.max_pixels}
    names, prints, findings = inspect_images(images, **limit, num_workers=args.num_workers)
    duplicates = find_duplicates(prints, names, labels, label_names, args.max_distance)

    folder = Path(args.dataset)
    findings[0].examples += [each.message for each in loaded.left_out if each.kind == "missing_image"]
    strict = any(folder.glob("metadata.jsonl")) or any(folder.glob("*/metadata.jsonl"))
    findings.insert(
        1,
        Finding(
            "images_without_a_row",
            strict,
            "They take no part; add rows or take them out.",
            unlisted_images(Path(args.image_folder or folder), splits),
        ),
    )
    excluded = exclusions(findings, duplicates)
    findings += note_findings(loaded.label_notes)
    findings += check_labels(labels, label_names, embeddings)
    findings += duplicate_findings(duplicates)
    for finding in findings:
        for example in finding.examples:
            if isinstance(example, dict):
                example.setdefault("file", names[example["split"]][example["row"]])
    return {
        "dataset": args.dataset,
        "splits": {name: len(split) for name, split in splits.items()},
        "labels": label_names,
        "positives": {name: of_split.positives().tolist() for name, of_split in labels.items()},
        "findings": [asdict(finding) for finding in sorted(findings, key=lambda finding: not finding.breaks_training)],
        "duplicates": duplicates,
        "excluded": excluded,
    }


def print_report(report: dict, examples: int) -> None:
    """Counts first, then the worst of each kind."""
    import numpy as np

    from .check.imbalance import long_tail_groups

    if "splits" in report:
        print(f"{report['dataset']}: {len(report['labels'])} labels")
        for name, images in report["splits"].items():
            positives = np.array(report["positives"][name])
            print(
                f"  {name:<12}{images:>10,} images, {positives.sum() / images:.2f} labels an image; a label has "
                f"{positives.min():,} to {positives.max():,} positives"
            )
        groups = long_tail_groups(np.array(report["positives"].get("train", [])))
        print(f"  head, medium, tail labels: {', '.join(str(len(group)) for group in groups.values())}")
    found = [finding for finding in report["findings"] if finding["examples"]]
    for breaks, words in ((True, "Would break training:"), (False, "Worth a look:")):
        kinds = [finding for finding in report["findings"] if finding["breaks_training"] == breaks]
        print(f"\n{words}")
        for finding in kinds:
            print(f"{len(finding['examples']):>10,}  {finding['kind'].replace('_', ' ')}")
    for finding in found:
        print(f"\n{finding['kind'].replace('_', ' ').capitalize()}: {len(finding['examples']):,}. {finding['text']}")
        for example in finding["examples"][:examples]:
            if isinstance(example, dict):
                example = f"{example['split']} {example['row']} {example['file']} {example.get('reason', '')}"
            print(f"    {example.rstrip()}")
        if len(finding["examples"]) > examples:
            print(f"    and {len(finding['examples']) - examples:,} more")


def write_report(report: dict, folder: Path) -> None:
    """report.json, and where the data could be read imbalance.png and exclude.txt."""
    import numpy as np

    from .check.imbalance import plot_imbalance
    from .checkpoint.atomic import write_file
    from .data.leave_out import write_exclusions

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if "splits" in report:
        positives = {name: np.array(counts) for name, counts in report["positives"].items()}
        plot_imbalance(positives, report["labels"], folder / "imbalance.png")
        write_exclusions(folder / "exclude.txt", report["excluded"])


def run(args: CheckOptions) -> bool:
    """Checks, prints and writes; returns whether training can start."""
    folder = args.output or Path("runs", "check_data", Path(args.dataset).resolve().name)
    existing = [name for name in REPORT_FILES if (folder / name).exists()]
    if existing and not args.overwrite:
        raise FileExistsError(
            f"{folder / existing[0]} exists; choose another --output, or pass --overwrite to replace it."
        )
    report = check(args)
    print_report(report, args.examples)
    for name in existing:  # not every report has all of them
        (folder / name).unlink()
    write_report(report, folder)
    print(f"\nWritten: {folder}, with {len(report.get('excluded', [])):,} rows to leave out in exclude.txt")
    return not any(finding["breaks_training"] and finding["examples"] for finding in report["findings"])


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when clean, 1 when something would break training, 2 when there is nothing to check."""
    try:
        return 0 if run(read_options(CheckOptions, "check", __doc__, argv)) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
