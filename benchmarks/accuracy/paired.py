"""Is one head better than another? Differences of mAP, paired by image and seed, with a bootstrap interval."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000


class Difference(NamedTuple):
    """Of mAP, as a fraction: the mean over seeds, and the 95 % interval over images and seeds."""

    mean: float
    low: float
    high: float


def weighted_average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`average_precision` of many draws of the same images.

    Args:
        scores: (n, num_labels).
        labels: (n, num_labels) of 1, 0, and -100 or NaN for unknown.
        weights: (draws, n), how often an image was drawn.

    Returns:
        (draws, num_labels); NaN where a draw holds no positive of a label.
    """
    found = np.full((len(weights), scores.shape[1]), np.nan)
    for label in range(scores.shape[1]):
        known = np.flatnonzero((labels[:, label] == 0) | (labels[:, label] == 1))
        order = known[np.argsort(-scores[known, label], kind="stable")]
        ranked = scores[order, label]
        # Images of one score come at once: precision is read behind the last of them.
        ends = np.searchsorted(-ranked, -ranked, side="right") - 1
        drawn = weights[:, order].astype(np.float64)
        positive = drawn * (labels[order, label] == 1)
        above, hits = drawn.cumsum(1)[:, ends], positive.cumsum(1)[:, ends]
        total = positive.sum(1)
        precision = np.divide(hits, above, out=np.zeros_like(hits), where=above > 0)
        np.divide((positive * precision).sum(1), total, out=found[:, label], where=total > 0)
    return found


def paired_difference(
    scores: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: Mapping[str, Sequence[int]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Difference]:
    """How far `scores` are above `reference` in mAP.

    Each draw takes as many images and as many seeds as there are, with replacement, the same for both. A label without
    a positive among the drawn images is left out of that draw for both.

    Args:
        scores, reference: one (n, num_labels) a seed, of the same seeds.
        labels: (n, num_labels), the label contract.
        groups: label indices whose mean is wanted, by name.
    """
    generator = np.random.default_rng(seed)
    n = len(labels)
    once = np.ones((1, n))
    weights = np.concatenate([once, generator.multinomial(n, np.full(n, 1 / n), size=draws)])
    of_seeds = np.stack(
        [
            weighted_average_precision(one, labels, weights) - weighted_average_precision(other, labels, weights)
            for one, other in zip(scores, reference, strict=True)
        ]
    )
    seeds = generator.multinomial(len(of_seeds), np.full(len(of_seeds), 1 / len(of_seeds)), size=draws) / len(of_seeds)
    result = {}
    for name, group in groups.items():
        values = np.nanmean(of_seeds[:, :, list(group)], axis=2)  # (seeds, 1 + draws)
        low, high = np.quantile((seeds.T * values[:, 1:]).sum(0), (0.025, 0.975))
        result[name] = Difference(float(values[:, 0].mean()), float(low), float(high))
    return result
