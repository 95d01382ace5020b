"""The labels of a table as lists, whatever they are written as: text, lists of names or ids, one column a label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pyarrow as pa

from ..options import DatasetOptions
from .label_cells import clean_names, is_text, split_text, stack_columns
from .rows import Table
from .sparse_labels import arrow_column, class_names, names_of_ids

logger = logging.getLogger(__name__)


class LabelColumn:
    """The column or columns of labels of every split.

    Args:
        table: Of a reader; its `label_columns` are put in the order of the names.
        options: How the labels are written.
        names: The vocabulary where it is known.

    Attributes:
        known: The vocabulary where it is known, without the names of `options.no_label`.

    Raises:
        ValueError: other names than columns.
    """

    def __init__(self, table: Table, options: DatasetOptions, names: Sequence[str] | None):
        self.table, self.options, self.no_label = table, options, frozenset(options.no_label or ())
        self.known = [name for name in names or table.label_columns or () if name not in self.no_label]
        if table.label_columns:
            columns = [name for name in table.label_columns if name not in self.no_label]
            if sorted(self.known) != sorted(columns):
                odd = sorted(set(self.known) ^ set(columns))[0]
                raise ValueError(
                    f"{odd!r} is not among both the label columns and the label names; give the same in both."
                )
            table.label_columns = self.known
        self._known = frozenset(self.known)
        self.lists = cache(self._lists)  # the names are looked for in them before they are parsed

    def own_names(self, split: str) -> list[str] | None:
        """The names that the ids of a split stand for, where its feature has them."""
        if self.table.label_columns or self.no_label:
            return None
        return class_names(self.table.splits[split].features, self.table.label_column)

    def class_names(self) -> list[str]:
        """The names in the features of the column, without those of `no_label`; empty where there are none."""
        found = (class_names(split.features, self.table.label_column) for split in self.table.splits.values())
        return [name for name in next(filter(None, found), ()) if name not in self.no_label]

    def of_names(self) -> dict[str, pa.Array]:
        """The lists of every split that has any, where they are names."""
        root = self.table.label_column.partition(".")[0]
        there = [] if self.table.label_columns else self.table.splits.items()
        columns = {
            name: self.lists(name)
            for name, split in there
            if len(split) and (root in split.column_names or self.table.label_column in split.column_names)
        }
        return {name: column for name, column in columns.items() if _lists_text(column.type)}

    def _lists(self, split: str) -> pa.ChunkedArray | pa.Array:
        table, where = self.table, self.table.row_names[split]
        if table.label_columns:
            return stack_columns(table.splits[split], table.label_columns, where)
        column = arrow_column(table.splits[split], table.label_column)
        own_names = class_names(table.splits[split].features, table.label_column)
        if is_text(column.type):
            column = split_text(column, self.options.label_separator, self.options.label_format, where, self._known)
        elif self.no_label and own_names:
            column = names_of_ids(column, own_names)
        if _lists_text(column.type):
            column = clean_names(column, where, known=self._known, no_label=self.no_label)
        return column


# Where data sets of objects keep the labels that others keep in `labels`.
_FIELDS = ("objects.category", "objects.label", "objects.labels", "objects.categories", "annotations.category")


def label_field(columns: Mapping[str, Any]) -> str | None:
    """`objects.category` and its like, where there is no column `labels` and just one such field; says so."""
    if "labels" in columns:
        return None
    found = []
    for field in _FIELDS:
        root, name = field.split(".")
        inner = columns.get(root)
        inner = getattr(inner, "feature", inner)
        if isinstance(inner, dict) and name in inner:
            found.append(field)
    if len(found) != 1:
        return None
    logger.warning("There is no column 'labels'; the labels are those of %s.", found[0])
    return found[0]


def _lists_text(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) and is_text(getattr(kind, "value_type", kind))
