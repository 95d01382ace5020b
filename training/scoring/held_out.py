"""What thresholds and calibrations are worth on images that they were not fitted to.

The rows are divided at random into two halves, and each is treated by the fit to the other.
"""

from __future__ import annotations

import numpy as np

from .calibration import fit_calibration
from .thresholds import fit_thresholds


def halves(num_rows: int, seed: int = 0) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Two random halves of the row indices as (fit, apply), and the other way round."""
    first, second = (np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(num_rows), 2))
    return (first, second), (second, first)


def held_out_decisions(scores: np.ndarray, labels: np.ndarray, *objective, seed: int = 0, **how) -> np.ndarray | None:
    """Which labels fitted thresholds give to images that they were not fitted to.

    Args:
        objective, how: See `fit_thresholds`.

    Returns:
        (n, num_labels) bool; None where the halves are too small: one holds no known positive at all.
    """
    decided = np.zeros(scores.shape, dtype=bool)
    for fitted, applied in halves(len(scores), seed):
        if not (labels[fitted] == 1).any():
            return None
        decided[applied] = scores[applied] >= fit_thresholds(scores[fitted], labels[fitted], *objective, **how)
    return decided


def held_out_scores(scores: np.ndarray, labels: np.ndarray, method: str, *, seed: int = 0, **how) -> np.ndarray | None:
    """Scores calibrated on other images.

    Args:
        how: See `fit_calibration`.

    Returns:
        (n, num_labels); None as above.
    """
    calibrated = np.empty_like(scores)
    for fitted, applied in halves(len(scores), seed):
        if not (labels[fitted] == 1).any():
            return None
        calibrated[applied] = fit_calibration(scores[fitted], labels[fitted], method, **how).apply(scores[applied])
    return calibrated
