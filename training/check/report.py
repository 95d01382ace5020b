"""A data set looked over: every finding as report.json holds it, in words, and in files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from modeling_hsvlt.label_prompts import encode_labels, load_text_encoder
from modeling_hsvlt.load_image import MAX_PIXELS

from ..checkpoint.atomic import write_file
from ..data.image_files import ImageFiles
from ..data.leave_out import write_exclusions
from ..data.load import load
from ..data.rows import Split
from ..options import DatasetOptions, dataset_options
from ..say import counted
from .findings import (
    Finding,
    check_labels,
    duplicate_findings,
    exclusions,
    find_duplicates,
    inspect_images,
    note_findings,
)
from .imbalance import long_tail_groups, plot_imbalance


def check_dataset(
    options: DatasetOptions, *, text_encoder: str | None, max_distance: int, max_pixels: int | None, num_workers: int
) -> dict:
    """Loads, looks and gives what report.json holds; findings that name rows get their file names.

    Args:
        options: Where the data set is; what `load` would refuse is left out, as a finding.
        text_encoder: Folder of one that compares label names by their meaning.
        max_distance: Bits of 64 that copies differ in.
        max_pixels: Larger images are refused; None: those that training refuses.
        num_workers: Threads that decode.
    """
    try:
        loaded = load(options.dataset, report_labels=True, **dataset_options(options))
    except ValueError as error:
        finding = Finding("data_that_cannot_be_loaded", True, "Correct this first; then check again.", [str(error)])
        return {"dataset": options.dataset, "findings": [asdict(finding)]}
    splits, label_names = loaded.splits, loaded.label_names
    labels = {name: split.labels for name, split in splits.items()}
    embeddings = None
    if text_encoder is not None:
        encoder, tokenizer = load_text_encoder(text_encoder)
        embeddings = encode_labels(label_names, encoder, tokenizer).numpy()
    images = {name: split.images for name, split in splits.items()}
    names, prints, findings = inspect_images(images, max_pixels=max_pixels or MAX_PIXELS, num_workers=num_workers)
    duplicates = find_duplicates(prints, names, labels, label_names, max_distance)

    folder = Path(options.dataset)
    findings[0].examples += [each.message for each in loaded.left_out if each.kind == "missing_image"]
    strict = any(folder.glob("metadata.jsonl")) or any(folder.glob("*/metadata.jsonl"))
    findings.insert(
        1,
        Finding(
            "images_without_a_row",
            strict,
            "They take no part; add rows or take them out.",
            _unlisted_images(Path(options.image_folder or folder), splits),
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
        "dataset": options.dataset,
        "splits": {name: len(split) for name, split in splits.items()},
        "labels": label_names,
        "positives": {name: of_split.positives().tolist() for name, of_split in labels.items()},
        "findings": [asdict(finding) for finding in sorted(findings, key=lambda finding: not finding.breaks_training)],
        "duplicates": duplicates,
        "excluded": excluded,
    }


def _unlisted_images(folder: Path, splits: dict[str, Split]) -> list[str]:
    """Image files in `folder` that no row names; empty where the rows hold their images."""
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


def print_report(report: dict, examples: int) -> None:
    """Counts first, then the worst of each kind."""
    if "splits" in report:
        print(f"{report['dataset']}: {counted(len(report['labels']), 'label')}")
        for name, images in report["splits"].items():
            positives = np.array(report["positives"][name])
            print(
                f"  {name:<12}{counted(images, 'image'):>17}, {positives.sum() / images:.2f} labels an image; a label "
                f"has {positives.min():,} to {positives.max():,} positives"
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
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if "splits" in report:
        positives = {name: np.array(counts) for name, counts in report["positives"].items()}
        plot_imbalance(positives, report["labels"], folder / "imbalance.png")
        write_exclusions(folder / "exclude.txt", report["excluded"])
