"""NUS-WIDE in its own files: the 81 concepts, the lists of images, and one file of 0 and 1 a concept, from
Groundtruth/TrainTestLabels or, without it, Groundtruth/AllLabels. Splits are the official Train and Test; the papers
drop images that show none of the 81 concepts: --without_labels drop.
SOURCE: the folder with ImageList/, Groundtruth/, Concepts81.txt and the images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..data.label_name_files import read_label_names
from ..options import option
from .reading import Reading, Rows, SourceOptions, first_folder, text_lines

# Images, and those that show one of the 81 concepts.
PUBLISHED = {"Train": (161_789, 125_449), "Test": (107_859, 83_898)}


@dataclass(kw_only=True)
class Options(SourceOptions):
    image_folder: str | None = option(None, "where the names of the lists start; null: Flickr or images in SOURCE")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file and line."""
    root = args.source
    concepts = first_folder(root / "ConceptsList", root) / "Concepts81.txt"
    if not concepts.is_file():
        raise FileNotFoundError(f"{concepts} does not exist; add the list of the 81 concepts.")
    label_names = read_label_names(concepts)
    lists = first_folder(root / "ImageList", root)
    images = Path(args.image_folder) if args.image_folder else first_folder(root / "Flickr", root / "images", root)
    truth = first_folder(root / "Groundtruth", root)
    by_split = (truth / "TrainTestLabels").is_dir()
    if not by_split:
        everything = _read_list(lists / "Imagelist.txt")
        row_of = {name: row for row, name in enumerate(everything)}
        all_labels = _read_labels(truth / "AllLabels", "", label_names, len(everything), "Imagelist.txt")
    rows = Rows(images, args)
    for split in PUBLISHED:
        path = lists / f"{split}Imagelist.txt"
        names = _read_list(path)
        if by_split:
            labels = _read_labels(truth / "TrainTestLabels", f"_{split}", label_names, len(names), path.name)
        else:
            for name, line in names.items():
                if name not in row_of:
                    raise ValueError(f"{path}, line {line}: {name} is not in Imagelist.txt; unpack the lists again.")
            labels = all_labels[[row_of[name] for name in names]]
        for (name, line), shown in zip(names.items(), labels, strict=True):
            present = [label_names[label] for label in np.flatnonzero(shown)]
            rows.add(split, [name], present, f"{path}, line {line}")
    reading = rows.reading(label_names)
    reading.title, reading.published = "NUS-WIDE", PUBLISHED
    return reading


def _read_list(path: Path) -> dict[str, int]:
    r"""File names of a list such as `actor\0001_2124494179.jpg`, with slashes, and their lines."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text_lines(path), 1):
        name = PurePosixPath(line.replace("\\", "/"))
        if not name.suffix or name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{path}, line {number} is {line!r}, but must be an image's file name.")
        if str(name) in lines:
            raise ValueError(f"{path}, line {number}: {name} is listed before on line {lines[str(name)]}; keep one.")
        lines[str(name)] = number
    return lines


def _read_labels(folder: Path, suffix: str, label_names: list[str], count: int, list_name: str) -> np.ndarray:
    """(count, num_labels) bool, from one file a concept."""
    labels = np.zeros((count, len(label_names)), dtype=bool)
    for column, concept in enumerate(label_names):
        path = folder / f"Labels_{concept}{suffix}.txt"
        lines = text_lines(path)
        if bad := set(lines) - {"0", "1"}:
            number = next(number for number, line in enumerate(lines, 1) if line in bad)
            raise ValueError(f"{path}, line {number} is {lines[number - 1]!r}, but must be 0 or 1.")
        if len(lines) != count:
            raise ValueError(f"{path} has {len(lines):,} lines for the {count:,} images of {list_name}; unpack them.")
        labels[:, column] = [line == "1" for line in lines]
    return labels
