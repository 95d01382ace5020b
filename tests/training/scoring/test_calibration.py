"""Calibration: the fit against scikit-learn's, the error by hand, and weights that hold it exactly."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

from modeling_hsvlt import MlTrConfig, MlTrForImageClassification
from training.scoring.calibration import (
    Calibration,
    check_foldable,
    fit_calibration,
    fold_calibration,
    mean_log_loss,
    move_thresholds,
    stored_calibration,
)
from training.scoring.held_out import held_out_scores
from training.scoring.reliability import reliability

from ..tiny_checkpoint import tiny_model


def make(seed=0, n=600, num_labels=4, unknown=0.1):
    """Scores that are too sure of themselves, each label in its own way."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.5, (n, num_labels))
    labels = (rng.random(logits.shape) < expit(logits)).astype(np.int64)
    labels[rng.random(labels.shape) < unknown] = -100
    scale, bias = np.linspace(1, 3, num_labels), np.linspace(-1, 1, num_labels)
    return expit(scale * logits + bias).astype(np.float32), labels


def test_platt_scaling_is_logistic_regression_on_the_logit():
    scores, labels = make()
    fitted = fit_calibration(scores, labels, shrinkage=0)
    for column in range(4):
        known = labels[:, column] != -100
        x = logit(scores[known, column].astype(np.float64))[:, None]
        expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, labels[known, column])
        assert fitted.scale[column] == pytest.approx(expected.coef_[0, 0], rel=1e-3)
        assert fitted.bias[column] == pytest.approx(expected.intercept_[0], abs=1e-3)


@pytest.mark.parametrize("method", ["platt", "temperature"])
@pytest.mark.parametrize("per_label", [True, False])
def test_no_neighbouring_fit_has_a_lower_log_loss(method, per_label):
    scores, labels = make(1)
    fitted = fit_calibration(scores, labels, method, per_label=per_label, shrinkage=0)
    if method == "temperature":
        assert not fitted.bias.any()
    if not per_label:
        assert len(set(fitted.scale)) == len(set(fitted.bias)) == 1
    best = mean_log_loss(fitted.apply(scores), labels)
    assert best < mean_log_loss(scores, labels)
    for scale, bias in ((1.02, 0), (0.98, 0), (1, 0.03), (1, -0.03)):
        if method == "platt" or not bias:
            other = Calibration(fitted.scale * scale, fitted.bias + bias)
            assert mean_log_loss(other.apply(scores), labels) > best


def test_labels_with_few_positives_lean_on_the_fit_of_all():
    scores, labels = make(2, n=2000, unknown=0)
    labels[:, 3] = -100
    labels[:40, 2], labels[40:, 2] = make(3, n=40, unknown=0)[1][:, 2], -100
    own = fit_calibration(scores, labels, shrinkage=0)
    fitted = fit_calibration(scores, labels)
    shared = fit_calibration(scores, labels, per_label=False)
    distances = [abs(np.log(each.scale / shared.scale)) + abs(each.bias - shared.bias) for each in (fitted, own)]
    kept = (distances[0] / np.maximum(distances[1], 1e-12))[:3]
    assert kept[0] > 0.9 and kept[1] > 0.8 and kept[2] < 0.8
    assert distances[0][3] == 0  # nothing is known of the last
    strong = fit_calibration(scores, labels, shrinkage=1e9)
    assert strong.scale == pytest.approx(np.ones(4), abs=1e-3) and strong.bias == pytest.approx(np.zeros(4), abs=1e-3)


def test_perfectly_separated_labels_stay_finite():
    scores, labels = np.array([[0.1], [0.2], [0.8], [0.9]], dtype=np.float32), np.array([[0], [0], [1], [1]])
    for shrinkage in (0, 10):
        fitted = fit_calibration(scores, labels, shrinkage=shrinkage)
        assert np.isfinite(fitted).all() and fitted.scale[0] > 0
    extremes = fitted.apply(np.array([[0.0], [1.0]], dtype=np.float32))
    assert np.isfinite(extremes).all() and extremes[0] < 1e-6 and extremes[1] > 0.999


def test_unknown_labels_do_not_count():
    scores, labels = make(4, unknown=0.3)
    fitted = fit_calibration(scores, labels)
    elsewhere = np.where(labels == -100, 0.5, scores).astype(np.float32)
    np.testing.assert_array_equal(fit_calibration(elsewhere, labels), fitted)
    assert reliability(elsewhere, labels).ece() == reliability(scores, labels).ece()
    assert mean_log_loss(elsewhere, labels) == mean_log_loss(scores, labels)


def test_calibration_that_is_undone_or_done_twice():
    scores = make()[0].clip(0.001, 0.99)  # beyond, float32 has few steps left below 1
    first, second = Calibration(np.full(4, 2.0), np.full(4, 0.3)), Calibration(np.arange(1.0, 5), np.arange(4.0))
    np.testing.assert_allclose(first.inverse().apply(first.apply(scores)), scores, atol=1e-5)
    np.testing.assert_allclose(first.then(second).apply(scores), second.apply(first.apply(scores)), atol=1e-5)


def test_the_log_loss_is_scikit_learns():
    scores, labels = make(5)
    known = labels != -100
    assert mean_log_loss(scores, labels) == pytest.approx(log_loss(labels[known], scores[known].astype(float)))


def test_calibration_helps_on_other_images():
    scores, labels = make(7, n=2000)
    held_out = held_out_scores(scores, labels, "platt")
    assert reliability(held_out, labels).ece() < 0.5 * reliability(scores, labels).ece()
    assert mean_log_loss(held_out, labels) < mean_log_loss(scores, labels)
    assert held_out_scores(scores, np.where(np.arange(2000)[:, None] < 1, labels, 0), "platt") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "isotonic"}, "none of platt, temperature"),
        ({"shrinkage": -1.0}, "from 0 on"),
        ({"scores": np.full((600, 4), 3.0)}, "give sigmoid scores"),
        ({"labels": np.zeros((600, 4))}, "None of the 4 labels has a known positive"),
        ({"labels": np.full((600, 4), 0.5)}, "Row 0, label 'a'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    scores, labels = make()
    with pytest.raises(ValueError, match=message):
        fit_calibration(**{"scores": scores, "labels": labels, "label_names": list("abcd"), **arguments})


def mltr():
    torch.manual_seed(0)
    config = MlTrConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, num_labels=3
    )
    return MlTrForImageClassification(config).eval()


CALIBRATION = Calibration(np.array([0.5, 2.0, 1.5]), np.array([-1.0, 0.3, 0.0]))
SHARED = Calibration(np.full(3, 0.7), np.full(3, -0.4))


@pytest.mark.parametrize(
    ("make_model", "calibration"),
    [(tiny_model, CALIBRATION), (mltr, CALIBRATION), (lambda: tiny_model(classifier="shared"), SHARED)],
    ids=["hsvlt", "mltr", "hsvlt shared"],
)
def test_the_classifier_holds_the_calibration_exactly(make_model, calibration):
    model, pixels = make_model(), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        fold_calibration(model, calibration)
        after = model(pixel_values=pixels).logits
    scale, bias = (torch.from_numpy(values).float() for values in calibration)
    torch.testing.assert_close(after, scale * before + bias, rtol=1e-5, atol=1e-5)


def test_models_that_cannot_hold_it_are_refused():
    with pytest.raises(ValueError, match=r"one for all 3 labels .* --shared"):
        fold_calibration(tiny_model(classifier="shared"), CALIBRATION)
    with pytest.raises(ValueError, match="candidate_labels"):
        check_foldable(tiny_model(candidate_labels=2), True)
    with pytest.raises(ValueError, match="residual attention"):
        check_foldable(tiny_model(residual_attention=True), True)
    with pytest.raises(ValueError, match="label_stream: tied"):
        check_foldable(tiny_model(label_stream="tied"), True)
    headless = tiny_model()
    for classifier in (None, nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), nn.Linear(8, 3, bias=False)):
        headless.classifier = classifier
        with pytest.raises(ValueError, match="does not end in a linear classifier with a bias"):
            check_foldable(headless, False)


def test_moved_thresholds_decide_as_before():
    scores = np.random.default_rng(0).random((500, 3), dtype=np.float32)
    thresholds = [0.2, 0.5, 0.93]
    moved = move_thresholds(thresholds, CALIBRATION)
    before, after = scores >= np.float32(thresholds), CALIBRATION.apply(scores) >= np.float32(moved)
    np.testing.assert_array_equal(before, after)
    assert move_thresholds([0.0, 1.0, np.nextafter(np.float32(1), np.float32(2))], CALIBRATION)[::2] == [
        0.0,
        pytest.approx(1, abs=1e-6),
    ]


def test_a_config_that_contradicts_itself_is_refused():
    config = tiny_model().config
    assert stored_calibration(config) is None
    for values in ([1.0, 1.0], [1.0, 0.0, 1.0]):
        config.calibration_info = {"scale": values, "bias": [0.0] * len(values)}
        with pytest.raises(ValueError, match="does not hold 3 scales"):
            stored_calibration(config)
