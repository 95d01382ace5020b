"""A label column of any supported format as sparse rows, checked against the label contract.

Ten thousand labels a picture are mostly zeros: rows keep only what is not zero until a batch is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_hsvlt.losses_multilabel import UNKNOWN_LABEL

LABEL_FORMATS = ("auto", "names", "ids", "multi_hot")


@dataclass
class SparseLabels:
    """Labels of `rows` pictures in compressed sparse rows.

    Attributes:
        starts: (rows + 1,) int64; the entries of row `i` are `starts[i]` to `starts[i + 1]`.
        ids: (entries,) int64 label indices, rising within a row.
        values: (entries,) float32 in [0, 1], or -100 for unknown.
        default: (rows,) float32, the value of every label that has no entry: 0, or -100 for a row that is `null`.
        num_labels: Length of a dense row.
        label_format: The format that was read: "names", "ids" or "multi_hot".
    """

    starts: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    default: np.ndarray
    num_labels: int
    label_format: str

    def __len__(self) -> int:
        return len(self.default)

    def dense(self, row: int) -> np.ndarray:
        """(num_labels,) float32 labels of one picture: 1 present, 0 absent, between them soft, -100 unknown."""
        labels = np.full(self.num_labels, self.default[row], dtype=np.float32)
        entries = slice(self.starts[row], self.starts[row + 1])
        labels[self.ids[entries]] = self.values[entries]
        return labels

    def positives(self) -> np.ndarray:
        """(num_labels,) int64: how many pictures show each label (a soft label from 0.5 on counts)."""
        return np.bincount(self.ids[self.values >= 0.5], minlength=self.num_labels)

    @classmethod
    def from_arrow(
        cls,
        column: pa.ChunkedArray,
        label_names: Sequence[str],
        *,
        class_names: Sequence[str] | None = None,
        label_format: str = "auto",
        where: Callable[[int], str] = "row {}".format,
    ) -> SparseLabels:
        """Reads a column of lists: of names, of ids, or one number a label (multi-hot).

        Args:
            column: Lists of strings (names), of integers (ids, or multi-hot of 0, 1, -100), of floats or booleans
                (multi-hot). In a multi-hot list `null` and NaN are unknown. A `null` row is unknown throughout.
            label_names: The vocabulary; its order numbers the labels.
            class_names: Names that the column's own ids stand for (a `ClassLabel` feature); `label_names` if None.
            label_format: "names", "ids", "multi_hot", or "auto": by the type, and for integers multi-hot when every
                list is as long as the vocabulary and holds only 0, 1 and -100.
            where: Gives the words that name a row in an error.

        Raises:
            ValueError: a column that is no list, an unknown label, an id out of range, a multi-hot list of another
                length, a number neither in [0, 1] nor -100; one sentence with the row, the label and what to do.
        """
        num_labels = len(label_names)
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_null(lists.type):
            lists = lists.cast(pa.large_list(pa.null()))
        if not (
            pa.types.is_list(lists.type)
            or pa.types.is_large_list(lists.type)
            or pa.types.is_fixed_size_list(lists.type)
        ):
            raise ValueError(
                f"The labels are of type {lists.type}, but must be a list per picture: of names, of ids, or one number "
                "per label (multi-hot)."
            )
        lists = lists.cast(pa.large_list(lists.type.value_type))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        missing = lists.is_null().to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(lists)
        label_format = _choose_format(flat, lengths[~missing], num_labels, class_names, label_format)

        def refuse(wrong: np.ndarray, problem: Callable[[int], str]) -> None:
            """Names the first entry where `wrong` holds, and how many more there are."""
            if wrong.any():
                entry = int(np.argmax(wrong))
                row = int(np.searchsorted(starts, entry, side="right")) - 1
                more = int(wrong.sum()) - 1
                raise ValueError(f"{where(row)}: {problem(entry)}" + (f" ({more} more like it)." if more else "."))

        if label_format == "multi_hot":
            wrong = (lengths != num_labels) & ~missing
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"{where(row)}: its multi-hot list has {lengths[row]} numbers for {num_labels} labels; give one "
                    "number per label."
                )
            values = pc.fill_null(flat.cast(pa.float32()), np.nan).to_numpy(zero_copy_only=False)
            values = np.where(np.isnan(values), np.float32(UNKNOWN_LABEL), values)
            refuse(
                ((values < 0) | (values > 1)) & (values != UNKNOWN_LABEL),
                lambda entry: (
                    f"label {label_names[entry % num_labels]!r} is {values[entry]:g}, which is neither in [0, 1] nor "
                    "-100; use 1 for present, 0 for absent, -100 for unknown"
                ),
            )
            # `null` rows have no entries, so that an entry's label is its place modulo the vocabulary.
            kept = np.flatnonzero(values)
            starts, ids, values = np.searchsorted(kept, starts), kept % num_labels, values[kept]
        else:
            if label_format == "names":
                ids = pc.index_in(flat.cast(pa.large_string()), value_set=pa.array(label_names, pa.large_string()))
                own_names = flat
            else:
                refuse(
                    flat.is_null().to_numpy(zero_copy_only=False),
                    lambda entry: "it lists null as a label; leave it out, or use a multi-hot list to say unknown",
                )
                ids, own_names = flat.cast(pa.int64()), class_names if class_names is not None else label_names
                refuse(
                    (ids.to_numpy() < 0) | (ids.to_numpy() >= len(own_names)),
                    lambda entry: (
                        f"label id {ids[entry]} is out of range; there are {len(own_names)} labels, numbered from 0"
                    ),
                )
                number = {name: index for index, name in enumerate(label_names)}
                order = pa.array([number.get(name) for name in own_names], pa.int64())
                own_names = pc.take(pa.array(own_names, pa.string()), ids)
                ids = pc.take(order, ids)
            refuse(
                ids.is_null().to_numpy(zero_copy_only=False),
                lambda entry: _unknown_label(own_names[entry], label_names),
            )
            # A name listed twice is one label.
            rows = np.repeat(np.arange(len(lengths)), lengths)
            pairs = np.unique(rows * max(num_labels, 1) + ids.to_numpy(zero_copy_only=False).astype(np.int64))
            starts = np.searchsorted(pairs, np.arange(len(lengths) + 1) * max(num_labels, 1))
            ids, values = pairs % max(num_labels, 1), np.ones(len(pairs), dtype=np.float32)
        default = np.where(missing, np.float32(UNKNOWN_LABEL), np.float32(0))
        return cls(starts.astype(np.int64), ids.astype(np.int64), values, default, num_labels, label_format)


def _choose_format(
    flat: pa.Array, lengths: np.ndarray, num_labels: int, class_names: Sequence[str] | None, label_format: str
) -> str:
    """The format of a column by its type; refuses to guess where both readings of integers make sense."""
    if label_format not in LABEL_FORMATS:
        raise ValueError(f"label_format={label_format!r} is none of {', '.join(LABEL_FORMATS)}.")
    kind = flat.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        possible = ("names",)
    elif pa.types.is_null(kind) and lengths.sum() == 0:
        possible = ("ids", "multi_hot", "names")
    elif class_names is not None:
        possible = ("ids",)
    elif pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        possible = ("multi_hot",)
    elif pa.types.is_integer(kind):
        # By the median, so that one list of a wrong length is refused and does not turn all the others into ids.
        as_multi_hot = len(lengths) > 0 and np.median(lengths) == num_labels
        # Lists of ids are as long as the vocabulary in every picture only when that has one or two names.
        if as_multi_hot and num_labels <= 2 and label_format == "auto":
            raise ValueError(
                f"With {num_labels} labels lists of integers may be ids or multi-hot; set label_format to say which."
            )
        possible = ("multi_hot", "ids") if as_multi_hot else ("ids", "multi_hot")
    else:
        raise ValueError(f"The labels are lists of {kind}, but must be lists of names, ids or numbers.")
    if label_format == "auto":
        return possible[0]
    if label_format not in possible:
        raise ValueError(f"label_format={label_format!r} does not fit a column of lists of {kind}.")
    return label_format


def _unknown_label(name: pa.Scalar, label_names: Sequence[str]) -> str:
    if not name.is_valid:
        return "it lists null as a label; leave it out, or use a multi-hot list to say unknown"
    close = get_close_matches(name.as_py(), label_names, n=1)
    hint = f"correct it (did you mean {close[0]!r}?)" if close else "take it out of the row"
    return f"label {name.as_py()!r} is not among the {len(label_names)} label names; {hint}, or add it to the names"
