"""What every kind gives back, and the rows of a split on the way there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image

from modeling_hsvlt.label_contract import UNKNOWN_LABEL

from ..data.image_files import ImageFinder
from ..data.label_cells import clean_names
from ..data.load import load
from ..data.rows import SPLIT_ALIASES, SPLIT_NAMES, Split, Table, list_once, refuse_or_skip
from ..data.sparse_labels import SparseLabels
from ..data.text import parse_json, read_text
from ..options import option


@dataclass(kw_only=True)
class SourceOptions:
    """Of a data set in files of its own."""

    source: Path = option(reason="where it was unpacked to, see above", positional=True, metavar="SOURCE")
    missing_images: Literal["error", "skip"] = option("error", "listed but not there; skip leaves out, and says so")
    unlisted_images: Literal["error", "skip"] = option("skip", "there but not listed; skip leaves out, and says so")


@dataclass(kw_only=True)
class Reading:
    """A data set that was read.

    Attributes:
        splits: As `load` gives them, by the names that the source has for them.
        label_names: In class order.
        usual_names: What a split of the source is called in a Hugging Face dataset, for those to take by default.
        title: Of the data set that `published` is about.
        published: Images, and images that show a label (None: not published), by the source's name of the split.
    """

    splits: dict[str, Split]
    label_names: list[str]
    usual_names: dict[str, str]
    title: str = ""
    published: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    held: Any = None  # what the images are in until they are written


class Rows:
    """The rows of all splits with the names of their labels: what the reader of a format fills.

    Args:
        folder: With all images somewhere below it; None where every row gives its file.
        options: Those of `SourceOptions`.
        unlisted: Whether images that no row names matter.
    """

    def __init__(self, folder: Path | None, options: Any, *, unlisted: bool = True):
        self.finder = None if folder is None else ImageFinder(folder)
        self.missing_images = options.missing_images
        self.unlisted_images = options.unlisted_images if unlisted and folder is not None else None
        self._images: dict[str, list[str]] = {}
        self._labels: dict[str, list[list[str]]] = {}
        self._unknown: dict[str, list[Collection[str]]] = {}
        self._places: dict[str, list[str]] = {}
        self._missing: list[tuple[str, str]] = []
        self._first: dict[str, str] = {}

    def add(
        self,
        split: str,
        image: Path | Sequence[str] | None,
        labels: Iterable[str],
        where: str,
        *,
        unknown: Collection[str] = (),
        name: str = "",
        below: Sequence[str] = (),
    ) -> None:
        """One image.

        Args:
            split: As the source calls it, see `usual_name`.
            image: Its file, or names for `finder` of which the first counts that is there; None: not there.
            labels: Those that it shows.
            where: Words for its file and line.
            unknown: Labels of which it is not known whether it shows them.
            name: For messages; by default the first of its names.
            below: As in `ImageFinder.find`.

        Raises:
            ValueError: the image has a row already, or its name may mean several.
        """
        if image is not None and not isinstance(image, Path):
            names, image = image, None
            name = name or names[0]
            try:
                image = next(filter(None, (self.finder.find(each, *below) for each in names)), None)
            except ValueError as error:
                raise ValueError(f"{where}: {error}.") from error
        if image is None:
            self._missing.append((split, f"{where}: {name}"))
            return
        list_once(self._first, str(image), where, where)
        for columns, value in (
            (self._images, str(image)),
            (self._labels, list(dict.fromkeys(labels))),
            (self._unknown, unknown),
            (self._places, f"{where} ({name or image})"),
        ):
            columns.setdefault(split, []).append(value)

    def reading(self, label_names: list[str] | None = None, also: Iterable[str] = (), **options) -> Reading:
        """The splits, held against the label contract as any other; says which images no row names.

        Args:
            label_names: The vocabulary; by default the names of all splits, and `also` these.
            options: Of `load`.

        Raises:
            ValueError: images that are not there or in no row, as the policies say; none at all; bad labels.
        """
        left = "that are not there; add them, or pass --missing_images skip."
        refuse_or_skip("missing_image", self._missing, self.missing_images, "The source", "names", left)
        if self.unlisted_images is not None:
            unlisted = [("", name) for name in self.finder.unlisted()]
            left = "that nothing labels; label them, take them out, or pass --unlisted_images skip."
            refuse_or_skip("unlisted_image", unlisted, self.unlisted_images, str(self.finder.folder), "holds", left)
        if not self._images:
            raise ValueError("The source names no image that is there; check its folder.")
        table = Table({}, {name: partial(getitem, places) for name, places in self._places.items()})
        partly = any(map(any, self._unknown.values()))
        for split in sorted(self._images, key=lambda split: usual_name(split) != "train"):
            images = self._images[split]
            labels = pa.array(self._labels[split], pa.large_list(pa.large_string()))
            labels = clean_names(labels, table.row_names[split], known=label_names or ())
            data = Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
            table.splits[split] = data.add_column("labels", labels)
        loaded = load(table, label_names=label_names, **options)
        unknown = {name for rows in self._unknown.values() for names in rows for name in names}
        if label_names is None and (more := unknown.union(also).difference(loaded.label_names)):
            loaded = load(table, label_names=sorted(more.union(loaded.label_names)), **options)
        if partly:
            index = {name: label for label, name in enumerate(loaded.label_names)}
            for split, rows in loaded.splits.items():
                rows.labels = _with_unknown(rows.labels, self._unknown[split], index)
        return Reading(
            splits=loaded.splits,
            label_names=loaded.label_names,
            usual_names={name: usual_name(name) for name in loaded.splits},
        )


def usual_name(split: str) -> str:
    """What a split of a source is called here: `val2014` is validation; nothing, `default` and `all` are train."""
    bare = re.sub(r"[\d_-]+$", "", split)
    if bare.lower() in ("", "default", "all"):
        return "train"
    return SPLIT_ALIASES.get(bare.lower(), bare.lower() if bare.lower() in SPLIT_NAMES else bare)


def read_json(path: Path, drop: str = "") -> Any:
    """What a JSON file holds, without the entries `drop` of its objects.

    Raises:
        ValueError: no JSON as `parse_json` takes it, or not UTF-8, with the line.
    """
    text = read_text(path)
    try:
        return parse_json(text, drop)
    except ValueError as error:
        raise ValueError(f"{path} {error}; fetch or write it again.") from error


def _with_unknown(labels: SparseLabels, unknown: Sequence[Collection[str]], index: dict[str, int]) -> SparseLabels:
    """The labels, where those that are unknown are."""
    rows, ids, values = [], [], []
    for row, names in enumerate(unknown):
        entries = dict.fromkeys((index[name] for name in names if name in index), UNKNOWN_LABEL)
        entries |= dict(zip(*(array.tolist() for array in labels.entries(row)), strict=True))
        rows += [row] * len(entries)
        ids += sorted(entries)
        values += [entries[label] for label in sorted(entries)]
    starts = np.searchsorted(rows, np.arange(len(labels) + 1))
    return replace(
        labels,
        starts=starts.astype(np.int64),
        ids=np.array(ids, dtype=np.int64),
        values=np.array(values, dtype=np.float32),
        label_format="multi_hot",
    )


def text_lines(path: Path) -> list[str]:
    """The lines of a list, without blanks at their ends and without empty lines at the end of the file.

    Raises:
        FileNotFoundError, ValueError: no such file, or no UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder that the data set was unpacked to.")
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def first_folder(*folders: Path) -> Path:
    """The first that exists; the last where none does."""
    return next((folder for folder in folders if folder.is_dir()), folders[-1])
