"""Thresholds: exact against trying every cut, or for F1 better than that on other images; sane with few positives;
stored without half-written files."""

import json
import os

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.metrics import f1_score

from modeling_hsvlt import HSVLTConfig
from training.metrics import ranking
from training.metrics.functional import multilabel_report
from training.scoring.thresholds import fit_thresholds, store_thresholds, threshold_info

from ..tiny_checkpoint import save_checkpoint, tiny_model

OBJECTIVES = [("precision", 0.6), ("precision", 1.0), ("recall", 0.8), ("recall", 1.0)]
COSTS = [("cost", 0.2), ("cost", 1.0), ("cost", 4.0)]


def make(seed=0, n=120, num_labels=7, unknown=0.1, steps=25):
    """Scores that say something about the labels, with ties; float32."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, num_labels)) < np.linspace(0.15, 0.6, num_labels)).astype(np.int64)
    scores = np.clip(rng.normal(0.4, 0.2, labels.shape) + 0.2 * labels, 0, 1)
    scores = (np.round(scores * steps) / steps).astype(np.float32)
    labels[rng.random(labels.shape) < unknown] = -100
    return scores, labels


def goodness(decided, labels, objective, target):
    """What the objective wants to be high, by its definition."""
    tp, predicted, positives = (decided & (labels == 1)).sum(), decided.sum(), (labels == 1).sum()
    precision, recall = tp / max(predicted, 1), tp / positives
    if objective == "cost":
        return -(target * (predicted - tp) + (positives - tp))
    if objective == "precision":
        return 1 + recall if precision >= target else precision
    return 1 + precision if recall >= target else recall


def brute_force(scores, labels, objective, target):
    """The best goodness over all cuts, and the lowest positive score that has it as a cut."""
    best = max(goodness(scores >= cut, labels, objective, target) for cut in {*scores.tolist(), 2.0})
    cuts = [*sorted(scores[labels == 1].tolist()), 2.0]
    return best, next(cut for cut in cuts if goodness(scores >= cut, labels, objective, target) == best)


@pytest.mark.parametrize(("objective", "target"), OBJECTIVES + COSTS)
@pytest.mark.parametrize("block_entries", [1 << 22, 200])
@pytest.mark.parametrize("steps", [25, 10**6], ids=["ties", "no ties"])
def test_thresholds_are_the_best_of_all_cuts(objective, target, block_entries, steps, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", block_entries)
    scores, labels = make(steps=steps)
    fitted = fit_thresholds(scores, labels, objective, target, min_positives=0)
    assert fitted.dtype == np.float32 and fitted.shape == (7,)
    for column, threshold in enumerate(fitted):
        known = labels[:, column] != -100
        s, y = scores[known, column], labels[known, column]
        best, cut = brute_force(s, y, objective, target)
        assert goodness(s >= threshold, y, objective, target) == pytest.approx(best, abs=1e-12)
        assert s[s >= threshold].min(initial=2.0) == pytest.approx(cut)  # of equally good cuts the one that finds more
        below = max(s[s < threshold].max(initial=0), 0)
        assert threshold == pytest.approx((below + min(cut, 1)) / 2, abs=1e-7)  # halfway


def test_a_wanted_precision_that_cannot_be_reached_gives_the_highest_there_is():
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]], dtype=np.float32)
    labels = np.array([[0], [1], [1], [0], [1]])  # precision at the cuts: 0, 1/2, 2/3, 1/2, 3/5
    assert fit_thresholds(scores, labels, "precision", 0.9, min_positives=0) == pytest.approx([0.65])


def test_where_false_alarms_cost_too_much_nothing_is_let_through():
    scores = np.array([[0.8], [0.6], [0.5]], dtype=np.float32)
    labels = np.array([[0], [1], [0]])
    assert fit_thresholds(scores, labels, "cost", 0.9, min_positives=0) == pytest.approx([0.55])
    assert fit_thresholds(scores, labels, "cost", 1.1, min_positives=0) == pytest.approx([0.9])
    scores[0] = 1  # a saturated score
    threshold = fit_thresholds(scores, labels, "cost", 1.1, min_positives=0)
    assert not (scores >= threshold).any()
    # The shared threshold as well: two labels, too few positives for one of their own.
    both = fit_thresholds(np.hstack([scores, scores]), np.hstack([labels, labels]), "cost", 1.1, min_positives=10**9)
    assert not (scores >= both).any()


def test_the_cost_threshold_of_calibrated_scores_is_the_one_of_decision_theory():
    rng = np.random.default_rng(0)
    scores = rng.random((200_000, 1)).astype(np.float32)
    labels = (rng.random(scores.shape) < scores).astype(np.int64)
    for cost in (0.25, 1, 4):
        assert fit_thresholds(scores, labels, "cost", cost) == pytest.approx([cost / (1 + cost)], abs=0.02)


def test_neighbouring_float32_scores_are_told_apart():
    low = np.float32(0.3)
    for _ in range(50):
        high = np.nextafter(low, np.float32(1))
        scores = np.array([[low], [high]])
        threshold = fit_thresholds(scores, np.array([[0], [1]]), "recall", 1.0, min_positives=0)
        assert (scores >= threshold).ravel().tolist() == [False, True]
        low = high


def test_a_label_with_few_positives_leans_on_the_shared_threshold():
    scores, labels = make(1, n=400, unknown=0)
    labels[:, 0], labels[:3, 0], labels[:, 1] = 0, 1, 0  # three positives; none
    recall = {"objective": "recall", "target": 0.8}
    own = fit_thresholds(scores, labels, **recall, min_positives=0)
    shared = fit_thresholds(scores.reshape(-1, 1), labels.reshape(-1, 1), **recall, min_positives=0)[0]
    fitted = fit_thresholds(scores, labels, **recall, min_positives=12)
    assert fitted[0] == pytest.approx(3 / 12 * own[0] + 9 / 12 * shared)
    assert fitted[1] == pytest.approx(shared) and own[1] == pytest.approx(shared)
    np.testing.assert_array_equal(fitted[2:], own[2:])
    assert own[0] != pytest.approx(shared)


def f1_of(tp, predicted, positives):
    return 2 * tp / (predicted + positives)


def middle_of_good_cuts(s, y):
    """Of all cuts at a positive with an F1 within half a standard error of the best: between the outermost scores."""
    found = {cut: f1_of(y[s >= cut].sum(), (s >= cut).sum(), y.sum()) for cut in s[y == 1].tolist()}
    best = max(found.values())
    good = [cut for cut, f1 in found.items() if f1 >= best - 0.5 * (best * (1 - best) / y.sum()) ** 0.5]
    return (max(good) + s[s < min(good)].max(initial=0)) / 2


def platt(s, y, center, shrinkage):
    """Log scale and bias by a search without gradients, over single entries."""

    def loss(parameters):
        z = np.exp(parameters[0]) * logit(s) + parameters[1]
        return -np.log(np.where(y == 1, expit(z), expit(-z))).sum() + shrinkage / 2 * ((parameters - center) ** 2).sum()

    return minimize(loss, center, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-7}).x


def half_of_the_best_f1(s, y, center):
    log_scale, bias = platt(s, y, center, 10)
    probability = np.sort(expit(np.exp(log_scale) * logit(s) + bias))[::-1]
    best = max(f1_of(probability[:n].sum(), n, probability.sum()) for n in range(1, len(s) + 1))
    return expit((logit(best / 2) - bias) / np.exp(log_scale))


@pytest.mark.parametrize("min_positives", [0, 10, 40])
@pytest.mark.parametrize("block_entries", [1 << 22, 200])
def test_the_f1_threshold_is_drawn_from_a_labels_own_cuts_to_those_of_calibrated_scores(
    min_positives, block_entries, monkeypatch
):
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", block_entries)
    scores, labels = make(n=200, num_labels=5, steps=10**6)
    scores = np.clip(scores**2, 1e-3, 1 - 1e-3)
    labels[:, 0] = 0
    labels[:2, 1], labels[2:, 1] = 1, 0
    known = labels != -100
    center = platt(scores[known], labels[known], np.zeros(2), 1)
    shared = middle_of_good_cuts(scores[known], labels[known])
    fitted = fit_thresholds(scores, labels, min_positives=min_positives)
    assert fitted[0] == pytest.approx(shared, abs=1e-6) and fitted.dtype == np.float32
    for column in range(1, 5):
        s, y = scores[known[:, column], column], labels[known[:, column], column]
        positives, lean = y.sum(), min_positives / 10
        drawn_to = (positives * half_of_the_best_f1(s, y, center) + lean * shared) / (positives + lean)
        expected = (positives * middle_of_good_cuts(s, y) + 100 * drawn_to) / (positives + 100)
        assert fitted[column] == pytest.approx(expected, abs=0.004)  # calibrated in bins of logits


def test_the_f1_threshold_is_better_on_other_images_than_the_best_of_all_cuts():
    rng = np.random.default_rng(0)
    frequency, strength, bias = np.geomspace(0.3, 0.01, 30), rng.uniform(1, 4, 30), rng.normal(0, 0.5, 30)

    def draw(n):
        labels = (rng.random((n, 30)) < frequency).astype(np.int64)
        logits = strength * (labels * strength + rng.normal(size=labels.shape)) - strength**2 / 2 + logit(frequency)
        return expit(0.8 * logits + bias).astype(np.float32), labels

    scores, labels = draw(500)
    best_cuts = [
        max(s[y == 1].tolist(), key=lambda cut, s=s, y=y: f1_of(y[s >= cut].sum(), (s >= cut).sum(), y.sum()))
        for s, y in zip(scores.T, labels.T, strict=True)
    ]
    others, present = draw(20_000)
    f1 = [
        f1_score(present, others >= thresholds, average=average)
        for average in ("macro", "micro")
        for thresholds in (np.array(best_cuts, dtype=np.float32), fit_thresholds(scores, labels))
    ]
    assert f1[1] > f1[0] + 0.02 and f1[3] > f1[2]


def test_f1_thresholds_of_scores_without_noise_or_spread_are_within_them():
    labels = np.repeat([[1, 0], [0, 1]], 20, axis=0)
    for low, high in ((0.0, 1.0), (0.2, 0.7), (0.49, 0.51)):
        scores = np.where(labels == 1, high, low).astype(np.float32)
        np.testing.assert_array_equal(scores >= fit_thresholds(scores, labels), labels == 1)
    assert np.isfinite(fit_thresholds(np.full((40, 2), 0.3, dtype=np.float32), labels)).all()


def test_fitted_thresholds_raise_macro_f1_on_other_images():
    scores, labels = make(2, n=4000, unknown=0)
    scores = scores**3  # badly calibrated
    fitted = fit_thresholds(scores[:2000], labels[:2000])
    before, after = (f1_score(labels[2000:], scores[2000:] >= t, average="macro") for t in (0.5, fitted))
    assert after > before + 0.1
    assert after == pytest.approx(multilabel_report(scores[2000:], labels[2000:], fitted)["f1_macro"])


def test_unknown_labels_do_not_count_and_sparse_labels_are_read():
    scores, labels = make(3, unknown=0.3)
    fitted = fit_thresholds(scores, labels)
    elsewhere = np.where(labels == -100, 1 - scores, scores)
    np.testing.assert_array_equal(fit_thresholds(elsewhere, labels), fitted)
    np.testing.assert_array_equal(fit_thresholds(scores, np.where(labels == -100, np.nan, labels)), fitted)
    np.testing.assert_array_equal(fit_thresholds(scores, sparse.csr_matrix(labels)), fitted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "accuracy"}, "none of f1, precision, recall, cost"),
        ({"target": 0.5}, "no meaning with the objective 'f1'"),
        ({"objective": "recall"}, "needs a target"),
        ({"objective": "precision", "target": 1.5}, "needs a target"),
        ({"objective": "cost"}, "needs a target above 0"),
        ({"objective": "cost", "target": 0.0}, "needs a target above 0"),
        ({"scores": np.full((120, 7), 3.0)}, "give sigmoid scores"),
        ({"labels": np.zeros((120, 7))}, "None of the 7 labels has a known positive"),
        ({"labels": np.full((120, 7), 0.5)}, "Row 0, label 'a'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    scores, labels = make()
    with pytest.raises(ValueError, match=message):
        fit_thresholds(**{"scores": scores, "labels": labels, "label_names": list("abcdefg"), **arguments})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


def test_thresholds_go_through_the_file_and_the_model_alike(checkpoint, tmp_path):
    fitted = fit_thresholds(*make(num_labels=3))
    info = threshold_info(make(num_labels=3)[1], dataset=str(tmp_path), split="validation")
    before = json.loads((checkpoint / "config.json").read_text())
    store_thresholds(checkpoint, fitted, info)
    after = json.loads((checkpoint / "config.json").read_text())
    written = {"thresholds": None, "threshold_info": None}
    assert {**after, **written} == {**before, **written}
    assert after["threshold_info"] == info and info["dataset"] == tmp_path.name
    assert not (checkpoint / ".config.json.new").exists()

    loaded = HSVLTConfig.from_pretrained(checkpoint)
    np.testing.assert_array_equal(np.array(loaded.thresholds, dtype=np.float32), fitted)  # to the last bit
    model = tiny_model()
    store_thresholds(model, fitted, info)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["thresholds"] == after["thresholds"] and saved["threshold_info"] == info


def test_the_fingerprint_tells_splits_apart():
    labels = make()[1]
    first = threshold_info(labels, dataset="me/photos", split="validation")
    assert first == threshold_info(labels.astype(np.float32), dataset="me/photos", split="validation")
    for other in (labels[:-1], labels[::-1], labels.reshape(60, -1)):
        found = threshold_info(other, dataset="me/photos", split="validation")
        assert found["split_fingerprint"] != first["split_fingerprint"]


def test_an_interrupted_write_leaves_the_old_file(checkpoint, monkeypatch):
    before = (checkpoint / "config.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store_thresholds(checkpoint, [0.1, 0.2, 0.3], {})
    assert (checkpoint / "config.json").read_bytes() == before


def test_thresholds_that_do_not_fit_the_checkpoint_are_refused(checkpoint, tmp_path):
    for target in (checkpoint, tiny_model()):
        with pytest.raises(ValueError, match=r"There are 2 thresholds, but .* has 3 labels"):
            store_thresholds(target, [0.5, 0.5], {})
    with pytest.raises(ValueError, match="not finite"):
        store_thresholds(checkpoint, [0.5, 0.5, np.nan], {})
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        store_thresholds(tmp_path, [0.5, 0.5, 0.5], {})
