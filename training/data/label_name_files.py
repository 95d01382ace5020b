"""Files of label names: one name a line, or a CSV with a column `name`, as taggers ship."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from modeling_hsvlt.label_names import fault_of_label_name

from .text import read_text

# Far above what people write and far below what fills a memory: these files come from strangers as well.
MAX_LABEL_FILE = 2**26  # bytes: a million names of 64 letters


def given_names(names: Sequence[str] | None) -> list[str] | None:
    """The vocabulary that the option `label_names` gives: the names, or those in the one file that it names."""
    if names and len(names) == 1 and Path(names[0]).suffix.lower() in (".txt", ".csv"):
        return read_label_names(Path(names[0]))
    return list(names) if names else None


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
        numbered = [(number, line.strip()) for number, line in enumerate(read_text(path).rstrip().split("\n"), 1)]
    if not numbered:
        raise ValueError(f"{path} is empty; write one label name a line.")
    line_of: dict[str, int] = {}
    for number, name in numbered:
        if not name:
            raise ValueError(f"{path}, line {number} is empty; write one label name a line.")
        if fault := fault_of_label_name(name):
            raise ValueError(f"{path}, line {number}: the name {name[:40]!r} {fault}; write a plain one.")
        if name in line_of:
            raise ValueError(f"{path}, line {number}: {name!r} is listed before on line {line_of[name]}; keep one.")
        line_of[name] = number
    return list(line_of)


def _names_of_csv(path: Path) -> list[tuple[int, str]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        if "name" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}, line 1 has no column 'name'; give a selected_tags.csv or a labels.txt.")
        return [(reader.line_num, (row["name"] or "").strip()) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num} is not valid CSV ({error}); correct it.") from error
