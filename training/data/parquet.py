"""Rows of parquet files as they come, a few at a time, however large a row group is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

from .label_cells import is_text

_ROWS = 64  # that are read at once
_READ_BYTES = 2**20  # of a column at once: without it, pyarrow holds whole row groups


def read_features(file: str) -> Features:
    """The columns of a file or an address.

    Raises:
        ValueError: no parquet, or not a whole file.
    """
    try:
        with fsspec.open(file, "rb") as opened:
            return Dataset(pq.read_schema(opened).empty_table()).features
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a whole parquet file ({error}); fetch or write it again.") from error


def count_rows(file: str) -> int:
    with fsspec.open(file, "rb") as opened:
        return pq.read_metadata(opened).num_rows


def common_feature(column: str, schemas: Mapping[str, Mapping[str, Any]]) -> Any:
    """The feature of a column that holds the rows of all files. Where no row of a shard has an entry, writers leave
    its column without a type; where only some have one, integers become floats.

    Args:
        schemas: The features of each file.

    Raises:
        ValueError: a file without the column, or with another kind of it: numbers for names, names in another order.
    """
    for file, schema in schemas.items():
        _check_there(file, schema, [column])

    def rank(file: str) -> int:
        leaf = _leaf(schemas[file][column])
        kind = leaf if isinstance(leaf, pa.DataType) else pa.binary()
        return 2 if pa.types.is_null(kind) else 0 if pa.types.is_floating(kind) else 1

    chosen = min(schemas, key=rank)
    feature = schemas[chosen][column]
    for file, schema in schemas.items():
        if not _alike(schema[column], feature):
            raise ValueError(
                f"{file} has {str(schema[column])[:200]} in the column {column!r}, but {chosen} has "
                f"{str(feature)[:200]}: write all shards alike."
            )
    return feature


def _check_there(file: str, there: Collection[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(
                f"{file} has no column {column!r}, only {', '.join(there)}; name the right one with image_column, "
                "label_column or label_columns."
            )


def _alike(one: Any, other: Any) -> bool:
    one, other = _leaf(one), _leaf(other)
    if isinstance(one, dict) or isinstance(other, dict):  # of images and objects; what they hold is checked by the row
        return True
    if isinstance(one, ClassLabel) and isinstance(other, ClassLabel):
        return one.names == other.names
    kinds = [pa.int64() if isinstance(each, ClassLabel) else each for each in (one, other)]
    if any(pa.types.is_null(kind) for kind in kinds):
        return True
    return is_text(kinds[0]) == is_text(kinds[1])


def _leaf(feature: Any) -> Any:
    """What lists of it hold: a dictionary, a ClassLabel, or an Arrow type."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature if isinstance(feature, (dict, ClassLabel)) else getattr(feature, "pa_type", {})


def read_rows(file: str, row: int, columns: Sequence[str], image_column: str | None) -> Iterator[dict]:
    """The rows of a file or an address from `row` on, images as {"bytes": ..., "path": ...}.

    Raises:
        ValueError: (while it is read) no such column, or an image column that holds something else.
    """
    with (
        fsspec.open(file, "rb") as opened,
        pq.ParquetFile(opened, pre_buffer=False, buffer_size=_READ_BYTES) as table,
    ):
        _check_there(file, table.schema_arrow.names, columns)
        counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        first = 0
        while first < len(counts) and row >= counts[first]:
            row -= counts[first]
            first += 1
        for batch in table.iter_batches(_ROWS, row_groups=range(first, len(counts)), columns=list(columns)):
            for values in batch.slice(row).to_pylist():
                if image_column is not None:
                    values[image_column] = _image(values[image_column], file, image_column)
                yield values
            row = max(0, row - len(batch))


def _image(value: Any, file: str, column: str) -> dict | None:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if value is None or (isinstance(value, dict) and "bytes" in value):
        return value and {"bytes": value["bytes"], "path": value.get("path")}
    raise ValueError(f"{file} has {value!r:.60} in the column {column!r}, where an image's bytes should be.")
