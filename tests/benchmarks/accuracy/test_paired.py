import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from benchmarks.accuracy.paired import paired_difference, weighted_average_precision


def drawn_data(n=60, num_labels=4, seed=0):
    generator = np.random.default_rng(seed)
    labels = (generator.random((n, num_labels)) < 0.3).astype(np.float32)
    scores = np.round(generator.random((n, num_labels)) + 0.4 * labels, 1).astype(np.float32)  # with ties
    return scores, labels


def test_a_draw_scores_as_scikit_learn_scores_its_images():
    scores, labels = drawn_data()
    generator = np.random.default_rng(1)
    rows = generator.integers(0, len(labels), (5, len(labels)))
    weights = np.stack([np.bincount(each, minlength=len(labels)) for each in rows])
    found = weighted_average_precision(scores, labels, weights)
    for draw, each in enumerate(rows):
        expected = [average_precision_score(labels[each, k], scores[each, k]) for k in range(labels.shape[1])]
        np.testing.assert_allclose(found[draw], expected, rtol=1e-6)


def test_what_is_unknown_or_not_drawn_counts_for_nothing():
    scores, labels = drawn_data()
    weights = np.ones((1, len(labels)))
    labels[:10, 0] = -100
    labels[50:, 0] = np.nan
    found = weighted_average_precision(scores, labels, weights)
    assert found[0, 0] == pytest.approx(average_precision_score(labels[10:50, 0], scores[10:50, 0]), rel=1e-6)
    assert np.isnan(weighted_average_precision(scores, labels, weights * (labels[:, 1] != 1))[0, 1])


def test_pairs_tell_what_single_intervals_hide():
    scores, labels = drawn_data(n=300)
    generator = np.random.default_rng(2)
    seeds = [scores + 0.02 * generator.random(scores.shape) for _ in range(3)]
    better = [each + 0.05 * labels for each in seeds]
    groups = {"all": range(4), "last": [3]}
    difference = paired_difference(better, seeds, labels, groups, draws=300)
    for name, group in groups.items():
        expected = np.mean(
            [
                average_precision_score(labels[:, k], one[:, k]) - average_precision_score(labels[:, k], other[:, k])
                for one, other in zip(better, seeds, strict=True)
                for k in group
            ]
        )
        assert difference[name].mean == pytest.approx(expected, rel=1e-6)
        assert 0 < difference[name].low < expected < difference[name].high
    same = paired_difference(seeds, seeds, labels, groups, draws=20)
    assert same["all"] == (0, 0, 0)
    assert paired_difference(better, seeds, labels, groups, draws=300) == difference
