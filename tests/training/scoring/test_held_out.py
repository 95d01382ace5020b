"""Held out is what the other half decides."""

import numpy as np

from training.scoring.held_out import halves, held_out_decisions
from training.scoring.thresholds import fit_thresholds

from .test_thresholds import make


def test_held_out_decisions_are_those_of_the_other_half():
    scores, labels = make(4, n=101)
    decided = held_out_decisions(scores, labels, min_positives=5)
    (first, second), back = halves(101)
    assert sorted([*first, *second]) == list(range(101)) and np.array_equal(back[0], second)
    np.testing.assert_array_equal(
        decided[first], scores[first] >= fit_thresholds(scores[second], labels[second], min_positives=5)
    )
    np.testing.assert_array_equal(
        decided[second], scores[second] >= fit_thresholds(scores[first], labels[first], min_positives=5)
    )
    labels[second] = 0
    assert held_out_decisions(scores, labels) is None
