"""The `evaluate` module gives what the pure functions give, loaded by path and without a network."""

import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from training.metrics.functional import multilabel_report

MODULE = Path(__file__).parents[3] / "training" / "metrics" / "multilabel_classification"


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(str(MODULE), cache_dir=str(tmp_path))


def make(n=50, num_labels=6):
    rng = np.random.default_rng(0)
    scores, labels = rng.random((n, num_labels), dtype=np.float32), rng.integers(0, 2, (n, num_labels))
    labels[rng.random(labels.shape) < 0.2] = -100
    return scores, labels


def test_compute_equals_the_pure_functions(metric):
    scores, labels = make()
    options = {"threshold": [0.4] * 6, "top_k": 2, "groups": {"head": [0, 1]}}
    assert metric.compute(predictions=scores, references=labels, **options) == multilabel_report(
        scores, labels, **options
    )


def test_batches_of_any_size_add_up_and_the_metric_can_be_used_again(metric):
    scores, labels = make()
    with_nan = np.where(labels == -100, np.nan, labels)
    for _ in range(2):
        for part in np.split(np.arange(len(scores)), [7, 8, 30]):
            metric.add_batch(predictions=scores[part], references=with_nan[part].tolist())
        assert metric.compute() == multilabel_report(scores, labels)


def test_rows_of_unequal_length_are_refused(metric):
    with pytest.raises(ValueError, match="Row 1 of references has 1 entries and row 0 has 2"):
        metric.compute(predictions=[[0.9, 0.2], [0.4, 0.8]], references=[[1, 0], [0]])


def test_errors_name_the_label(metric):
    with pytest.raises(ValueError, match="Row 1, label 'dog': the score nan"):
        metric.compute(predictions=[[0.9, 0.2], [0.4, np.nan]], references=[[1, 0], [0, 1]], label_names=["cat", "dog"])


def test_away_from_the_checkout_it_says_what_is_missing(tmp_path, monkeypatch):
    for package in ("hsvlt_training", "training"):
        monkeypatch.setitem(sys.modules, f"{package}.metrics.functional", None)
    with pytest.raises(ModuleNotFoundError, match="run from the root of the checkout"):
        evaluate.load(str(MODULE), cache_dir=str(tmp_path))
