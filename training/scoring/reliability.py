"""What scores promise and what comes true: the expected calibration error and the counts for its plot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..metrics.ranking import check_inputs, iterate_blocks

NUM_BINS = 15  # Guo et al.


class Reliability(NamedTuple):
    """What scores promise and what comes true, in bins of equal width over [0, 1].

    Each is (num_labels, NUM_BINS): `count`, known entries whose score lies in the bin (a score on an edge in the upper
    one); `promised`, the sum of their scores; `came_true`, how many of them are positives.
    """

    count: np.ndarray
    promised: np.ndarray
    came_true: np.ndarray

    def ece(self) -> float:
        """Expected calibration error of all labels' entries in common bins: the mean over entries of
        |mean score - share of positives| of the entry's bin. Easy absences dominate it."""
        gaps = np.abs(self.promised.sum(0) - self.came_true.sum(0))
        return float(gaps.sum() / self.count.sum())

    def ece_per_label(self) -> np.ndarray:
        """(num_labels,) expected calibration error of each label alone; NaN where nothing is known."""
        gaps, count = np.abs(self.promised - self.came_true).sum(1), self.count.sum(1)
        return np.where(count > 0, gaps / np.maximum(count, 1), np.nan)


def reliability(scores: np.ndarray, labels: np.ndarray) -> Reliability:
    """Counts for the calibration error and its plot.

    Args:
        scores: (n, num_labels) in [0, 1].
        labels: (n, num_labels) array or scipy sparse matrix of 1, 0, and -100 or NaN for unknown.

    Raises:
        ValueError: shapes that differ, scores outside [0, 1], labels that are none.
    """
    scores, labels = check_inputs(scores, labels)
    check_range(scores)
    bins = Reliability(*np.zeros((3, scores.shape[1], NUM_BINS)))
    for part, block, positive, known in iterate_blocks(scores, labels, "label"):
        row, column = np.nonzero(known)
        score = block[row, column].astype(np.float64)
        place = row * NUM_BINS + np.minimum((score * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        for field, weights in zip(bins, (None, score, positive[row, column]), strict=True):
            sums = np.bincount(place, weights, minlength=len(block) * NUM_BINS)
            field[part] = sums.reshape(len(block), NUM_BINS)
    return bins


def check_range(scores: np.ndarray) -> None:
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(
            f"The scores lie between {scores.min():.3g} and {scores.max():.3g}, but must be within [0, 1]; give "
            "sigmoid scores, not logits."
        )
