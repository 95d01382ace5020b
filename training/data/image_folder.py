"""Reads an `imagefolder`: pictures beside a `metadata.jsonl` of `{"file_name": ..., "labels": [...]}` rows, and a
`labels.txt`.

`datasets.load_dataset("imagefolder")` drops a picture without a row silently, keeps a row without a picture until it is
read, and names no line; here each is told with file and line before anything is trained.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image

from .rows import SPLIT_ALIASES, check_policies, pictures_below, refuse_or_skip

MAX_ROW = 2**24  # letters of a row of metadata.jsonl: a picture with a million labels


def read_image_folders(
    folder: Path,
    label_column: str = "labels",
    *,
    unlisted_pictures: str = "error",
    missing_pictures: str = "error",
) -> tuple[DatasetDict, dict[str, Callable[[int], str]]]:
    """Reads every `<split>/metadata.jsonl`, or a `metadata.jsonl` of the folder itself, which is then the train split.

    Args:
        unlisted_pictures: "error", or "skip" to leave out pictures that no row names.
        missing_pictures: "error", or "skip" to leave out rows whose picture does not exist.

    Returns:
        The splits with columns `image` (paths, not decoded) and `labels`, and per split a function from a row to the
        words that name it in an error: file, line, picture.

    Raises:
        ValueError: a malformed line, a picture with two rows, a row without picture or a picture without row.
    """
    check_policies(unlisted_pictures, missing_pictures)
    loaded, row_words = DatasetDict(), {}
    for metadata in sorted([*folder.glob("metadata.jsonl"), *folder.glob("*/metadata.jsonl")]):
        name = "train" if metadata.parent == folder else SPLIT_ALIASES.get(metadata.parent.name, metadata.parent.name)
        if name in loaded:
            raise ValueError(f"{folder} has two metadata.jsonl for the split {name!r}; keep one of them.")
        loaded[name], row_words[name] = _read_split(metadata, folder, label_column, unlisted_pictures, missing_pictures)
    return loaded, row_words


def _read_split(
    metadata: Path, root: Path, label_column: str, unlisted_pictures: str, missing_pictures: str
) -> tuple[Dataset, Callable[[int], str]]:
    folder = metadata.parent
    unlisted = pictures_below(folder)
    line_of: dict[str, int] = {}
    present, labels, missing, kind_of_all = [], [], [], None
    with metadata.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_ROW), ""), 1):
            if len(line) == MAX_ROW:
                raise ValueError(f"{metadata}, line {number} is longer than {MAX_ROW:,} letters; it is no row.")
            if not line.strip():
                continue
            name, value, kind = _parse_row(line, label_column, f"{metadata}, line {number}")
            if kind and kind_of_all and kind != kind_of_all:
                raise ValueError(
                    f"{metadata}, line {number} ({name}): its {label_column} are {kind}, but those of lines before are "
                    f"{kind_of_all}; write the same kind in every row."
                )
            kind_of_all = kind_of_all or kind
            if name in line_of:
                raise ValueError(
                    f"{metadata}, line {number}: {name!r} has a row already on line {line_of[name]}; keep one of them."
                )
            line_of[name] = number
            path = Path(os.path.normpath(folder / name))
            # Splits may share a folder of pictures beside them, but a row must not reach out of the data set.
            if name in unlisted or (path.is_file() and path.is_relative_to(os.path.normpath(root))):
                unlisted.discard(name)
                present.append(name)
                labels.append(value)
            else:
                missing.append(name)
    refuse_or_skip(
        missing,
        missing_pictures,
        f"{metadata} names",
        f"that {root} does not hold; add the pictures, take the rows out, or pass missing_pictures='skip'.",
    )
    refuse_or_skip(
        sorted(unlisted),
        unlisted_pictures,
        f"{folder} holds",
        "without a row in metadata.jsonl; add rows (labels may be []), take the pictures out, or pass "
        "unlisted_pictures='skip'.",
    )
    images = Dataset.from_dict(
        {"image": [str(folder / name) for name in present]}, features=Features({"image": Image(decode=False)})
    )
    return (
        images.add_column("labels", pa.array(labels)),
        lambda row: f"{metadata}, line {line_of[present[row]]} ({present[row]})",
    )


def _parse_row(line: str, label_column: str, where: str) -> tuple[str, list | None, str | None]:
    """File name, labels, and their kind ("names", "numbers", or None where there are none) of one line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); correct the line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or label_column not in row:
        raise ValueError(f"{where} must be an object with file_name and {label_column}.")
    name, labels = posixpath.normpath(row["file_name"]), row[label_column]
    if labels is not None and not isinstance(labels, list):
        raise ValueError(f"{where} ({name}): {label_column} is {labels!r}, but must be a list.")
    kinds = {
        "names" if isinstance(label, str) else "numbers" if isinstance(label, int | float) else "other"
        for label in labels or []
        if label is not None
    }
    if len(kinds) > 1 or "other" in kinds:
        raise ValueError(f"{where} ({name}): {label_column} is {labels!r}, but must hold only names or only numbers.")
    return name, labels, next(iter(kinds), None)
