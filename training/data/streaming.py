"""Images and labels of a streaming data set, which is never on disk as a whole.

For `transformers.Trainer` with `max_steps`, and for loops of one's own. `training.train` needs a data set with rows to
count, check beforehand, shuffle exactly and score whole: write a stream to disk with `datasets`, or load it without
`streaming=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from .dataset import ImageResizer
from .label_cells import clean_names, is_text, split_text, stack_columns
from .sparse_labels import SparseLabels, class_names


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
        self._own_names = None
        if source.features is not None and not label_columns:
            self._own_names = class_names(source, label_column)
        names = label_names or label_columns or self._own_names
        if names is None:
            raise ValueError("The features of the stream name no labels; give label_names in class order.")
        if label_columns and sorted(names) != sorted(label_columns):
            raise ValueError("label_columns and label_names differ; give the same labels in both.")
        self.label_names = list(names)
        self.source = source.cast_column(image_column, Image(decode=False))
        self._resize = ImageResizer(processor, margin)
        self._image_column, self._label_column = image_column, label_column
        self._columns = self.label_names if label_columns else None
        self._format, self._separator = label_format, label_separator

    def __iter__(self) -> Iterator[dict]:
        for index, row in enumerate(self.source):
            image = row[self._image_column]
            path = (image or {}).get("path")
            where = f"row {index} of the stream" + (f" ({path})" if path else "")
            labels = self._labels(row, lambda _, where=where: where)
            try:
                pixels = self._resize.stored(image)
            except ValueError as error:
                raise ValueError(f"{where} cannot be read: {error}") from error
            yield {"pixel_values": pixels, "labels": labels.tensor(0), "index": index}

    def _labels(self, row: dict, where) -> SparseLabels:
        if self._columns:
            cells = Dataset.from_dict({name: [row[name]] for name in self._columns})
            column, label_format = stack_columns(cells, self._columns, where), "multi_hot"
        else:
            value, label_format = row[self._label_column], self._format
            column = pa.array([value])
            if isinstance(value, str):
                column = split_text(pa.chunked_array([column]), self._separator, label_format, where)
            elif self._own_names is None and label_format == "auto" and value and isinstance(value[0], int):
                raise ValueError(f"{where(0)}: one list of integers may be ids or multi-hot alike; set label_format.")
            if pa.types.is_nested(column.type) and is_text(column.type.value_type):
                column = clean_names(column, where, known=self.label_names)
        return SparseLabels.from_arrow(
            column, self.label_names, class_names=self._own_names, label_format=label_format, where=where
        )

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
