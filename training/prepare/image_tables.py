"""Tables of well-known collections and tools: ChestX-ray14 (`Data_Entry_2017.csv`, labels divided by |, and the lists
of train_val and test), CheXpert (`train.csv`, `valid.csv`: 1, 0, -1 for uncertain, blank for not mentioned), Planet
(`train_v2.csv`: tags divided by blanks, names without suffix), ISIC (`image` and one column a label), and Roboflow's
`_classes.csv`. "No Finding" is no label. SOURCE: the folder with the tables and the images somewhere below it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ..data.csv_table import read_table
from ..data.formats import Files, isic_tables, with_other_splits
from ..data.label_cells import read_cell, read_number
from ..data.rows import SPLIT_NAMES
from ..options import option
from .objects import _split_of, check_table
from .reading import Reading, Rows, SourceOptions, text_lines


class _Kind(NamedTuple):
    """Where a table of this kind has its images and labels; `text` with its separator, or one column a label."""

    image: Sequence[str]
    text: str | None = None
    separator: str = ","
    beside: frozenset[str] = frozenset()  # columns that are no labels
    tables: Callable[[Files], list[str]] | None = None  # by default those with these columns


_PATIENT = frozenset(("Sex", "Age", "Frontal/Lateral", "AP/PA", "PRIMARY", "split"))
KINDS = {
    "chestxray14": _Kind(("Image Index",), "Finding Labels", "|"),
    "chexpert": _Kind(("Path",), beside=_PATIENT),
    "planet": _Kind(("image_name",), "tags", " "),
    "isic": _Kind(("image",), tables=isic_tables),
    "roboflow_csv": _Kind(
        ("filename",), tables=lambda files: [name for name in files.tables if Path(name).name == "_classes.csv"]
    ),
}
_MEANING = {"unknown": -1.0, "absent": 0.0, "present": 1.0}


@dataclass(kw_only=True)
class Options(SourceOptions):
    image_folder: str | None = option(None, "where the images are; null: below SOURCE")
    uncertain: Literal["unknown", "absent", "present"] = option("unknown", "what -1 means where a label has a column")
    blank: Literal["unknown", "absent", "present"] | None = option(
        None,
        "what a blank means there; null: absent in CheXpert, which leaves out what a report does not mention, "
        "unknown in others",
    )
    no_label: list[str] = field(
        default_factory=lambda: ["No Finding"], metadata={"help": "names that mean that no label is present"}
    )


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file and line."""
    files, kind = Files(args.source), KINDS[args.kind]
    wanted = {*kind.image, *([kind.text] if kind.text else ())}
    names = kind.tables(files) if kind.tables else [name for name, head in files.tables.items() if wanted <= set(head)]
    names = with_other_splits(names, files.tables)
    if not names:
        raise FileNotFoundError(f"{args.source} has no table with the columns {', '.join(sorted(wanted))}; give one.")
    rows, label_names = Rows(Path(args.image_folder) if args.image_folder else files.root, args), None
    split_of_image = _official_split(files) if args.kind == "chestxray14" else {}
    no_label = set(args.no_label or ())
    blank = _MEANING[args.blank or ("absent" if args.kind == "chexpert" else "unknown")]
    for name in names:
        path, (split, below) = files.root / name, _split_of(name)
        header, lines = read_table(path)
        check_table(path, header, lines, wanted)
        image = next(header.index(column) for column in kind.image if column in header)
        columns = [
            (index, column)
            for index, column in enumerate(header)
            if index != image and column not in kind.beside and column not in no_label
        ]
        if not kind.text:
            found = [column for _, column in columns]
            if label_names is not None and sorted(found) != sorted(label_names):
                odd = sorted(set(found) ^ set(label_names))[0]
                raise ValueError(f"{path}, line 1: the column {odd!r} is not in every table; make them the same.")
            label_names = label_names or found
        for line, cells in lines:
            where, file = f"{path}, line {line}", cells[image].strip()
            if not file:
                raise ValueError(f"{where} names no image; add it or delete the line.")
            unknown: list[str] = []
            if kind.text:
                labels = _of_text(cells[header.index(kind.text)], kind.separator, no_label, where)
            else:
                labels, unknown = _of_columns(cells, columns, _MEANING[args.uncertain], blank, where)
            part = split_of_image.get(file, split)
            inside = below or (part if part in SPLIT_NAMES else "")
            rows.add(part, [file], labels, where, unknown=unknown, below=[inside])
    return rows.reading(label_names)


def _of_text(cell: str, separator: str, no_label: set[str], where: str) -> list[str]:
    try:
        labels = read_cell(cell, separator)
    except ValueError as error:
        raise ValueError(f"{where}: {cell!r} {error}.") from error
    if labels is None or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where}: {cell!r} names no labels; correct it.")
    left = [label for label in labels if label not in no_label]
    if left and len(left) < len(labels):
        raise ValueError(f"{where}: {cell!r} names labels and says that there is none; correct it.")
    return left


def _of_columns(
    cells: list[str], columns: list[tuple[int, str]], uncertain: float, blank: float, where: str
) -> tuple[list[str], list[str]]:
    """The labels that are present, and those that are unknown."""
    present, unknown = [], []
    for index, column in columns:
        try:
            value = read_number(cells[index])
        except ValueError:
            raise ValueError(
                f"{where}: column {column!r} holds {cells[index]!r}, but must hold 1, 0, -1 or nothing."
            ) from None
        value = blank if value != value else uncertain if value == -1 else value
        if value not in (0, 1, -1, -100):
            raise ValueError(f"{where}: label {column!r} is {cells[index]}, but must be 1, 0, -1 or nothing.")
        if value == 1:
            present.append(column)
        elif value < 0:
            unknown.append(column)
    return present, unknown


def _official_split(files: Files) -> dict[str, str]:
    """The split of each image by `train_val_list.txt` and `test_list.txt`, where they are there."""
    split_of = {}
    for file, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        for name in files.names:
            if name.rpartition("/")[2] == file:
                for number, line in enumerate(text_lines(files.root / name), 1):
                    if split_of.setdefault(line, split) != split:
                        raise ValueError(f"{files.root / name}, line {number}: {line} is in the other list as well.")
    return split_of
