"""Reads an `imagefolder`: pictures beside a `metadata.jsonl` of `{"file_name": ..., "labels": [...]}` rows, and a
`labels.txt`.

`datasets.load_dataset("imagefolder")` drops a picture without a row silently, keeps a row without a picture until it is
read, and names no line; here each is told with file and line before anything is trained.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import posixpath
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

logger = logging.getLogger(__name__)

# The folder names that Hugging Face datasets take for each split.
SPLIT_ALIASES = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Far above what people write and far below what fills a memory: these files come from strangers as well.
MAX_LABEL_FILE = 2**26  # bytes: a million names of 64 letters
MAX_LABEL_NAME = 1000  # letters
MAX_ROW = 2**24  # letters of a row of metadata.jsonl: a picture with a million labels
_PICTURE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)


def read_label_names(path: Path) -> list[str]:
    """The names of a `labels.txt`, one a line in class order; blanks around names and trailing empty lines are dropped.
    Of a CSV (a tagger's `selected_tags.csv`) the column `name`.

    Raises:
        ValueError: an empty line between names, a name listed twice, one that is too long or has control characters, no
            name at all, with the line; a file of an absurd size.
    """
    if path.stat().st_size > MAX_LABEL_FILE:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than the limit of {MAX_LABEL_FILE:,}; give a list of "
            "label names, one a line."
        )
    if path.suffix.lower() == ".csv":
        numbered = _names_of_csv(path)
    else:
        numbered = [
            (number, line.strip())
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").rstrip().splitlines(), 1)
        ]
    if not numbered:
        raise ValueError(f"{path} is empty; write one label name a line.")
    line_of: dict[str, int] = {}
    for number, name in numbered:
        if not name:
            raise ValueError(f"{path}, line {number} is empty; write one label name a line.")
        if len(name) > MAX_LABEL_NAME or not name.isprintable():
            what = "control characters" if len(name) <= MAX_LABEL_NAME else f"{len(name):,} letters"
            raise ValueError(f"{path}, line {number}: the name {name[:40]!r} has {what}; write a plain one.")
        if name in line_of:
            raise ValueError(f"{path}, line {number}: {name!r} is listed before on line {line_of[name]}; keep one.")
        line_of[name] = number
    return list(line_of)


def _names_of_csv(path: Path) -> list[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if "name" not in (reader.fieldnames or ()):
                raise ValueError(f"{path}, line 1 has no column 'name'; give a selected_tags.csv or a labels.txt.")
            return [(reader.line_num, (row["name"] or "").strip()) for row in reader]
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.reader.line_num} is not valid CSV ({error}); correct it."
            ) from error


def pictures_below(folder: Path) -> set[str]:
    """Relative names of all picture files in a folder and its folders; hidden ones are none."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _PICTURE_SUFFIXES and not path.name.startswith((".", "__"))
    }


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


def check_policies(unlisted_pictures: str, missing_pictures: str) -> None:
    """Raises a ValueError for what is neither "error" nor "skip"."""
    for name, policy in (("unlisted_pictures", unlisted_pictures), ("missing_pictures", missing_pictures)):
        if policy not in ("error", "skip"):
            raise ValueError(f"{name}={policy!r} must be 'error' or 'skip'.")


def refuse_or_skip(names: list[str], policy: str, before: str, after: str) -> None:
    """Raises a ValueError that counts and names pictures (`before` and `after` stand around them), or logs a warning
    for the policy "skip"."""
    if names:
        count = f"{len(names)} picture{'s' if len(names) > 1 else ''}"
        message = f"{before} {count} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}) {after}"
        if policy == "error":
            raise ValueError(message)
        # The names in full, for whoever listens (training.check_data does).
        place = before.rpartition(" ")[0]
        logger.warning("Left out: %s", message, extra={"left_out": [f"{place}: {name}" for name in names]})
