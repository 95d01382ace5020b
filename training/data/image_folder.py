"""Reads an `imagefolder`: pictures beside a `metadata.jsonl` of `{"file_name": ..., "labels": [...]}` rows, and a
`labels.txt`.

`datasets.load_dataset("imagefolder")` drops a picture without a row silently, keeps a row without a picture until it is
read, and names no line; here each is told with file and line before anything is trained.
"""

from __future__ import annotations

import json
import posixpath
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Image

from .rows import SPLIT_ALIASES, ListedOnce, PictureFiles, Table, check_policies, line_namer, refuse_or_skip

MAX_ROW = 2**24  # letters of a row of metadata.jsonl: a picture with a million labels


def read_image_folders(
    folder: Path,
    label_column: str = "labels",
    *,
    unlisted_pictures: str = "error",
    missing_pictures: str = "error",
) -> Table:
    """Reads every `<split>/metadata.jsonl`, or a `metadata.jsonl` of the folder itself, which is then the train split.

    Args:
        unlisted_pictures: "error", or "skip" to leave out pictures that no row names.
        missing_pictures: "error", or "skip" to leave out rows whose picture does not exist.

    Returns:
        The splits with columns `image` (paths, not decoded) and `labels`; rows are named by file, line, picture.

    Raises:
        ValueError: a malformed line, a picture with two rows, a row without picture or a picture without row.
    """
    check_policies(unlisted_pictures, missing_pictures)
    table = Table({})
    for metadata in sorted([*folder.glob("metadata.jsonl"), *folder.glob("*/metadata.jsonl")]):
        name = "train" if metadata.parent == folder else SPLIT_ALIASES.get(metadata.parent.name, metadata.parent.name)
        if name in table.splits:
            raise ValueError(f"{folder} has two metadata.jsonl for the split {name!r}; keep one of them.")
        _read_split(table, name, metadata, folder, label_column, unlisted_pictures, missing_pictures)
    return table


def _read_split(
    table: Table,
    split: str,
    metadata: Path,
    root: Path,
    label_column: str,
    unlisted_pictures: str,
    missing_pictures: str,
) -> None:
    folder = metadata.parent
    # Splits may share a folder of pictures beside them, but a row must not reach out of the data set.
    files, once = PictureFiles(folder, within=root), ListedOnce()
    present, numbers, labels, missing, kind_of_all = [], [], [], [], None
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
            once.add(name, f"{metadata}, line {number}", f"line {number}")
            if files.holds(name):
                present.append(name)
                numbers.append(number)
                labels.append(value)
            else:
                missing.append((split, name))
    table.left_out += refuse_or_skip(
        "missing_picture",
        missing,
        missing_pictures,
        str(metadata),
        "names",
        f"that {root} does not hold; add the pictures, take the rows out, or pass missing_pictures='skip'.",
    )
    table.left_out += refuse_or_skip(
        "unlisted_picture",
        [(split, name) for name in files.unlisted()],
        unlisted_pictures,
        str(folder),
        "holds",
        "without a row in metadata.jsonl; add rows (labels may be []), take the pictures out, or pass "
        "unlisted_pictures='skip'.",
    )
    images = Dataset.from_dict(
        {"image": [str(folder / name) for name in present]}, features=Features({"image": Image(decode=False)})
    )
    table.splits[split] = images.add_column("labels", pa.array(labels))
    table.row_names[split] = line_namer(metadata, numbers, present)


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
