"""Splits are disjoint and keep every label's share better than chance."""

import itertools

import numpy as np
import pytest

from training.data.sparse_labels import SparseLabels
from training.prepare.exact_splits import exact_sizes
from training.prepare.stratify import positives_by_split, stratified_split

FRACTIONS = [0.8, 0.1, 0.1]


def sparse(rows):
    """`SparseLabels` of lists of ids."""
    num_labels = max(max(row, default=0) for row in rows) + 1
    ids = np.array([label for row in rows for label in row], dtype=np.int64)
    starts = np.cumsum([0, *(len(row) for row in rows)])
    values, default = np.ones(len(ids), dtype=np.float32), np.zeros(len(rows), dtype=np.float32)
    return SparseLabels(starts, ids, values, default, num_labels, "ids")


def long_tail(num_rows, num_labels, seed=0):
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, num_labels + 1)
    chance /= chance.sum()
    lengths = np.minimum(rng.poisson(3, num_rows), num_labels // 2)
    return sparse([sorted(rng.choice(num_labels, length, replace=False, p=chance).tolist()) for length in lengths])


@pytest.mark.parametrize("fractions", [FRACTIONS, [0.5, 0.5], [0.9, 0.05, 0.05], [0.2] * 5])
def test_labels_keep_their_share_better_than_at_random(fractions):
    labels = long_tail(3000, 150)
    split_of_row = stratified_split(labels, fractions)
    wanted = np.outer(fractions, labels.positives())
    counts = positives_by_split(labels, split_of_row, len(fractions))
    by_chance = np.random.default_rng(0).choice(len(fractions), len(labels), p=fractions)
    random_counts = positives_by_split(labels, by_chance, len(fractions))
    off, random_off = np.abs(counts - wanted), np.abs(random_counts - wanted)
    assert off.mean() < random_off.mean() / 2
    # Label by label as well: the worst split of each, where a share is more than a whole image.
    common = wanted.min(0) >= 1
    assert (off.max(0) <= np.maximum(random_off.max(0), 2))[common].mean() > 0.95
    assert np.allclose(np.bincount(split_of_row) / len(labels), fractions, atol=0.02)
    enough = labels.positives() >= len(fractions)
    assert enough.any() and (counts[:, enough] > 0).all()
    assert (random_counts[:, enough] == 0).any() or len(fractions) == 2


def test_counts_by_split_are_those_of_the_rows():
    labels = long_tail(200, 12)
    split_of_row = stratified_split(labels, FRACTIONS)
    dense = np.stack([labels.dense(row) for row in range(200)])
    expected = np.stack([dense[split_of_row == split].sum(0) for split in range(3)])
    assert np.array_equal(positives_by_split(labels, split_of_row, 3), expected)


def test_the_seed_decides():
    labels = long_tail(500, 20)
    first = stratified_split(labels, FRACTIONS, seed=3)
    assert np.array_equal(first, stratified_split(labels, FRACTIONS, seed=3))
    assert not np.array_equal(first, stratified_split(labels, FRACTIONS, seed=4))


def test_every_row_in_one_split_also_without_labels():
    split_of_row = stratified_split(sparse([[]] * 98 + [[0]] * 2), FRACTIONS)
    assert np.bincount(split_of_row).tolist() == [80, 10, 10]


def test_three_positives_give_one_to_each_of_three_splits():
    for seed in range(20):
        split_of_row = stratified_split(sparse([[0]] * 3 + [[1]] * 97), FRACTIONS, seed=seed)
        assert sorted(split_of_row[:3]) == [0, 1, 2]


def test_a_label_that_others_took_from_is_mended():
    # Label 0 is spread first (4 positives); each of its images also decides where label 1 goes. Without mending some
    # seeds leave label 1 or 2 without a positive somewhere.
    rows = [[0, 1], [0, 1], [0, 2], [0, 2], [1, 2], [1, 2], [1], [2]] + [[3]] * 60
    for seed in range(30):
        labels = sparse(rows)
        counts = positives_by_split(labels, stratified_split(labels, [0.6, 0.2, 0.2], seed=seed), 3)
        assert (counts > 0).all()


def test_groups_stay_together():
    labels = long_tail(600, 15)
    groups = np.random.default_rng(1).integers(0, 150, 600)
    split_of_row = stratified_split(labels, FRACTIONS, groups=groups)
    for group in np.unique(groups):
        assert len(set(split_of_row[groups == group])) == 1
    counts = positives_by_split(labels, split_of_row, 3)
    assert np.abs(counts - np.outer(FRACTIONS, labels.positives())).mean() < 3
    assert np.allclose(np.bincount(split_of_row) / 600, FRACTIONS, atol=0.03)


def test_large_groups_are_placed_while_there_is_room():
    for seed in range(10):
        split_of_row = stratified_split(
            sparse([[0]] * 100), [0.6, 0.4], groups=[0] * 30 + list(range(1, 71)), seed=seed
        )
        assert np.bincount(split_of_row).tolist() == [60, 40]


def test_soft_and_unknown_labels_are_no_positives_below_a_half():
    labels = sparse([[0]] * 6)
    labels.values[:] = [1, 1, 1, 0.4, -100, 0.5]
    split_of_row = stratified_split(labels, [0.5, 0.5])
    assert sorted(np.bincount(split_of_row[[0, 1, 2, 5]])) == [2, 2]


@pytest.mark.parametrize(
    ("fractions", "groups", "words"),
    [
        ([0.8, 0.1], None, "sum 1"),
        ([1.2, -0.2], None, "above 0"),
        ([1.0], None, "at least two"),
        ([0.2] * 5, None, "cannot fill 5"),
        ([0.5, 0.5], [0, 1], "2 group ids for 4 rows"),
    ],
)
def test_impossible_requests_are_refused(fractions, groups, words):
    with pytest.raises(ValueError, match=words):
        stratified_split(sparse([[0], [1], [0, 1], []]), fractions, groups=groups)


def best_by_brute_force(rows, target, num_labels):
    """Over all ways: the fewest (label, split) pairs without a positive, and of those how near sizes come."""
    num_splits = len(target)
    bits = [sum(1 << label for label in row) for row in rows]
    enough = sum(1 << label for label in range(num_labels) if sum(label in row for row in rows) >= num_splits)
    best = (np.inf, np.inf)
    for splits in itertools.product(range(num_splits), repeat=len(rows)):
        there, sizes = [0] * num_splits, [0] * num_splits
        for row, split in zip(bits, splits, strict=True):
            there[split] |= row
            sizes[split] += 1
        missing = sum((enough & ~labels).bit_count() for labels in there)
        best = min(best, (missing, sum(abs(size - want) for size, want in zip(sizes, target, strict=True))))
    return best


@pytest.mark.parametrize("fractions", [[0.5, 0.25, 0.25], [0.7, 0.3]])
def test_small_sets_are_split_as_well_as_any_way_could(fractions):
    random = np.random.default_rng(5)
    for seed in range(40):
        size, num_labels = int(random.integers(5, 8)), int(random.integers(2, 6))
        rows = [sorted(np.flatnonzero(random.random(num_labels) < 0.45).tolist()) for _ in range(size)]
        if not any(rows):
            continue
        labels = sparse(rows)
        split_of_row = stratified_split(labels, fractions, seed=seed)
        target = exact_sizes(size, np.array(fractions))
        off = np.abs(np.bincount(split_of_row, minlength=len(fractions)) - target).sum()
        counts = positives_by_split(labels, split_of_row, len(fractions))
        missing = (counts[:, labels.positives() >= len(fractions)] == 0).sum()
        assert (missing, off) == best_by_brute_force(rows, target, labels.num_labels)


def test_sizes_are_those_that_were_asked_for():
    for seed, (rows, fractions) in enumerate([(1000, FRACTIONS), (997, [0.9, 0.05, 0.05]), (333, [0.2] * 5)]):
        labels = long_tail(rows, 60, seed)
        sizes = np.bincount(stratified_split(labels, fractions, seed=seed))
        assert np.abs(sizes - np.array(fractions) * rows).max() < 1
        counts = positives_by_split(labels, stratified_split(labels, fractions, seed=seed), len(fractions))
        assert (counts[:, labels.positives() >= len(fractions)] > 0).all()
