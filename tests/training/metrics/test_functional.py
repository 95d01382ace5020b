"""Metrics against scikit-learn, against plain loops over the definitions, and by hand."""

import numpy as np
import pytest
from scipy import sparse
from sklearn import metrics as sk

from modeling_hsvlt import label_contract
from training.metrics import ranking
from training.metrics.functional import average_precision, decision_report, multilabel_report, per_label_report

TOLERANCE = 1e-9


def make(seed=0, n=200, num_labels=9, ties=True, unknown=0.0, dtype=np.float64):
    """Scores that tie often, labels of very different frequency, label 3 absent."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n, num_labels))
    scores = (np.round(scores * 12) / 12 if ties else scores).astype(dtype)
    labels = (rng.random((n, num_labels)) < np.linspace(0.05, 0.6, num_labels)).astype(np.int64)
    labels[:, 3] = 0
    labels[rng.random((n, num_labels)) < unknown] = -100
    return scores, labels


@pytest.fixture(params=[None, 40], ids=["one block", "many blocks"])
def block_entries(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(ranking, "BLOCK_ENTRIES", request.param)


def known_columns(scores, labels):
    for column in range(scores.shape[1]):
        known = labels[:, column] != -100
        yield scores[known, column], labels[known, column]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("unknown", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_non_interpolated_ap_equals_scikit_learn(block_entries, ties, unknown, dtype):
    scores, labels = make(1, ties=ties, unknown=unknown, dtype=dtype)
    found = average_precision(scores, labels)
    for value, (s, y) in zip(found, known_columns(scores, labels), strict=True):
        if y.any():
            assert value == pytest.approx(sk.average_precision_score(y, s), abs=TOLERANCE)
        else:
            assert np.isnan(value)
    assert np.isnan(found).sum() == 1
    with_nan = np.where(labels == -100, np.nan, labels)
    np.testing.assert_array_equal(average_precision(scores, with_nan), found)


def interpolated_by_definition(scores, labels):
    """VOC2007 and VOC2010 AP as their development kits describe them, one cut after another."""
    points = []  # (hits, precision) at every cut
    for cut in sorted(set(scores), reverse=True):
        predicted = scores >= cut
        points.append((int(labels[predicted].sum()), labels[predicted].mean()))
    total = int(labels.sum())
    voc07 = np.mean([max(p for hits, p in points if 10 * hits >= level * total) for level in range(11)])
    voc10 = sum(
        (after - before) / total * max(p for hits, p in points if hits >= after)
        for before, after in zip([0] + [hits for hits, _ in points], [hits for hits, _ in points], strict=False)
    )
    return voc07, voc10


def test_interpolated_aps_equal_their_definitions(block_entries):
    scores, labels = make(2, unknown=0.2)
    voc07, voc10 = average_precision(scores, labels, "voc07"), average_precision(scores, labels, "voc10")
    for column, (s, y) in enumerate(known_columns(scores, labels)):
        if y.any():
            assert (voc07[column], voc10[column]) == pytest.approx(interpolated_by_definition(s, y), abs=TOLERANCE)
        else:
            assert np.isnan([voc07[column], voc10[column]]).all()


def test_the_three_aps_by_hand():
    # Ranks: hit, miss, miss, hit, hit. Precision at the hits: 1, 2/4, 3/5.
    scores, labels = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]]), np.array([[1], [0], [0], [1], [1]])
    assert average_precision(scores, labels)[0] == pytest.approx((1 + 0.5 + 0.6) / 3)
    # The envelope is 1, 0.6, 0.6; recall reaches 1/3 at the first, so levels 0 to 0.3 see 1 and the other seven 0.6.
    assert average_precision(scores, labels, "voc07")[0] == pytest.approx((4 * 1 + 7 * 0.6) / 11)
    assert average_precision(scores, labels, "voc10")[0] == pytest.approx((1 + 0.6 + 0.6) / 3)


def test_three_of_ten_positives_reach_the_recall_level_of_30_percent():
    labels = np.array([1] * 3 + [0] * 10 + [1] * 7)[:, None]
    scores = np.linspace(1, 0, len(labels))[:, None]
    # Levels 0 to 0.3 see precision 1, the other seven 10/20.
    assert average_precision(scores, labels, "voc07")[0] == pytest.approx((4 + 7 * 0.5) / 11)


def rated(labels):
    return (labels == 1).any(0)


@pytest.mark.parametrize("threshold", [0.5, np.linspace(0.2, 0.8, 9)], ids=["one", "per label"])
def test_report_equals_scikit_learn(block_entries, threshold):
    scores, labels = make(3)
    report, keep = multilabel_report(scores, labels, threshold), rated(labels)
    s, y = scores[:, keep], labels[:, keep]
    decided = scores >= threshold
    expected = {
        "mAP": sk.average_precision_score(y, s, average="macro"),
        "mAP_weighted": sk.average_precision_score(y, s, average="weighted"),
        "mAP_micro": sk.average_precision_score(labels, scores, average="micro"),
        "mAP_variance": np.var(sk.average_precision_score(y, s, average=None)),
        "CP": sk.precision_score(y, decided[:, keep], average="macro"),
        "CR": sk.recall_score(y, decided[:, keep], average="macro"),
        "f1_macro": sk.f1_score(y, decided[:, keep], average="macro"),
        "OP": sk.precision_score(labels, decided, average="micro"),
        "OR": sk.recall_score(labels, decided, average="micro"),
        "f1_micro": sk.f1_score(labels, decided, average="micro"),
        "ranking_loss": sk.label_ranking_loss(labels, scores),
        "coverage_error": sk.coverage_error(labels, scores),
        "LRAP": sk.label_ranking_average_precision_score(labels, scores),
        "num_samples": 200,
        "num_labels": 9,
        "num_labels_without_positive": 1,
        "num_unknown": 0,
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected, abs=TOLERANCE)
    assert report["CF1"] == pytest.approx(2 * report["CP"] * report["CR"] / (report["CP"] + report["CR"]))
    assert report["CF1"] != pytest.approx(report["CF1_per_class"])
    assert (report["OF1"], report["CF1_per_class"]) == (report["f1_micro"], report["f1_macro"])
    assert all(type(value) in (int, float) for value in report.values())


def test_unknown_entries_count_in_no_metric(block_entries):
    scores, labels = make(4, unknown=0.3)
    labels[5] = -100  # an image about which nothing is known
    report = multilabel_report(scores, labels, top_k=None)
    rng = np.random.default_rng(0)
    elsewhere = np.where(labels == -100, rng.random(scores.shape), scores)
    assert multilabel_report(elsewhere, labels, top_k=None) == report
    known = labels != -100
    assert report["num_unknown"] == (~known).sum()
    assert report["mAP_micro"] == pytest.approx(sk.average_precision_score(labels[known], scores[known]), abs=TOLERANCE)
    assert report["OF1"] == pytest.approx(sk.f1_score(labels[known], scores[known] >= 0.5), abs=TOLERANCE)
    per_row = [
        [f(labels[[i]][:, known[i]], scores[[i]][:, known[i]]) for i in range(len(scores)) if known[i].sum() > 1]
        for f in (sk.label_ranking_loss, sk.coverage_error, sk.label_ranking_average_precision_score)
    ]
    assert [len(values) for values in per_row] == [known.any(1).sum()] * 3  # no row with a single known label here
    found = report["ranking_loss"], report["coverage_error"], report["LRAP"]
    assert found == pytest.approx(np.mean(per_row, axis=1), abs=TOLERANCE)


def test_top_k_is_selected_before_the_mask_and_must_reach_the_threshold():
    #                   three highest: 0, 1, 2; of these 2 is below 0.5 and 1 is unknown
    scores = np.array([[0.9, 0.8, 0.4, 0.3, 0.2], [0.6, 0.6, 0.6, 0.6, 0.1]])
    labels = np.array([[1, -100, 1, 0, 0], [0, 1, 0, 1, 1]])
    report = multilabel_report(scores, labels, threshold=0.5, top_k=3)
    # Second row: of four equal scores the first three are taken.
    tp, predicted, positives = np.array([[1, 1, 0, 0, 0], [2, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert report["OP_top3"] == pytest.approx(tp.sum() / predicted.sum())
    assert report["OR_top3"] == pytest.approx(tp.sum() / positives.sum())
    assert report["CP_top3"] == pytest.approx(np.mean([1 / 2, 1, 0, 0, 0]))
    assert report["CR_top3"] == pytest.approx(np.mean([1, 1, 0, 0, 0]))
    assert report["OF1"] == pytest.approx(2 * 3 / (5 + 5))  # without the limit label 3 of the second row is found


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_top_k_with_ties_takes_the_first(block_entries, top_k):
    scores, labels = make(15)
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-scores, axis=1, kind="stable")[:, :top_k], True, axis=1)
    report = multilabel_report(scores, labels, threshold=0.3, top_k=top_k)
    expected = multilabel_report(np.where(kept, scores, 0), labels, threshold=0.3)
    for name in ("CP", "CR", "CF1", "CF1_per_class", "OP", "OR", "OF1"):
        assert report[f"{name}_top{top_k}"] == expected[name]


def test_top_k_of_all_labels_changes_nothing():
    scores, labels = make(5)
    report = multilabel_report(scores, labels, top_k=20)
    assert all(report[name] == report[f"{name}_top20"] for name in ("CP", "CR", "CF1", "CF1_per_class", "OP", "OR"))


def test_nothing_predicted_gives_zero_and_no_nan():
    scores, labels = make(6)
    report = multilabel_report(scores, labels, threshold=2.0)
    for name in ("CP", "CR", "CF1", "CF1_per_class", "OP", "OR", "OF1", "OF1_top3"):
        assert report[name] == 0
    assert np.isfinite(list(report.values())).all()


def test_groups_average_their_rated_labels():
    scores, labels = make(7)
    groups = {"head": [8, 7, 6], "medium": np.array([3, 4]), "tail": [3], "none": []}
    report, ap = multilabel_report(scores, labels, groups=groups), average_precision(scores, labels)
    assert report["mAP_head"] == pytest.approx(ap[6:].mean())
    assert report["mAP_medium"] == pytest.approx(ap[4])
    assert [report[f"num_labels_{name}"] for name in groups] == [3, 1, 0, 0]
    assert "mAP_tail" not in report and "mAP_none" not in report


@pytest.mark.parametrize("threshold", [0.5, np.linspace(0.2, 0.8, 6)])
def test_decisions_alone_are_those_of_the_whole_report(block_entries, threshold):
    scores, labels = make(6, n=150, num_labels=6, unknown=0.2)
    whole, decided = multilabel_report(scores, labels, threshold), decision_report(scores, labels, threshold)
    assert decided.keys() >= {"CP", "CR", "CF1", "OP", "OR", "OF1", "f1_macro", "f1_micro"}
    assert decided == {name: whole[name] for name in decided}
    with pytest.raises(ValueError, match="nothing to measure"):
        decision_report(scores, np.where(labels == 1, 0, labels), threshold)


def test_per_label_report(block_entries):
    scores, labels = make(8, unknown=0.2)
    thresholds = np.linspace(0.3, 0.7, 9)
    table = per_label_report(scores, labels, thresholds)
    assert {len(column) for column in table.values()} == {9}
    for index, (s, y) in enumerate(known_columns(scores, labels)):
        row, decided = {name: column[index] for name, column in table.items()}, s >= thresholds[index]
        assert row["known"] == len(y) and row["positives"] == y.sum() and row["predicted"] == decided.sum()
        assert row["tp"] == (decided & (y == 1)).sum() and row["threshold"] == thresholds[index]
        if y.any():
            expected = [f(y, decided) for f in (sk.precision_score, sk.recall_score, sk.f1_score)]
            assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(expected)
            assert row["AP"] == pytest.approx(sk.average_precision_score(y, s), abs=TOLERANCE)
        else:
            assert row["precision"] == 0 and np.isnan([row["AP"], row["recall"], row["f1"]]).all()


def test_a_float32_threshold_decides_as_it_was_stored():
    scores, labels = np.array([[0.7], [0.1]], dtype=np.float32), np.array([[1], [0]])
    for threshold in (0.7, np.float32(0.7), np.array([0.7]), float(np.float32(0.7))):
        assert per_label_report(scores, labels, threshold)["tp"] == [1]


def test_sparse_labels_and_memory_mapped_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", 500)
    scores, labels = make(9, unknown=0.1, dtype=np.float32)
    on_disk = np.memmap(tmp_path / "scores", dtype=np.float32, mode="w+", shape=scores.shape, order="F")
    on_disk[:] = scores
    expected = multilabel_report(scores, labels)
    assert multilabel_report(on_disk, sparse.csr_matrix(labels)) == pytest.approx(expected, abs=1e-12)


class Computed:
    """Scores that exist only where they are read."""

    def __init__(self, scores):
        self._scores, self.shape, self.dtype = scores, scores.shape, scores.dtype

    def __getitem__(self, index):
        return self._scores[index].copy()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_and_blocks_change_nothing(num_threads, monkeypatch):
    scores, labels = make(16, unknown=0.1)
    expected = multilabel_report(scores, labels)
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", 100)
    monkeypatch.setattr(ranking, "POOLED_ENTRIES", 77)
    found = multilabel_report(Computed(scores), sparse.csr_matrix(labels), num_threads=num_threads)
    assert found == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="Row 150, label 4: the score nan"):
        scores[150, 4] = np.nan
        multilabel_report(scores, labels, num_threads=num_threads)


def test_blocks_bound_the_memory():
    import tracemalloc

    scores = np.broadcast_to(np.linspace(0, 1, 200_000, dtype=np.float32)[:, None], (200_000, 100))
    labels = sparse.random(200_000, 100, density=0.001, format="csr", random_state=0)
    labels.data[:] = 1
    tracemalloc.start()
    average_precision(scores, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6  # the dense scores alone would be 80 MB, twice that sorted, and 160 MB of ranks


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("names", [None, list("abcdefghi")])
def test_a_score_that_is_not_finite_is_named(block_entries, value, names):
    scores, labels = make(10)
    scores[123, 4] = value
    label = "4" if names is None else "'e'"
    for metric in (average_precision, multilabel_report, per_label_report):
        with pytest.raises(ValueError, match=f"Row 123, label {label}: the score {value}"):
            metric(scores, labels, label_names=names)


def test_a_soft_label_is_refused():
    scores, labels = make(11)
    labels = labels.astype(float)
    labels[7, 2] = 0.4
    with pytest.raises(ValueError, match=r"Row 7, label 2: the label 0\.4 is not 1, 0"):
        multilabel_report(scores, labels)


@pytest.mark.parametrize("absent", [0, -100])
def test_a_report_on_nothing_is_refused(absent):
    scores, labels = make(12)
    with pytest.raises(ValueError, match="None of the 9 labels has a known positive in 200 rows"):
        multilabel_report(scores, np.full_like(labels, absent))
    assert np.isnan(average_precision(scores, np.full_like(labels, absent))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((200, 8))}, r"shape \(200, 9\) and labels \(200, 8\)"),
        ({"scores": np.zeros((0, 9)), "labels": np.zeros((0, 9))}, "nothing to measure"),
        ({"threshold": [0.5, 0.5]}, "9 finite numbers"),
        ({"threshold": np.nan}, "not finite"),
        ({"top_k": 0}, "top_k=0"),
        ({"groups": {"tail": [9]}}, "'tail' names label 9, but labels are numbered 0 to 8"),
        ({"groups": {"tail": "cat"}}, "list of label indices"),
        ({"label_names": ["cat"]}, "1 label names for 9"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    scores, labels = make(13)
    with pytest.raises(ValueError, match=message):
        multilabel_report(**{"scores": scores, "labels": labels, **change})


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='voc' is none of non_interpolated, voc07, voc10"):
        average_precision(*make(14), "voc")


def test_unknown_is_marked_as_in_the_label_contract():
    assert ranking.UNKNOWN_LABEL == label_contract.UNKNOWN_LABEL
