"""The mistakes that the page shows, and confusion counts by hand."""

import numpy as np
import pytest

from training.report.mistakes import MISTAKES_PER_LABEL, co_occurrence_confusion, confident_mistakes

from .test_page import make


def test_the_most_confident_mistakes():
    labels = np.array([[0, 1], [0, 1], [0, 0], [-100, 0], [0, 1]])
    scores = np.array([[0.9, 0.1], [0.8, 0.3], [0.7, 0.95], [1.0, 0.2], [0.6, 0.9]], dtype=np.float32)
    found = confident_mistakes(scores, labels, np.array([0.65, 0.5]), "false positives")
    # Row 2 shows its surest one only; row 3 is unknown; row 4 is below the threshold.
    assert [(mistake.row, mistake.label) for mistake in found] == [(2, 1), (0, 0), (1, 0)]
    assert found[0].score == pytest.approx(0.95) and found[0].threshold == 0.5
    missed = confident_mistakes(scores, labels, np.array([0.65, 0.5]), "misses")
    assert [(mistake.row, mistake.label) for mistake in missed] == [(0, 1), (1, 1)]
    many = confident_mistakes(np.full((50, 2), 0.9), np.zeros((50, 2)), np.full(2, 0.5), "false positives")
    assert np.bincount([mistake.label for mistake in many]).tolist() == [MISTAKES_PER_LABEL] * 2
    assert len({mistake.row for mistake in many}) == len(many)


def test_confusion_counts_by_hand():
    scores, labels = make(1, n=60)
    thresholds = np.full(4, 0.25)
    confusion = co_occurrence_confusion(scores, labels, thresholds)
    for column, predicted in enumerate(confusion["predicted"]):
        absent, wrong = labels[:, predicted] == 0, (labels[:, predicted] == 0) & (scores[:, predicted] >= 0.25)
        assert confusion["usual"][column] == pytest.approx(wrong.sum() / absent.sum())
        for row in range(4):
            present = labels[:, row] == 1
            assert confusion["wrong"][row, column] == (present & wrong).sum()
            assert confusion["images"][row, column] == (present & absent).sum()
    assert not len(co_occurrence_confusion(scores, labels, np.ones(4))["predicted"])
