"""A streaming dataset as a run needs it: train as a stream, and of each other split a part that stays the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow as pa
from datasets import Dataset, Features, Image
from tqdm.auto import tqdm

from modeling_hsvlt.label_names import check_label_names

from ..options import DatasetOptions
from .rows import Loaded, Split, no_such_split
from .shards import Row, Shards, open_shards
from .sparse_labels import class_names
from .streaming import RowLabels
from .vocabulary import names_of_splits

PART_SHARDS = 32  # of which a part has the first rows: each has to be opened
_CHUNK = 1000  # rows whose labels are read at once


@dataclass
class StreamSplit:
    """The train split, in place of a `rows.Split`: its rows are not counted, and their labels not known beforehand."""

    shards: Shards
    row_labels: RowLabels
    labels = None
    drawn = True  # no check beforehand: images are checked as they come

    def row_name(self, index: int) -> str:
        return self.shards.name(index)

    def name_of(self, rows: Sequence[Row], place: int) -> str:
        """Words for one of some rows."""
        return _name(self.shards, rows, place)


def load_streamed(options: DatasetOptions, splits: Sequence[str], *, train: bool = False) -> Loaded:
    """Opens a dataset of shards.

    A split but train is read here, at most `options.validation_images` of its rows: the first ones of up to 32 shards,
    evenly spaced. Where there is no validation split, it is such a part of train, which the stream then leaves out.

    Args:
        train: Whether "train" may be among the splits.

    Raises:
        ValueError, FileNotFoundError: one sentence that says what is wrong and what to do.
    """
    if "train" in splits and not train:
        raise ValueError(
            f"The train split of {options.dataset} is a stream, which only hsvlt train reads: choose another split, or "
            "leave out --streaming."
        )
    shards, names = open_shards(options)
    names = _label_names(options, shards, names)
    names = [name for name in names if name not in (options.no_label or ())]
    check_label_names(names)
    loaded = Loaded({}, names)
    for name in splits:
        hold_out = name == "validation" and name not in shards and "train" in shards
        of_split = shards.get("train" if hold_out else name)
        if of_split is None:
            raise no_such_split(name, shards, options.dataset)
        labels = _row_labels(options, names, of_split)
        if name == "train":
            loaded.splits[name] = StreamSplit(of_split, labels)
        else:
            loaded.splits[name] = _part(of_split, labels, options.validation_images, hold_out, name)
            loaded.validation_of_train |= hold_out
    return loaded


def stream_label_names(options: DatasetOptions, otherwise: list[str] | None = None) -> list[str]:
    """The vocabulary: `label_names`, else `labels.txt` beside the shards, else the names in the features of the column,
    else `label_columns`, else the sorted names that all rows of all splits list, for which all labels are read.

    Args:
        otherwise: What to take in place of reading all labels.

    Raises:
        ValueError: labels without names.
    """
    return _label_names(options, *open_shards(options), otherwise)


def _label_names(
    options: DatasetOptions, shards: dict[str, Shards], names: list[str] | None, otherwise: list[str] | None = None
) -> list[str]:
    some = next(iter(shards.values()))
    names = names or some.label_columns
    names = names or class_names(some.features, some.label_column)
    return names or otherwise or _collect_names(options)


def _collect_names(options: DatasetOptions) -> list[str]:
    places: dict[str, dict[str, str]] = {}  # of the first row that lists a name, by split
    shards, _ = open_shards(options, only="labels")
    with tqdm(desc="Reading labels", unit="row") as progress:
        for split, of_split in shards.items():
            labels, first = _row_labels(options, [], of_split), places.setdefault(split, {})
            for rows in _chunks(of_split):
                lists = labels.names([row.values for row in rows], partial(_name, of_split, rows))
                for place, of_row in enumerate(lists):
                    for name in of_row or ():
                        if name not in first:
                            first[name] = _name(of_split, rows, place)
                progress.update(len(rows))
    lists = {split: pa.array([[name] for name in first], pa.list_(pa.string())) for split, first in places.items()}
    row_names = {split: list(first.values()).__getitem__ for split, first in places.items()}
    return names_of_splits(lists, row_names)[0]


def _chunks(shards: Shards) -> Iterator[list[Row]]:
    for shard in range(len(shards)):
        reader = shards.read(shard)
        while rows := list(islice(reader, _CHUNK)):
            yield rows


def _row_labels(options: DatasetOptions, names: Sequence[str], shards: Shards) -> RowLabels:
    return RowLabels(options, names, shards.features, shards.label_column, shards.label_columns)


def _part(shards: Shards, labels: RowLabels, count: int, hold_out: bool, split: str) -> Split:
    """
    Raises:
        ValueError: no rows, or, where the others are to be trained on, none of them left.
    """
    opened = min(len(shards), PART_SHARDS, count)
    each, rows = count // opened, []
    # Those of a Hub take a while; every process reads them.
    for place in tqdm(
        range(opened), f"Reading {split}", unit="shard", delay=2, disable=os.environ.get("RANK", "0") != "0"
    ):
        shard = place * len(shards) // opened
        reader = shards.read(shard)
        first = list(islice(reader, each))
        if hold_out:
            if next(reader, None) is None:
                raise ValueError(
                    f"There is no split 'validation', so validation_images {count} takes the first {each} rows of "
                    f"{opened} shards of train, and {shards.files[shard]} has but {len(first)}: lower "
                    "validation_images, or add the split."
                )
            shards.held_out[shard] = len(first)
        rows += first
    if not rows:
        raise ValueError(f"The split {split!r} has no rows: add some, or leave the split out.")
    where = [_name(shards, rows, place) for place in range(len(rows))]
    values = [row.values for row in rows]
    images = [row[shards.image_column] for row in values]
    images = [image if (image or {}).get("bytes") else None for image in images]  # a path may lead anywhere
    of_images = Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    return Split(of_images, labels(values, where.__getitem__), where.__getitem__)


def _name(shards: Shards, rows: Sequence[Row], place: int) -> str:
    row = rows[place]
    path = (row.values.get(shards.image_column) or {}).get("path")
    return f"{shards.files[row.shard]}, row {row.row}" + (f" ({path})" if path else "")
