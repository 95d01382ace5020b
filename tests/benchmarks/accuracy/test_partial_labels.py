"""The benchmark of partial labels, on made features: labels are hidden as said, and a head learns from the rest."""

import numpy as np
import pytest
import torch

from benchmarks.accuracy.partial_labels import SETTINGS, train_linear, visible_labels
from training.data.sparse_labels import SparseLabels
from training.metrics.functional import average_precision


@pytest.fixture(scope="module")
def made():
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(600, 16, generator=generator), torch.randn(16, 5, generator=generator)
    present = (features @ weights > 3).numpy()
    rows, ids = np.nonzero(present)
    starts = np.searchsorted(rows, np.arange(601))
    values, default = np.ones(len(ids), np.float32), np.zeros(600, np.float32)
    return features, SparseLabels(starts, ids, values, default, 5, "ids"), present.astype(int)


def test_labels_are_hidden_as_each_setting_says(made):
    _, labels, present = made
    for _, (hide, losses) in SETTINGS.items():
        for loss in losses:
            visible = visible_labels(labels, hide, loss, seed=0).numpy()
            known = visible != -100
            if loss == "assumed absent":
                assert known.all() and (visible <= present).all() and visible.sum() < present.sum()
            elif hide is None:
                assert (visible == present).all()
            elif "known_fraction" in hide:
                assert (visible == present)[known].all() and abs(known.mean() - hide["known_fraction"]) < 0.03
            else:
                assert ((visible == 1).sum(1) == present.any(1)).all() and (visible[known] == 1).all()


def test_a_head_learns_from_one_positive_a_image(made):
    features, labels, present = made
    visible = visible_labels(labels, {"single_positive": True}, "weak_assume_negative", seed=0)
    model = train_linear(features, visible, "weak_assume_negative", epochs=30, seed=0)
    with torch.no_grad():
        scores = model(features).sigmoid().numpy()
    assert np.mean(average_precision(scores, present)) > 0.8
