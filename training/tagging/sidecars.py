"""Tags beside the images: text files as fine-tuning tools of image generators read, and XMP as photo tools do."""

from __future__ import annotations

import argparse
import logging
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from ..checkpoint.atomic import remove_unfinished, write_file
from .results import Results
from .sources import DatasetSource, FileSource, StreamSource
from .xmp import EMPTY_XMP, with_keywords

logger = logging.getLogger(__name__)


def text_path(image: Path, whole: bool = False) -> Path:
    """`1.jpg` -> `1.txt`; with the `whole` name `1.jpg.txt`, where `1.png` stands beside it."""
    return image.with_name(f"{image.name}.txt") if whole else image.with_suffix(".txt")


def write_text(image: Path, labels: Sequence[str], overwrite: bool = False, whole: bool = False) -> bool:
    """Writes `dog, sofa` (a comma within a label becomes a blank), nothing where there is no label; False where there
    is a file already."""
    path = text_path(image, whole)
    if path.exists() and not overwrite:
        return False
    text = ", ".join(" ".join(label.replace(",", " ").split()) for label in labels)
    _write(path, f"{text}\n".encode() if text else b"")
    return True


def write_xmp(image: Path, labels: Sequence[str], overwrite: bool = False, whole: bool = True) -> bool:
    """Writes the labels as keywords, see `xmp.KEYWORDS`, into `1.jpg.xmp`, as darktable and digiKam name it; False
    where there is a file already.

    Overwriting replaces the keywords of an existing file and keeps all else in it, which may be a day's work. A file
    that is no XMP is left as it is, with a warning.
    """
    path = image.with_name(f"{image.name}.xmp")
    if path.exists() and not (overwrite and path.is_file()):
        return False
    try:
        data = with_keywords(path.read_bytes() if path.exists() else EMPTY_XMP.encode(), labels, path)
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(", ").rstrip(".")
        logger.warning("%s is no XMP (%s); it was left as it was.", path, reason)
        return False
    _write(path, data)
    return True


def _write(path: Path, data: bytes) -> None:
    """As `write_file`, with the mode of the file that was there."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    try:
        write_file(path, data)
    except FileNotFoundError:  # another run that tags these images took it for what a killed one left
        write_file(path, data)
    if mode is not None:
        path.chmod(mode)


WRITERS = {"txt": write_text, "xmp": write_xmp}


def write_sidecars(source: FileSource, results: Results, args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Writes this process's share of the sidecars, and says how many there were; returns how many of all could not be
    written."""
    counts = Counter()
    pairs = shared_names(source)
    if accelerator.is_main_process:
        _remove_unfinished(source)
    accelerator.wait_for_everyone()
    for part in results.parts()[accelerator.process_index :: accelerator.num_processes]:
        for record in results.read(part):
            if record["labels"] is None:
                continue
            image = source.path(record["file_name"])
            for kind in args.sidecars:
                if kind == "xmp" and not record["labels"]:
                    continue
                try:
                    whole = text_path(image) in pairs
                    done = WRITERS[kind](image, record["labels"], args.overwrite_sidecars, whole)
                except OSError as error:  # a folder that cannot be written to, or a name too long for a suffix more
                    print(f"No sidecar of {image}: {error}", file=sys.stderr)
                    counts["failed"] += 1
                else:
                    counts["written" if done else "kept"] += 1
    totals = torch.tensor([counts[name] for name in ("written", "kept", "failed")], device=accelerator.device)
    written, kept, failed = accelerator.reduce(totals, "sum").tolist()
    accelerator.print(f"Sidecars written: {written:,}; left as they were: {kept:,}; failed: {failed:,}.")
    if pairs and "txt" in args.sidecars:
        names = ", ".join(sorted(path.name for path in pairs)[:5])
        accelerator.print(f"Images that would share {names}: each has a file with its whole name, as 1.jpg.txt.")
    return failed


def _remove_unfinished(source: FileSource) -> None:
    """Remove the sidecars that a killed run had begun to write."""
    names = defaultdict(set)
    for image in map(source.path, source.keys):
        names[image.parent] |= {text_path(image).name, f"{image.name}.txt", f"{image.name}.xmp"}
    for folder, of_sidecars in names.items():
        remove_unfinished(folder, of_sidecars)


def shared_names(source: FileSource) -> set[Path]:
    """The `1.txt` that several images would share, or that is itself one of the images."""
    images = [source.path(name) for name in source.keys]
    owners = Counter(text_path(image) for image in images)
    return {path for path, count in owners.items() if count > 1} | (owners.keys() & set(images))


def check_sidecars(source: FileSource | DatasetSource | StreamSource) -> None:
    """
    Raises:
        ValueError: the images are no files.
    """
    if not isinstance(source, FileSource) or any(source.is_url(name) for name in source.keys):
        raise ValueError("Images of a data set or of the web have no folder for sidecars; leave --sidecars out.")
