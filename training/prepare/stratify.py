"""Splits in which every label keeps its share.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011)
on sparse labels, with two additions (`exact_splits.py`): a label with a positive for every split has one in every
split, and the sizes are those that were asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from ..data.sparse_labels import SparseLabels
from .exact_splits import exact_sizes, mend


def stratified_split(
    labels: SparseLabels, fractions: Sequence[float], *, groups: Sequence[int] | None = None, seed: int = 0
) -> np.ndarray:
    """Gives every row to one split, so that each label, the rarest first, is spread by `fractions`.

    Takes time in proportion to rows, positives and splits, and to labels squared (in numpy): a million rows with ten
    thousand labels take well under a minute.

    Args:
        labels: A label is positive where its value is at least 0.5; unknown entries count for nothing.
        fractions: The share of each split; positive, with sum 1.
        groups: (rows,) ids; rows of one id, such as copies of an image or images of one patient, stay together.
        seed: Decides which of equal choices is taken; the same seed gives the same splits.

    Returns:
        (rows,) int64, the index of each row's split in `fractions`. A label whose positives lie in at least as many
        groups (rows, where there are none) as there are splits has one in each, unless labels or groups that are tied
        together leave no way to do that; and the splits have the sizes that are nearest to the fractions, or with
        groups as near as they come. See `exact_splits.mend` for how exactly.

    Raises:
        ValueError: fractions that are no shares of one whole, or another number of groups than rows.
    """
    fractions = np.asarray(fractions, dtype=np.float64)
    if len(fractions) < 2 or (fractions <= 0).any() or abs(fractions.sum() - 1) > 1e-6:
        raise ValueError(f"The fractions {fractions.tolist()} must be at least two, all above 0, with sum 1.")
    if len(labels) < len(fractions):
        raise ValueError(f"{len(labels)} rows cannot fill {len(fractions)} splits; give more rows or fewer fractions.")
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"There are {len(groups)} group ids for {len(labels)} rows; give one per row.")
    unit_of_row = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(unit_of_row)

    # A unit is a row, or a group of rows. In random order, but the large ones, which fit nowhere later, first.
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    place = np.argsort(order)
    positive = labels.values >= 0.5
    units = place[unit_of_row[np.repeat(np.arange(len(labels)), np.diff(labels.starts))[positive]]]
    counts = csr_array(
        (np.ones(len(units), dtype=np.int64), (units, labels.ids[positive])), shape=(len(sizes), labels.num_labels)
    )
    counts.sum_duplicates()
    split_of = _assign(counts, sizes[order], fractions, random.Random(seed))
    wanted = _wanted(np.asarray(counts.sum(0)).ravel(), np.diff(counts.tocsc().indptr), fractions)
    target = exact_sizes(len(labels), fractions)
    return mend(split_of, counts, sizes[order], wanted, target)[place[unit_of_row]]


def _assign(counts: csr_array, sizes: np.ndarray, fractions: np.ndarray, choice: random.Random) -> np.ndarray:
    """(units,) split of each unit; `counts` (units, num_labels) are the images of a unit that show a label."""
    num_splits = len(fractions)
    by_label = counts.tocsc()
    units_with = np.diff(by_label.indptr)
    wanted = _wanted(np.asarray(counts.sum(0)).ravel(), units_with, fractions).tolist()  # what a split still lacks
    placed = [[0] * num_splits for _ in wanted]
    room = (fractions * sizes.sum()).tolist()
    size_of, split_of = sizes.tolist(), [-1] * len(sizes)

    def move(unit: int, split: int, sign: int = 1) -> None:
        entries = slice(counts.indptr[unit], counts.indptr[unit + 1])
        for label, count in zip(counts.indices[entries].tolist(), counts.data[entries].tolist(), strict=True):
            wanted[label][split] -= sign * count
            placed[label][split] += sign * count
        room[split] -= sign * size_of[unit]
        split_of[unit] = split

    def best_of(values: list[float], splits: Sequence[int]) -> list[int]:
        best = max(values[split] for split in splits) - 1e-9  # sums of fractions that should be equal differ by less
        return [split for split in splits if values[split] >= best]

    remaining = units_with.copy()
    everywhere = range(num_splits)
    while remaining.any():
        label = int(np.argmin(np.where(remaining > 0, remaining, np.iinfo(remaining.dtype).max)))
        column = by_label.indices[by_label.indptr[label] : by_label.indptr[label + 1]]
        units = [unit for unit in column.tolist() if split_of[unit] < 0]
        for unit in units:
            splits = best_of(wanted[label], everywhere)
            if len(splits) > 1:  # the paper asks for room next; other labels that a split has none of come before it
                others = counts.indices[counts.indptr[unit] : counts.indptr[unit + 1]].tolist()
                splits = best_of([sum(not placed[other][split] for other in others) for split in everywhere], splits)
                splits = best_of(room, splits)
            move(unit, splits[0] if len(splits) == 1 else choice.choice(splits))
        rows = counts[units]
        remaining -= np.bincount(rows.indices, minlength=len(remaining))
    for unit in np.flatnonzero(np.diff(counts.indptr) == 0).tolist():
        move(unit, choice.choice(best_of(room, everywhere)))

    return np.array(split_of, dtype=np.int64)


def _wanted(positives: np.ndarray, units_with: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """(num_labels, splits) positives that each split should get: the fractions, but at least 1 where there are enough
    to go round."""
    wanted = positives[:, None] * fractions
    enough = units_with >= len(fractions)
    raised = np.zeros(wanted.shape, dtype=bool)
    # What is left for the other splits shrinks, so that one of them may fall below 1 in turn.
    while (low := (wanted < 1) & ~raised & enough[:, None]).any():
        raised |= low
        shares = np.where(raised, 0, fractions)
        left = positives - raised.sum(1)
        scaled = left[:, None] * shares / np.maximum(shares.sum(1, keepdims=True), 1e-12)
        wanted = np.where(enough[:, None], np.where(raised, 1, scaled), wanted)
    return wanted


def positives_by_split(labels: SparseLabels, split_of_row: np.ndarray, num_splits: int) -> np.ndarray:
    """(num_splits, num_labels) int64: the positives of each label in each split."""
    positive = labels.values >= 0.5
    rows = np.repeat(np.arange(len(labels)), np.diff(labels.starts))[positive]
    cells = split_of_row[rows] * labels.num_labels + labels.ids[positive]
    return np.bincount(cells, minlength=num_splits * labels.num_labels).reshape(num_splits, -1)
