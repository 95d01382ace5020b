"""Tables with a row an object: OpenImages (`ImageID`, `LabelName`, with the names in class-descriptions), Roboflow's
`_annotations.csv` (`filename`, `class`, boxes), and others with those columns. An image has the labels of its rows; a
row of OpenImages with `Confidence` 0 says that the label is absent. Labels that OpenImages did not judge are taken as
absent; --unjudged unknown. SOURCE: the folder with the tables and the images, or one table."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.csv_table import csv_rows, read_table
from ..data.formats import OBJECT_COLUMNS, Files, object_tables
from ..data.rows import SPLIT_NAMES
from ..options import option
from .reading import Reading, Rows, SourceOptions, usual_name

logger = logging.getLogger(__name__)

_IMAGE, _LABEL = ("ImageID", "filename", "image"), ("LabelName", "class", "label")


@dataclass(kw_only=True)
class Options(SourceOptions):
    image_folder: str | None = option(None, "where the images are; null: below SOURCE")
    unjudged: Literal["absent", "unknown"] = option("absent", "labels that no row of an image of OpenImages names")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file and line."""
    files = Files(args.source)
    names = object_tables(files)
    if not names:
        raise FileNotFoundError(
            f"{args.source} has no table with a row an object; give one with ImageID and LabelName."
        )
    rows = Rows(Path(args.image_folder) if args.image_folder else files.root, args)
    words = _descriptions(files)
    found: dict[tuple[str, str], tuple[str, dict[str, bool]]] = {}  # by split and image: its first row, its labels
    judged = False
    for name in names:
        split, below = _split_of(name)
        header, lines = read_table(files.root / name)
        known = next((columns for columns in OBJECT_COLUMNS if columns & set(header)), OBJECT_COLUMNS[0])
        check_table(files.root / name, header, lines, known)
        image, label = (next(header.index(key) for key in keys if key in header) for keys in (_IMAGE, _LABEL))
        confidence = header.index("Confidence") if "Confidence" in header else None
        for line, cells in lines:
            where = f"{files.root / name}, line {line}"
            key, text = cells[image].strip(), cells[label].strip()
            if not key:
                raise ValueError(f"{where} names no image; add it or delete the line.")
            _, labels = found.setdefault((split, f"{below}/{key}" if below else key), (where, {}))
            if not text:
                continue  # an image without an object
            if words and text.startswith("/") and text not in words:
                raise ValueError(f"{where}: {text} is not in class-descriptions; add its name.")
            present = True
            if confidence is not None:
                try:
                    present = float(cells[confidence]) > 0
                except ValueError:
                    raise ValueError(f"{where}: Confidence is {cells[confidence]!r}, but must be a number.") from None
            judged |= not present
            shown = words.get(text, text)
            labels[shown] = labels.get(shown, False) or present
    every = {label for _, labels in found.values() for label in labels}
    if judged and args.unjudged == "absent":
        logger.warning("Labels that no row of an image names are taken as absent; --unjudged unknown leaves them open.")
    for (split, image), (where, labels) in found.items():
        unknown = sorted(every - set(labels)) if args.unjudged == "unknown" else ()
        folder, _, file = image.rpartition("/")
        present = sorted(label for label, shown in labels.items() if shown)
        rows.add(split, [image, file], present, where, unknown=unknown, below=[folder or split])
    return rows.reading(also=every)


def check_table(path: Path, header: Collection[str], rows: Collection, wanted: Collection[str]) -> None:
    """
    Raises:
        ValueError: a column that is not there, or a header alone.
    """
    if gone := sorted(set(wanted) - set(header)):
        raise ValueError(f"{path}, line 1 has no column {gone[0]!r}; correct it, or take the file away.")
    if not rows:
        raise ValueError(f"{path} has a header and no rows; fetch it again, or take the file away.")


def _split_of(name: str) -> tuple[str, str]:
    """The split of a table, and the folder that its images are in where that is the split's."""
    folder, _, file = name.rpartition("/")
    if folder.partition("/")[0].lower() in SPLIT_NAMES:
        return folder.partition("/")[0], folder
    words = Path(file).stem.replace("-", "_").split("_")
    return next((word for word in words if usual_name(word).lower() in SPLIT_NAMES and word), ""), ""


def _descriptions(files: Files) -> dict[str, str]:
    """Names by OpenImages' codes, from `class-descriptions*.csv`, with a header or without."""
    words = {}
    for name in files.by_suffix.get(".csv", ()):
        if "class-descriptions" in name.rpartition("/")[2]:
            path = files.root / name
            for line, row in csv_rows(path):
                if len(row) == 2 and row[0].startswith("/"):
                    words[row[0].strip()] = row[1].strip()
                elif line > 1:
                    raise ValueError(f"{path}, line {line} is {','.join(row)!r}, but must be a code and a name.")
    return words
