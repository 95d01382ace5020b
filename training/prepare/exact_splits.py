"""What iterative stratification leaves over: sizes as asked, and every label in every split wherever a way exists."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, hstack

_MAX_CHOICES = 20_000  # (units, splits) pairs that are decided exactly; more are left where they are


def exact_sizes(total: int, fractions: np.ndarray) -> np.ndarray:
    """(splits,) int64: whole images nearest to the fractions, at least one each, with sum `total`."""
    sizes = np.maximum(np.floor(fractions * total + 1e-9), 1).astype(np.int64)
    while sizes.sum() != total:
        lack = fractions * total - sizes
        if sizes.sum() < total:
            sizes[np.argmax(lack)] += 1
        else:
            sizes[np.argmin(np.where(sizes > 1, lack, np.inf))] -= 1
    return sizes


def mend(
    split_of: np.ndarray, counts: csr_array, sizes: np.ndarray, wanted: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Moves as few units as need be.

    Args:
        split_of: (units,) the split of each unit.
        counts: (units, num_labels) images of a unit that show a label.
        sizes: (units,) images of a unit.
        wanted: (num_labels, splits) positives that each split should get.
        target: (splits,) images that each split should get.

    Returns:
        (units,) splits in which a label with a unit for every split is in every one, and whose sizes are the target:
        exactly so wherever that is possible, for up to 20,000 pairs of unit and split; else as nearly as moves of
        single units and an exact solution for the rare labels reach.
    """
    shows = csr_array((np.ones(counts.nnz), counts.indices, counts.indptr), shape=counts.shape)
    required = np.flatnonzero(np.diff(counts.tocsc().indptr) >= len(target))
    split_of = _to_size(split_of.copy(), counts, shows, sizes, wanted, target, required)
    if _faults(split_of, shows, sizes, target, required) > 0:
        split_of = _decide(split_of, shows, sizes, target, required)
    return split_of


def _placed(split_of: np.ndarray, matrix: csr_array, num_splits: int) -> np.ndarray:
    """(splits, num_labels) sums over the units of each split."""
    units = np.arange(len(split_of))
    of_split = csr_array((np.ones(len(split_of)), (split_of, units)), shape=(num_splits, len(split_of)))
    return (of_split @ matrix).toarray()


def _faults(
    split_of: np.ndarray, shows: csr_array, sizes: np.ndarray, target: np.ndarray, required: np.ndarray
) -> float:
    missing = (_placed(split_of, shows, len(target))[:, required] == 0).sum()
    return missing + np.abs(np.bincount(split_of, sizes, len(target)) - target).sum()


def _to_size(
    split_of: np.ndarray,
    counts: csr_array,
    shows: csr_array,
    sizes: np.ndarray,
    wanted: np.ndarray,
    target: np.ndarray,
    required: np.ndarray,
) -> np.ndarray:
    """Moves units from splits that are too large to those that are too small, the ones whose labels suit it best."""
    is_required = np.zeros(counts.shape[1], dtype=bool)
    is_required[required] = True
    while True:
        off = np.bincount(split_of, sizes, len(target)) - target
        source, goal = int(np.argmax(off)), int(np.argmin(off))
        need = min(off[source], -off[goal])
        units = np.flatnonzero((split_of == source) & (sizes <= need))
        if need <= 0 or len(units) == 0:
            return split_of
        images, carriers = _placed(split_of, counts, len(target)), _placed(split_of, shows, len(target))[source]
        surplus = (images - wanted.T)[[source, goal]]
        for batch in (1 + int(need) // 100, 1):
            blocked = is_required & (carriers <= batch)
            cost = shows[units] @ (2 * (surplus[1] - surplus[0]) + 2 + 1e9 * blocked)
            best = np.argsort(cost, kind="stable")[:batch]
            best = best[(cost[best] < 1e8) & (np.cumsum(sizes[units[best]]) <= need)]
            if len(best):
                split_of[units[best]] = goal
                break
        else:
            return split_of


def _decide(
    split_of: np.ndarray, shows: csr_array, sizes: np.ndarray, target: np.ndarray, required: np.ndarray
) -> np.ndarray:
    """The best splits by integer programming: labels in every split first, then sizes, then few moves."""
    num_splits = len(target)
    free = _free_units(split_of, shows, num_splits, required)
    count = len(free)
    fixed = np.ones(len(split_of), dtype=bool)
    fixed[free] = False
    there = _placed(split_of, csr_array(shows * fixed[:, None]), num_splits)[:, required]
    room = target - np.bincount(split_of[fixed], sizes[fixed], num_splits)

    # Variables: free units by split; labels that a split lacks; images that a split has too many, too few.
    of_label = csr_array(shows[free][:, required]).tocoo()
    pairs = len(required) * num_splits
    unit, label = of_label.coords
    splits = np.arange(num_splits)
    covers = coo_array(
        (
            np.ones(len(unit) * num_splits),
            (np.add.outer(label * num_splits, splits).ravel(), np.add.outer(unit * num_splits, splits).ravel()),
        ),
        shape=(pairs, count * num_splits),
    )
    places = np.arange(count * num_splits)
    once = coo_array((np.ones(len(places)), (places // num_splits, places)), shape=(count, len(places)))
    full = coo_array(
        (np.repeat(sizes[free], num_splits), (places % num_splits, places)), shape=(num_splits, len(places))
    )
    eye, none = coo_array(np.eye(num_splits)), coo_array
    lacks = coo_array((np.ones(pairs), (np.arange(pairs), np.arange(pairs))), shape=(pairs, pairs))
    constraints = [
        LinearConstraint(hstack([once, none((count, pairs + 2 * num_splits))]).tocsr(), 1, 1),
        LinearConstraint(hstack([covers, lacks, none((pairs, 2 * num_splits))]).tocsr(), 1 - there.T.ravel(), np.inf),
        LinearConstraint(hstack([full, none((num_splits, pairs)), -eye, eye]).tocsr(), room, room),
    ]
    moved = (places % num_splits != split_of[free][places // num_splits]) / (2.0 * count + 1)
    weights = np.concatenate([moved, np.full(pairs, 2.0 * sizes.sum() + 1), np.ones(2 * num_splits)])
    limits = np.concatenate([np.ones(len(places) + pairs), np.full(2 * num_splits, np.inf)])
    whole = np.concatenate([np.ones(len(places)), np.zeros(pairs + 2 * num_splits)])
    found = milp(
        weights, constraints=constraints, bounds=Bounds(0, limits), integrality=whole, options={"time_limit": 60}
    )
    if found.x is None:
        return split_of
    better = split_of.copy()
    better[free] = np.argmax(found.x[: len(places)].reshape(count, num_splits), axis=1)
    same = _faults(better, shows, sizes, target, required) >= _faults(split_of, shows, sizes, target, required)
    return split_of if same else better


def _free_units(split_of: np.ndarray, shows: csr_array, num_splits: int, required: np.ndarray) -> np.ndarray:
    """All units, or where they are too many those of missing labels, and of the labels that are rarest beside them."""
    limit = _MAX_CHOICES // num_splits
    if len(split_of) <= limit:
        return np.arange(len(split_of))
    by_label = shows.tocsc()
    missing = (_placed(split_of, shows, num_splits)[:, required] == 0).any(0)
    carriers = np.diff(by_label.indptr)[required]
    chosen = np.zeros(len(split_of), dtype=bool)
    for place in np.lexsort((carriers, ~missing)):
        label = required[place]
        units = by_label.indices[by_label.indptr[label] : by_label.indptr[label + 1]]
        if chosen.sum() + len(units) > limit:
            break
        chosen[units] = True
    return np.flatnonzero(chosen)
