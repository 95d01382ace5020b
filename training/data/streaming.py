"""Images and labels of a streaming data set, row by row, for loops of one's own.

For `transformers.Trainer` with `max_steps`, too. `hsvlt train --streaming` reads its shards through `stream_loader.py`,
with the same labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from ..options import DatasetOptions
from .dataset import ImageResizer
from .label_column import LabelColumn
from .rows import Table
from .sparse_labels import SparseLabels, class_names


class RowLabels:
    """Labels of a few rows, read as `load` reads those of a whole table, but for what only a whole table tells.

    Args:
        options: How they are written.
        label_names: The vocabulary in class order.
        features: Of the rows; None: unknown.
        label_column, label_columns: As in `rows.Table`.

    Raises:
        ValueError: (when called) a row outside the label contract, or integers that may be ids or multi-hot alike.
    """

    def __init__(
        self,
        options: DatasetOptions,
        label_names: Sequence[str],
        features: Features | None,
        label_column: str,
        label_columns: Sequence[str] | None,
    ):
        self.options, self.label_names = options, list(label_names)
        self._column, self._columns = label_column, list(label_columns) if label_columns else None
        roots = self._columns or [label_column]
        if features is not None:
            roots = [name if name in features else name.partition(".")[0] for name in roots]
            self._features = Features({name: features[name] for name in roots})
        else:
            self._features = None
        self._roots = roots

    def __call__(self, rows: Sequence[dict], where: Callable[[int], str]) -> SparseLabels:
        """
        Args:
            where: Words for a row, by its place among `rows`.
        """
        column = self._of(rows, where)
        lists, own_names = column.lists(""), column.own_names("")
        integers = pa.types.is_integer(getattr(lists.type, "value_type", lists.type))
        if integers and not self._columns and own_names is None and self.options.label_format == "auto":
            raise ValueError(f"{where(0)}: one list of integers may be ids or multi-hot alike; set label_format.")
        return SparseLabels.from_arrow(
            lists,
            self.label_names,
            class_names=own_names,
            label_format="multi_hot" if self._columns else self.options.label_format,
            where=where,
            uncertain=self.options.uncertain,
            blank=self.options.blank,
        )

    def names(self, rows: Sequence[dict], where: Callable[[int], str]) -> list[list[str] | None]:
        """The names that each row lists, whatever the vocabulary.

        Raises:
            ValueError: labels that are no names.
        """
        column = self._of(rows, where)
        lists = column.of_names().get("")
        if lists is None:
            kind = column.lists("").type
            raise ValueError(
                f"{where(0)}: the labels ({kind}) carry no names; give label_names, or write a labels.txt with one "
                "name a line in class order."
            )
        return lists.to_pylist()

    def _of(self, rows: Sequence[dict], where: Callable[[int], str]) -> LabelColumn:
        values = {name: [row[name] for row in rows] for name in self._roots}
        table = Table({"": Dataset.from_dict(values, features=self._features)}, {"": where})
        table.label_column, table.label_columns = self._column, self._columns
        return LabelColumn(table, self.options, self.label_names)


class StreamingMultiLabelDataset(torch.utils.data.IterableDataset):
    """The samples of `MultiLabelDataset`, `pixel_values`, `labels` and `index` (the place in the stream), row by row.

    Every row is held against the label contract as it comes, so that a bad one ends the stream with its place and file.
    Shuffle the source (`source.shuffle(seed=..., buffer_size=...)`, then `set_epoch`); the shards of the source are
    divided among the workers of a `DataLoader`, which must be told `shuffle=False`.

    Args:
        source: Of `datasets.load_dataset(..., streaming=True)[split]`.
        label_names: The vocabulary in class order; None: the names in the features of `label_column`.
        processor: A `MultiLabelProcessor`, or any image processor of transformers.
        margin: As in `MultiLabelDataset`.
        image_column, label_column, label_columns, label_format, label_separator: As in `load`; lists
            of integers without names in the features need a `label_format` other than "auto".

    Raises:
        ValueError: no label names, or (while it is read) a row outside the label contract or an image that cannot be
            read.
    """

    def __init__(
        self,
        source: IterableDataset,
        label_names: Sequence[str] | None,
        processor,
        *,
        margin: float = 0.0,
        image_column: str = "image",
        label_column: str = "labels",
        label_columns: Sequence[str] | None = None,
        label_format: str = "auto",
        label_separator: str = ",",
    ):
        own_names = None
        if source.features is not None and not label_columns:
            own_names = class_names(source.features, label_column)
        names = label_names or label_columns or own_names
        if names is None:
            raise ValueError("The features of the stream name no labels; give label_names in class order.")
        if label_columns and sorted(names) != sorted(label_columns):
            raise ValueError("label_columns and label_names differ; give the same labels in both.")
        self.label_names = list(names)
        features = source.features
        self.source = source.cast_column(image_column, Image(decode=False))
        self._resize = ImageResizer(processor, margin)
        self._image_column = image_column
        options = DatasetOptions(dataset="", label_format=label_format, label_separator=label_separator)
        self._labels = RowLabels(options, names, features, label_column, label_columns)

    def __iter__(self) -> Iterator[dict]:
        for index, row in enumerate(self.source):
            image = row[self._image_column]
            path = (image or {}).get("path")
            where = f"row {index} of the stream" + (f" ({path})" if path else "")
            labels = self._labels([row], lambda _, where=where: where)
            try:
                pixels = self._resize.stored(image)
            except ValueError as error:
                raise ValueError(f"{where} cannot be read: {error}") from error
            yield {"pixel_values": pixels, "labels": labels.tensor(0), "index": index}

    def for_process(self, rank: int, world_size: int) -> StreamingMultiLabelDataset:
        """The part of one of `world_size` processes; together they give every row once, however many they are.

        Shards of the source are divided where their number allows it, so that no process reads what it does not use;
        else each process keeps every `world_size`-th row. `index` is then the place in the process's own part.
        """
        part = copy.copy(self)
        part.source = split_dataset_by_node(self.source, rank=rank, world_size=world_size)
        return part

    def set_epoch(self, epoch: int) -> None:
        """Another order of a shuffled source."""
        self.source.set_epoch(epoch)

    def state_dict(self) -> dict:
        """The place in the stream, for `load_state_dict`; exact where the source is read in this process."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state)
