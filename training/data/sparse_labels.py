"""A label column of any supported format as sparse rows, checked against the label contract.

Ten thousand labels an image are mostly zeros: rows keep only what is not zero until a batch is put together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset

from modeling_hsvlt.label_contract import UNKNOWN_LABEL

from .label_cells import is_text

LABEL_FORMATS = ("auto", "names", "ids", "multi_hot")


@dataclass
class SparseLabels:
    """Labels of `rows` images in compressed sparse rows.

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
        """(num_labels,) float32 labels of one image: 1 present, 0 absent, between them soft, -100 unknown."""
        labels = np.full(self.num_labels, self.default[row], dtype=np.float32)
        ids, values = self.entries(row)
        labels[ids] = values
        return labels

    def entries(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Label indices (int64) and values (float32) of one image's entries; every other label is its `default`."""
        entries = slice(self.starts[row], self.starts[row + 1])
        return self.ids[entries], self.values[entries]

    def partially_known(
        self, *, known_fraction: float | None = None, single_positive: bool = False, seed: int = 0
    ) -> SparseLabels:
        """The same images with some known labels made unknown, drawn by `seed`: for experiments with partial labels.

        Args:
            known_fraction: Every label of every image stays known with this probability, present or absent.
            single_positive: Of each image one present label stays known, nothing else (Cole et al., CVPR 2021). An
                image that shows none is then unknown throughout.

        Raises:
            ValueError: neither or both of the two, or a fraction outside (0, 1].
        """
        if (known_fraction is None) == (not single_positive):
            raise ValueError("Give one of known_fraction and single_positive, which say what labels stay known.")
        if known_fraction is not None and not 0 < known_fraction <= 1:
            raise ValueError(f"known_fraction={known_fraction!r} must be above 0 and at most 1.")
        random = np.random.default_rng(seed)
        rows = np.repeat(np.arange(len(self)), np.diff(self.starts))
        if single_positive:
            present = np.flatnonzero(self.values >= 0.5)
            present = present[random.permutation(len(present))]
            _, first = np.unique(rows[present], return_index=True)  # the first of each image in a random order
            kept = present[first]
            rows, ids, values = rows[kept], self.ids[kept], self.values[kept]
        else:
            parts = []
            for start in range(0, len(self), 256):  # dense in blocks: 256 rows of 10,000 labels are 10 MB
                block = np.stack([self.dense(row) for row in range(start, min(start + 256, len(self)))])
                known = (random.random(block.shape, dtype=np.float32) < known_fraction) & (block != UNKNOWN_LABEL)
                at = np.nonzero(known)
                parts.append((at[0] + start, at[1], block[at]))
            rows, ids, values = map(np.concatenate, zip(*parts, strict=True))
        starts = np.searchsorted(rows, np.arange(len(self) + 1))
        unknown = np.full(len(self), UNKNOWN_LABEL, dtype=np.float32)
        return SparseLabels(starts, ids, values, unknown, self.num_labels, "multi_hot")

    def positives(self) -> np.ndarray:
        """(num_labels,) int64: how many images show each label (a soft label from 0.5 on counts)."""
        return np.bincount(self.ids[self.values >= 0.5], minlength=self.num_labels)

    def select(self, rows: np.ndarray) -> SparseLabels:
        """The labels of these rows, in this order."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.arange(starts[-1]) + np.repeat(self.starts[:-1][rows] - starts[:-1], lengths)
        kept = starts, self.ids[entries], self.values[entries], self.default[rows]
        return SparseLabels(*kept, self.num_labels, self.label_format)

    @classmethod
    def concatenate(cls, parts: Sequence[SparseLabels]) -> SparseLabels:
        """The rows of several, one after another."""
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "values", "default"))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return cls(starts, *arrays, parts[0].num_labels, parts[0].label_format)

    def tensor(self, row: int) -> torch.Tensor:
        """(num_labels,) float32 labels of one image: sparse, or dense where nothing but what is listed is known."""
        if self.default[row]:
            return torch.from_numpy(self.dense(row))
        ids, values = map(torch.from_numpy, self.entries(row))
        return torch.sparse_coo_tensor(ids[None], values, (self.num_labels,), is_coalesced=True, check_invariants=True)

    def are_ids(self) -> bool:
        """Whether lists of ids say it all: no label is soft, and none unknown in a row of which others are known."""
        return bool((self.values == 1).all())

    def lists(self, as_ids: bool) -> pa.ListArray:
        """A list a row: of ids, or of one float32 a label (dense: for few rows at a time); null where a row is
        unknown."""
        unknown = self.default != 0
        if as_ids:
            starts, values = self.starts, self.ids
        else:
            known = np.flatnonzero(~unknown)
            starts = np.concatenate([[0], np.cumsum(~unknown)]) * self.num_labels
            values = np.concatenate([np.empty(0, np.float32), *(self.dense(row) for row in known)])
        lists = pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(values), mask=pa.array(unknown))
        return lists.cast(pa.list_(lists.type.value_type))

    @classmethod
    def from_arrow(
        cls,
        column: pa.ChunkedArray,
        label_names: Sequence[str],
        *,
        class_names: Sequence[str] | None = None,
        label_format: str = "auto",
        where: Callable[[int], str] = "row {}".format,
        uncertain: str | None = None,
        blank: str | None = None,
    ) -> SparseLabels:
        """Reads a column of lists: of names, of ids, or one number a label (multi-hot).

        Args:
            column: Lists of strings (names), of integers (ids, or multi-hot of 0, 1, -100), of floats or booleans
                (multi-hot). In a multi-hot list `null` and NaN are unknown. A `null` row is unknown throughout.
            label_names: The vocabulary; its order numbers the labels.
            class_names: The names that the column's own ids stand for (a `ClassLabel` feature); `label_names` if None.
            label_format: "names", "ids", "multi_hot", or "auto": by the type, and for integers multi-hot when most
                lists are as long as the vocabulary.
            where: Gives the words that name a row in an error.
            uncertain, blank: See `options.DatasetOptions`; of multi-hot lists.

        Raises:
            ValueError: a column that is no list, an unknown label, an id out of range, a multi-hot list of another
                length, a number neither in [0, 1] nor -100; one sentence with the row, the label and what to do.
        """
        num_labels = len(label_names)
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_null(lists.type):  # every row is null
            lists = lists.cast(pa.large_list(pa.null()))
        if not pa.types.is_nested(lists.type) or not hasattr(lists.type, "value_type"):
            raise ValueError(
                f"{where(0)}: the labels are of type {lists.type}, but must be a list per image: of names, of ids, "
                "or one number per label (multi-hot)."
            )
        lists = lists.cast(pa.large_list(lists.type.value_type))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        null_row = _nulls(lists)
        flat = pc.list_flatten(lists)
        guessed = label_format == "auto" and class_names is None
        label_format = _choose_format(flat.type, lengths[~null_row], num_labels, class_names, label_format)

        def refuse(wrong: np.ndarray, problem: Callable[[int], str]) -> None:
            """Names the first entry where `wrong` holds, and how many more there are."""
            if wrong.any():
                entry, more = int(np.argmax(wrong)), int(wrong.sum()) - 1
                row = int(np.searchsorted(starts, entry, side="right")) - 1
                raise ValueError(f"{where(row)}: {problem(entry)}" + (f" ({more} more like it)." if more else "."))

        if label_format == "multi_hot":
            wrong = (lengths != num_labels) & ~null_row
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"{where(row)}: its list has {lengths[row]} numbers for {num_labels} labels; give one number per "
                    "label (multi-hot), or integer ids."
                )
            values = _multi_hot_values(flat, label_names, refuse, uncertain, blank or uncertain)
            # A null row has no entries, so that an entry's label is its place modulo the vocabulary.
            kept = np.flatnonzero(values)
            starts, ids, values = np.searchsorted(kept, starts), kept % num_labels, values[kept]
        else:
            if guessed and _looks_multi_hot(flat, lengths[~null_row]):
                raise ValueError(
                    f"{where(0)}: lists of {lengths.max()} zeros and ones look like multi-hot, but there are "
                    f"{num_labels} labels; give the right label names, or set label_format to 'ids'."
                )
            own_names = label_names if class_names is None else class_names
            ids = _label_ids(flat, label_names, None if label_format == "names" else own_names, refuse)
            # Sorted by row, then label; a label listed twice is one label.
            stride = max(num_labels, 1)
            keys = np.unique(np.repeat(np.arange(len(lengths)), lengths) * stride + ids)
            starts = np.searchsorted(keys, np.arange(len(lengths) + 1) * stride)
            ids, values = keys % stride, np.ones(len(keys), dtype=np.float32)
        default = np.where(null_row, np.float32(UNKNOWN_LABEL), np.float32(0))
        return cls(starts.astype(np.int64), ids, values, default, num_labels, label_format)


def arrow_column(split: Dataset, column: str) -> pa.ChunkedArray:
    """One column as it is stored, in the order of the rows; `objects.category` is a field of structs, or of a list of
    structs."""
    name, *fields = [column] if column in split.column_names else column.split(".")
    found = split.select_columns([name]).with_format("arrow")[:].column(name)
    for field in fields:
        found = pa.chunked_array([_field(chunk, field) for chunk in found.chunks]) if found.chunks else found
    if pa.types.is_dictionary(found.type):
        found = found.cast(found.type.value_type)
    return found


def _field(array: pa.Array, field: str) -> pa.Array:
    """A field of structs, or of each struct in lists."""
    if pa.types.is_struct(array.type):
        return pc.struct_field(array, field)
    array = array.cast(pa.large_list(array.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    return pa.LargeListArray.from_arrays(starts, pc.struct_field(array.flatten(), field), mask=array.is_null())


def class_names(features: Mapping[str, Any], label_column: str) -> list[str] | None:
    """The names that the ids of a list column stand for, or None where its feature has none."""
    name, *fields = [label_column] if label_column in features else label_column.split(".")
    inner = features.get(name)
    for field in fields:
        inner = getattr(inner, "feature", inner)
        inner = inner.get(field) if isinstance(inner, dict) else None
    inner = inner if fields and isinstance(inner, ClassLabel) else getattr(inner, "feature", None)
    return [name.strip() for name in inner.names] if isinstance(inner, ClassLabel) else None


def names_of_ids(column: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """Lists of names in place of lists of ids."""
    lists = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).cast(pa.large_list(pa.int64()))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    values = pc.take(pa.array(names, pa.large_string()), pc.list_flatten(lists))
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    return pa.LargeListArray.from_arrays(starts, values, mask=lists.is_null())


def _nulls(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


_MEANING = {None: UNKNOWN_LABEL, "unknown": UNKNOWN_LABEL, "absent": 0, "present": 1}


def _multi_hot_values(
    flat: pa.Array, label_names: Sequence[str], refuse: Callable, uncertain: str | None, blank: str | None
) -> np.ndarray:
    """(entries,) float32 with what null, NaN and -1 stand for; -100 is unknown."""
    values = pc.fill_null(flat.cast(pa.float32()), np.nan).to_numpy(zero_copy_only=False)
    values = np.where(np.isnan(values), np.float32(_MEANING[blank]), values)
    if uncertain is not None:
        values = np.where(values == -1, np.float32(_MEANING[uncertain]), values)
    refuse(
        ((values < 0) | (values > 1)) & (values != UNKNOWN_LABEL),
        lambda entry: (
            f"label {label_names[entry % len(label_names)]!r} is {values[entry]:g}, which is neither in [0, 1] nor "
            "-100; use 1 for present, 0 for absent, -100 for unknown"
            + (", or say with --uncertain what -1 means" if values[entry] == -1 else "")
        ),
    )
    return values


def _label_ids(
    flat: pa.Array, label_names: Sequence[str], own_names: Sequence[str] | None, refuse: Callable
) -> np.ndarray:
    """(entries,) int64 indices into `label_names` of names, or of ids that stand for `own_names`."""
    refuse(_nulls(flat), lambda entry: "it lists null as a label; leave it out, or use multi-hot lists to say unknown")
    if own_names is not None:
        flat = flat.cast(pa.int64())
        own_ids = flat.to_numpy()
        refuse(
            (own_ids < 0) | (own_ids >= len(own_names)),
            lambda entry: f"label id {own_ids[entry]} is out of range; use 0 to {len(own_names) - 1}",
        )
        flat = pc.take(pa.array(own_names, pa.large_string()), flat)
    ids = pc.index_in(flat.cast(pa.large_string()), value_set=pa.array(label_names, pa.large_string()))
    refuse(_nulls(ids), lambda entry: unknown_label(flat[entry].as_py(), label_names))
    return ids.to_numpy().astype(np.int64)


def _choose_format(
    kind: pa.DataType, lengths: np.ndarray, num_labels: int, class_names: Sequence[str] | None, label_format: str
) -> str:
    """The format of lists of type `kind`; refuses to guess where both readings of integers make sense."""
    if label_format not in LABEL_FORMATS:
        raise ValueError(f"label_format={label_format!r} is none of {', '.join(LABEL_FORMATS)}.")
    if is_text(kind):
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
        # Lists of ids are as long as the vocabulary in every image only when that has one or two names.
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


def _looks_multi_hot(flat: pa.Array, lengths: np.ndarray) -> bool:
    """Whether lists of integers are all of one length and of zeros and ones alone; ids would repeat themselves so."""
    if not pa.types.is_integer(flat.type) or len(lengths) == 0 or lengths.min() != lengths.max() or lengths.max() < 3:
        return False
    return pc.all(pc.is_in(flat, value_set=pa.array([0, 1, UNKNOWN_LABEL]).cast(flat.type, safe=False))).as_py()


def unknown_label(name: str, label_names: Sequence[str]) -> str:
    close = get_close_matches(name, label_names, n=1)
    alike = close and unicodedata.normalize("NFC", close[0]) == unicodedata.normalize("NFC", name)
    show = ascii if alike else repr  # accents written in two ways look the same
    hint = f"correct it (did you mean {show(close[0])}?)" if close else "take it out of the row"
    return f"label {show(name)} is not among the {len(label_names)} label names; {hint}, or add it to the names"
