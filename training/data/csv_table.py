"""Reads CSV tables of file names and labels, each row by its line; labels stay what they are, text or columns."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset

from .image_files import ImageFiles
from .rows import (
    SPLIT_ALIASES,
    SPLIT_NAMES,
    Table,
    check_policies,
    images_without_row,
    list_once,
    name_by_line,
    rows_without_image,
    splits_by_folder,
)
from .text import decode, delimiter_of

# What the column of file names is called where it is not what the caller said; the first is imagefolder's.
_FILE_COLUMNS = ("file_name", "filename", "image", "path")
_SPLIT_COLUMN = "split"
_FLAGS_OF_SPLITS = ("is_train", "is_valid", "is_val", "is_validation", "is_test")
_INDEX = ("", "unnamed: 0", "index")  # what the column of row numbers is called


def find_csv_tables(source: Path) -> dict[str, Path]:
    """The CSV of each split: `source` itself (""), or `<split>/metadata.csv`, `metadata.csv` or `<split>.csv` in it.

    A folder with a `selected_tags.csv` alone, with parquet, `metadata.jsonl` or `save_to_disk`'s files has none.
    """
    if source.suffix.lower() in (".csv", ".tsv") and source.is_file():
        return {"": source}
    # Stray tables (statistics, say) lie beside data of other formats as well.
    others = ("metadata.jsonl", "*/metadata.jsonl", "*.parquet", "*/*.parquet", "dataset_dict.json", "state.json")
    if not source.is_dir() or any(any(source.glob(pattern)) for pattern in others):
        return {}
    tables = {path.parent.name: path for path in sorted(source.glob("*/metadata.csv"))}
    paths = [path for path in sorted(source.glob("*.csv")) if path.name != "selected_tags.csv"]
    alone = len(paths) == 1 and not tables
    for path in paths:
        of_all = path.stem == "metadata" or (alone and path.stem.lower() not in SPLIT_NAMES)
        tables["" if of_all else path.stem] = path
    return tables


def read_csv_tables(
    tables: dict[str, Path],
    *,
    image_column: str = "image",
    label_column: str = "labels",
    label_columns: Sequence[str] | None = None,
    image_folder: str | Path | None = None,
    unlisted_images: str = "error",
    missing_images: str = "error",
) -> Table:
    """Reads CSV files (UTF-8; commas, or what spreadsheets write in their place) with a header, one row an image.

    Args:
        tables: By split; a table of the split "" may name the split of each row in a column `split`, else by its first
            folder where that is called so (`train/1.jpg`), else it is train.
        image_column: The column of file names; where it is missing `file_name`, `filename`, `image` or `path`.
        label_column: The column of texts, labels divided by a separator.
        label_columns: One column a label; where neither they nor `label_column` exist, all columns but file and split.
        image_folder: Where file names start; None: the folder of each table.
        unlisted_images, missing_images: As in `image_folder.read_image_folders`.

    Returns:
        The splits as text columns, images as whole paths; rows are named by file, line, image.

    Raises:
        ValueError: no such column, a line with more or fewer cells than the header, an image named twice, an image
            that does not exist; with file and line.
    """
    check_policies(unlisted_images, missing_images)
    columns: dict[str, dict[str, list[str]]] = {}  # of each split
    row_names: dict[str, tuple[Path, list[int], list[str]]] = {}  # a split is in one table
    files: dict[Path, ImageFiles] = {}  # of each folder of images
    left_out = []
    kept = first_header = file_column = None
    aliases = [SPLIT_ALIASES.get(table, table) for table in tables]
    for table, alias in zip(tables, aliases, strict=True):
        if aliases.count(alias) > 1 or (len(aliases) > 1 and not table):
            raise ValueError(f"{tables[table]} is not the only table for its split; keep one table a split.")
    for table, path in tables.items():
        root = Path(image_folder) if image_folder is not None else path.parent
        header, rows = read_table(path)
        if kept is None:
            first_header = header
            file_column = next((name for name in (image_column, *_FILE_COLUMNS) if name in header), None)
            if file_column is None:
                raise ValueError(
                    f"{path}, line 1 has no column {image_column!r} or file_name, only {', '.join(header)}; name the "
                    "column of file names with image_column."
                )
            if label_columns is None and label_column not in header:
                label_columns = [name for name in header if name not in (file_column, _SPLIT_COLUMN)]
            kept = list(label_columns or [label_column])
        for name in (file_column, *kept):
            if name not in header:
                raise ValueError(f"{path}, line 1 has no column {name!r}, only {', '.join(header)}; add it.")
        if set(header) != set(first_header):
            odd = sorted(set(header) ^ set(first_header))[0]
            raise ValueError(f"{path}, line 1: the column {odd!r} is not in every table; give all the same columns.")
        of_file, of_kept = header.index(file_column), [header.index(name) for name in kept]
        of_split = header.index(_SPLIT_COLUMN) if not table and _SPLIT_COLUMN in header else None
        if root not in files:
            files[root] = ImageFiles(root)
        first, missing, file_names = {}, [], []
        for line, row in rows:
            file_name = posixpath.normpath(row[of_file].strip().replace("\\", "/")) if row[of_file].strip() else ""
            if not file_name:
                raise ValueError(f"{path}, line {line} names no image in {file_column!r}; add it or delete the line.")
            file_names.append(files[root].meant(file_name))
        by_folder = None
        if of_split is None:
            by_folder = splits_by_folder(file_names, lambda row, lines=rows, path=path: f"{path}, line {lines[row][0]}")
        if of_split is None and not by_folder:
            _refuse_hidden_splits(path, header, rows)
        if by_folder and table and len(set(by_folder)) > 1:
            odd = next(row for row, split in enumerate(by_folder) if split != by_folder[0])
            raise ValueError(
                f"{path}, line {rows[odd][0]} names {file_names[odd]!r}, though rows before are of {by_folder[0]!r}; "
                "keep one table a split, or put all rows into metadata.csv."
            )
        for number, (line, row) in enumerate(rows):
            file_name = file_names[number]
            list_once(first, file_name, f"{path}, line {line}", f"line {line}")
            split = table or (by_folder[number] if by_folder else "train")
            if of_split is not None:
                split = row[of_split].strip()
                if not re.match(r"[^\W\d]", split):
                    what = f"{split!r} for a split" if split else "no split"
                    raise ValueError(
                        f"{path}, line {line} ({file_name}) names {what}; write train, validation or test."
                    )
                split = split.lower() if split.lower() in SPLIT_NAMES else split
            split = SPLIT_ALIASES.get(split, split)
            if not files[root].holds(file_name):
                missing.append((split, f"line {line}: {file_name}"))
                continue
            of_this = columns.setdefault(split, {name: [] for name in (file_column, *kept)})
            of_this[file_column].append(os.path.normpath(root / file_name))
            for name, index in zip(kept, of_kept, strict=True):
                of_this[name].append(row[index])
            _, numbers, names = row_names.setdefault(split, (path, [], []))
            numbers.append(line)
            names.append(file_name)
        left_out += rows_without_image(missing, missing_images, path, root)
    for root, images in files.items():
        left_out += images_without_row(images.unlisted(), "", unlisted_images, root, "a table")
    if not columns:
        raise ValueError(f"{', '.join(map(str, tables.values()))} holds no row with an image; add some.")
    return Table(
        {name: Dataset.from_dict(of_split) for name, of_split in columns.items()},
        {name: partial(name_by_line, *of_split) for name, of_split in row_names.items()},
        image_column=file_column,
        label_column=label_column,
        label_columns=list(label_columns) if label_columns else None,
        left_out=left_out,
    )


def _refuse_hidden_splits(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> None:
    """
    Raises:
        ValueError: a column that is not called so says of each row whether it is for training, which would be lost.
    """
    for index, name in enumerate(header):
        values = {row[index].strip().lower() for _, row in rows}
        if name.lower() in _FLAGS_OF_SPLITS or (len(values) > 1 and values <= SPLIT_NAMES):
            raise ValueError(
                f"{path}, line 1: the column {name!r} seems to say the split of each row; call it 'split' and write "
                "train, validation or test in it, or take it out."
            )


def csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV that are not blank, with their lines.

    Raises:
        ValueError: not CSV or not UTF-8, with the line.
    """
    text = decode(path.read_bytes(), path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(path.name, text), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not valid CSV ({error}); correct it.") from error


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows of a CSV (`.tsv`: with tabs) with their lines; blank lines are none.

    What programs add is taken away: a column of row numbers without a name (or `Unnamed: 0`, `index`), and empty
    columns and cells at the end.

    Raises:
        ValueError: not CSV or not UTF-8, a header that is not one name a column, a row of another length; with line.
    """
    rows = csv_rows(path)
    if not rows:
        raise ValueError(f"{path} is empty; write a header and one line an image.")
    header, rows = [name.strip() for name in rows[0][1]], rows[1:]
    while len(header) > 1 and not header[-1] and not any(len(row) >= len(header) and row[-1] for _, row in rows):
        header.pop()
    for line, row in rows:
        while len(row) > len(header) and not row[-1].strip():
            row.pop()
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line} has {len(row)} cells for {len(header)} columns; quote cells that hold a comma."
            )
    if header[0].lower() in _INDEX and rows and len(header) > 1:
        first = [row[0].strip() for _, row in rows]
        if any(first == [str(number) for number in range(begin, begin + len(rows))] for begin in (0, 1)):
            header, rows = header[1:], [(line, row[1:]) for line, row in rows]
    for name in header:
        if not name or header.count(name) > 1:
            raise ValueError(f"{path}, line 1: the header has {name!r} twice or empty; name each column once.")
    return header, rows
