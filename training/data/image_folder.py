"""Reads an `imagefolder`: images beside a `metadata.jsonl` of `{"file_name": ..., "labels": [...]}` rows, and a
`labels.txt`.

`datasets.load_dataset("imagefolder")` drops an image without a row silently, keeps a row without an image until it is
read, and names no line; here each is told with file and line before anything is trained.
"""

from __future__ import annotations

import posixpath
from functools import partial
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Image

from .image_files import ImageFiles
from .rows import (
    SPLIT_ALIASES,
    Table,
    check_policies,
    images_without_row,
    list_once,
    name_by_line,
    rows_without_image,
    splits_by_folder,
)
from .text import decode_line, parse_json

MAX_ROW = 2**24  # letters of a row of metadata.jsonl: an image with a million labels


def read_image_folders(
    folder: Path,
    label_column: str = "labels",
    *,
    unlisted_images: str = "error",
    missing_images: str = "error",
) -> Table:
    """Reads every `<split>/metadata.jsonl`, or a `metadata.jsonl` of the folder itself, which is then the train split,
    or divided by the first folder of its names where those are called like splits (`train/1.jpg`, `test/2.jpg`).

    Args:
        unlisted_images: "error", or "skip" to leave out images that no row names.
        missing_images: "error", or "skip" to leave out rows whose image does not exist.

    Returns:
        The splits with columns `image` (paths, not decoded) and `labels`; rows are named by file, line, image.

    Raises:
        ValueError: a malformed line, an image with two rows, a row without image or an image without row.
    """
    check_policies(unlisted_images, missing_images)
    table = Table({})
    for metadata in sorted([*folder.glob("metadata.jsonl"), *folder.glob("*/metadata.jsonl")]):
        name = "train" if metadata.parent == folder else SPLIT_ALIASES.get(metadata.parent.name, metadata.parent.name)
        if name in table.splits:
            raise ValueError(f"{folder} has two metadata.jsonl for the split {name!r}; keep one of them.")
        _read_split(table, name, metadata, folder, label_column, unlisted_images, missing_images)
    return table


def _read_split(
    table: Table,
    split: str,
    metadata: Path,
    root: Path,
    label_column: str,
    unlisted_images: str,
    missing_images: str,
) -> None:
    folder = metadata.parent
    # Splits may share a folder of images beside them, but a row must not reach out of the data set.
    files = ImageFiles(folder, within=root)
    first, rows, missing, kind_of_all = {}, [], [], None
    with metadata.open("rb") as lines:
        for number, data in enumerate(iter(lambda: lines.readline(MAX_ROW), b""), 1):
            if len(data) == MAX_ROW:
                raise ValueError(f"{metadata}, line {number} is longer than {MAX_ROW:,} letters; it is no row.")
            line = decode_line(data, metadata, number)
            if not line.strip():
                continue
            name, value, kind = _parse_row(line, label_column, f"{metadata}, line {number}")
            if kind and kind_of_all and kind != kind_of_all:
                raise ValueError(
                    f"{metadata}, line {number} ({name}): its {label_column} are {kind}, but those of lines before are "
                    f"{kind_of_all}; write the same kind in every row."
                )
            kind_of_all = kind_of_all or kind
            name = files.meant(name)
            list_once(first, name, f"{metadata}, line {number}", f"line {number}")
            rows.append((number, name, value))
    of_row = [split] * len(rows)
    if folder == root:
        names = [name for _, name, _ in rows]
        of_row = splits_by_folder(names, lambda row: f"{metadata}, line {rows[row][0]}") or of_row
    there: dict[str, list] = {}
    for row, name in zip(rows, of_row, strict=True):
        if files.holds(row[1]):
            there.setdefault(name, []).append(row)
        else:
            missing.append((name, row[1]))
    table.left_out += rows_without_image(missing, missing_images, metadata, root)
    table.left_out += images_without_row(files.unlisted(), split, unlisted_images, folder, "metadata.jsonl")
    for part, kept in (there or {split: []}).items():
        if part in table.splits:
            raise ValueError(f"{metadata} names images of {part!r}, which has a metadata.jsonl of its own; keep one.")
        images = Dataset.from_dict(
            {"image": [str(folder / name) for _, name, _ in kept]}, features=Features({"image": Image(decode=False)})
        )
        table.splits[part] = images.add_column("labels", pa.array([value for *_, value in kept]))
        lines, names = [line for line, *_ in kept], [name for _, name, _ in kept]
        table.row_names[part] = partial(name_by_line, metadata, lines, names)


def _parse_row(line: str, label_column: str, where: str) -> tuple[str, list | None, str | None]:
    """File name, labels, and their kind ("names", "numbers", or None where there are none) of one line."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} {error}; correct the line.") from error
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
