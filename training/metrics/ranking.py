"""Scores ranked in blocks, so that the matrix of them may be larger than memory; labels and shapes checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

UNKNOWN_LABEL = -100  # the label contract's, as in modeling_hsvlt.label_contract, which needs torch
BLOCK_ENTRIES = 1 << 22  # entries read at a time: with all that is derived from them about 150 MB
POOLED_ENTRIES = 1 << 25  # entries sorted at a time for the one ranking of all: 128 MB of float32


class RankedPositives(NamedTuple):
    """The known positives of each row of a block, best score first. A cut can only improve where a positive enters, so
    these are all the cuts that matter; equal scores are one cut.

    Each is (positives,): `row`; its score `value`; `below`, the next lower known score of the row (-inf if none);
    `highest`, the highest known score of the row; `predicted`, known entries that score at least `value`; `hits`,
    positives among them.
    """

    row: np.ndarray
    value: np.ndarray
    below: np.ndarray
    highest: np.ndarray
    predicted: np.ndarray
    hits: np.ndarray


def ranked_label_positives(
    scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None = None
) -> Iterator[tuple[slice, RankedPositives]]:
    """Blocks of labels with their ranked positives; `row` counts from the start of the block's slice."""
    for part, block, positive, known in iterate_blocks(scores, labels, "label", label_names):
        yield part, rank_positives(block, positive, known)


def rank_positives(scores: np.ndarray, positive: np.ndarray, known: np.ndarray) -> RankedPositives:
    """Ranks the positives within each row of `scores` (rows, entries)."""
    ordered = np.sort(np.where(known, scores, scores.dtype.type(-np.inf)), axis=1)
    row, column = np.nonzero(positive)
    value = scores[row, column]
    order = np.lexsort((-value, row))
    row, value = row[order], value[order]
    # Binary search of all positives at once for the first entry that is not below; each is found, so low < width.
    low, high = np.zeros(len(row), dtype=np.int64), np.full(len(row), ordered.shape[1])
    while (low < high).any():
        middle = (low + high) // 2
        below = ordered[row, middle] < value
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    # Equal scores share the count at the last of them.
    last = np.flatnonzero(np.append((value[1:] != value[:-1]) | (row[1:] != row[:-1]), True)[: len(row)])
    hits = last[np.searchsorted(last, np.arange(len(row)))] + 1 - np.searchsorted(row, row)
    return RankedPositives(
        row=row,
        value=value,
        below=np.where(low > 0, ordered[row, low - 1], -np.inf),
        highest=ordered[row, -1],
        predicted=ordered.shape[1] - low,
        hits=hits,
    )


class PooledRanking:
    """One ranking of all entries of a matrix, which come in parts, never held as a whole; only the ranks of the
    positives among them are kept.

    Args:
        positive_scores: (positives,) in any order.
        num_entries: At most so many will come.
    """

    def __init__(self, positive_scores: np.ndarray, num_entries: int):
        self._value = np.sort(positive_scores)
        self._predicted = np.zeros(len(self._value), dtype=np.int64)
        self._below = np.full(len(self._value), -np.inf)
        self._highest = -np.inf
        # The more entries are sorted at a time, the less often the positives are looked up in them.
        self._entries = np.empty(min(num_entries, POOLED_ENTRIES), dtype=self._value.dtype)
        self._filled = 0

    def add(self, entries: np.ndarray) -> None:
        """(known,) scores of known entries, those of positives among them, once each."""
        while len(entries):
            part, entries = np.split(entries, [len(self._entries) - self._filled])
            self._entries[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(self._entries):
                self._count()

    def _count(self) -> None:
        ordered = self._entries[: self._filled]
        ordered.sort()
        self._highest = ordered.max(initial=self._highest)
        first = np.searchsorted(ordered, self._value)
        self._predicted += len(ordered) - first
        found = first > 0
        self._below[found] = np.maximum(self._below[found], ordered[first[found] - 1])
        self._filled = 0

    def ranked(self) -> RankedPositives:
        """When all entries have been added: the ranks, as of a matrix with one row."""
        self._count()
        value = self._value
        return RankedPositives(
            row=np.zeros(len(value), dtype=np.int64),
            value=value[::-1],
            below=self._below[::-1],
            highest=np.full(len(value), self._highest),
            predicted=self._predicted[::-1],
            hits=(len(value) - np.searchsorted(value, value))[::-1],
        )


def rank_pooled_positives(scores: np.ndarray, labels: np.ndarray) -> RankedPositives:
    """Ranks all positives of the matrix in one ranking of all its known entries."""
    positives = [block[positive] for _, block, positive, _ in iterate_blocks(scores, labels, "label")]
    pooled = PooledRanking(np.concatenate(positives), scores.shape[0] * scores.shape[1])
    for _, block, _, known in iterate_blocks(scores, labels, "label"):
        pooled.add(block[known])
    return pooled.ranked()


def no_positive(shape: tuple[int, int], what: str) -> ValueError:
    """For scores of this shape: there is nothing to `what`."""
    return ValueError(
        f"None of the {shape[1]} labels has a known positive in {shape[0]} rows, so there is nothing to {what}; check "
        "the labels, or take a split that holds some."
    )


def check_inputs(scores, labels, label_names: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (labels possibly scipy sparse) of one shape (n, num_labels), neither 0. Values are checked when read.

    Raises:
        ValueError: any other shapes, or another number of label names.
    """
    scores = scores if isinstance(getattr(scores, "dtype", None), np.dtype) else np.asarray(scores)
    labels = labels if hasattr(labels, "tocsc") else np.asarray(labels)
    if len(scores.shape) != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and labels {labels.shape}, but both must be (n, num_labels)."
        )
    if 0 in scores.shape:
        raise ValueError(
            f"scores of shape {scores.shape} hold nothing to measure; give at least one row and one label."
        )
    if label_names is not None and len(label_names) != scores.shape[1]:
        raise ValueError(f"There are {len(label_names)} label names for {scores.shape[1]} columns of scores.")
    return scores, labels


def iterate_blocks(
    scores: np.ndarray, labels: np.ndarray, by: str, label_names: Sequence[str] | None = None
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of whole labels (`by="label"`, one label per row of the block) or of whole samples (`by="sample"`).

    Yields:
        The slice along labels or samples; floating-point scores; boolean `positive` and `known`.
    """
    return map_blocks(lambda *block: block, scores, labels, by, label_names)


def map_blocks(
    function: Callable,
    scores: np.ndarray,
    labels: np.ndarray,
    by: str,
    label_names: Sequence[str] | None = None,
    *,
    num_threads: int = 1,
) -> Iterator:
    """What `function` makes of each of the blocks that `iterate_blocks` yields, in their order; numpy lets go of
    Python's lock for most of the work."""
    size, other = scores.shape[::-1] if by == "label" else scores.shape
    if hasattr(labels, "tocsc"):
        labels = labels.tocsc() if by == "label" else labels.tocsr()
    step = max(BLOCK_ENTRIES // other, 1)
    parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def work(part: slice):
        return function(part, *_read_block(scores, labels, part, by == "label", label_names))

    if num_threads == 1:
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        pending = deque()
        for part in parts:
            pending.append(pool.submit(work, part))
            if len(pending) > num_threads:  # no further ahead: results hold memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_block(scores, labels, part: slice, by_label: bool, label_names) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = (slice(None), part) if by_label else (part, slice(None))
    block, values = np.asarray(scores[index]), labels[index]
    values = values.toarray() if hasattr(values, "toarray") else values
    if not np.issubdtype(block.dtype, np.floating):
        block = block.astype(np.float64)
    known = (values != UNKNOWN_LABEL) & (values == values)  # NaN differs from itself
    positive = values == 1
    for wrong, entries, problem in (
        (~np.isfinite(block), block, "the score {} is not a finite number; look for an overflow in the model"),
        (known & ~positive & (values != 0), values, "the label {} is not 1, 0 or unknown (-100, NaN); correct it"),
    ):
        if wrong.any():
            row, column = (int(axis[0]) for axis in np.nonzero(wrong))
            found = entries[row, column]
            row, column = (row, column + part.start) if by_label else (row + part.start, column)
            label = column if label_names is None else repr(label_names[column])
            raise ValueError(f"Row {row}, label {label}: {problem.format(found)}.")
    if by_label:
        block, positive, known = (np.ascontiguousarray(array.T) for array in (block, positive, known))
    return block, positive, known
