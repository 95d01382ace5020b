"""The expected calibration error by its definition."""

import numpy as np
import pytest

from training.scoring.reliability import reliability

from .test_calibration import make


def test_the_calibration_error_by_its_definition():
    scores, labels = make(6)
    scores[0, 0], labels[0, 0] = 1.0, 1  # belongs to the last bin

    def by_hand(s, y):
        error = 0
        for edge in range(15):
            inside = (s * 15 >= edge) & ((s * 15 < edge + 1) | ((edge == 14) & (s == 1)))
            if inside.any():
                error += inside.mean() * abs(s[inside].mean() - y[inside].mean())
        return error

    bins, known = reliability(scores, labels), labels != -100
    assert bins.ece() == pytest.approx(by_hand(scores[known].astype(float), labels[known]))
    expected = [by_hand(scores[known[:, j], j].astype(float), labels[known[:, j], j]) for j in range(4)]
    assert bins.ece_per_label() == pytest.approx(expected)
    labels[:, 1] = -100
    assert np.isnan(reliability(scores, labels).ece_per_label()).tolist() == [False, True, False, False]
