"""Every label format gives the same rows; everything outside the label contract is refused by row, label and value."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from training.data.label_cells import split_text, stack_columns
from training.data.sparse_labels import SparseLabels

NAMES = ["cat", "dog", "bird", "tv monitor"]
EXPECTED = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=np.float32)
IDS = [[3, 0], [], [1, 2]]


def dense(column, **reading):
    labels = SparseLabels.from_arrow(column, NAMES, **reading)
    return np.stack([labels.dense(row) for row in range(len(labels))])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["tv monitor", "cat"], [], ["dog", "bird"]]),
        pa.array([["tv monitor", "cat", "cat"], [], ["dog", "bird"]], pa.large_list(pa.large_string())),
        pa.array(IDS),
        pa.array(IDS, pa.list_(pa.uint8())),
        pa.array(EXPECTED.astype(int).tolist()),
        pa.array(EXPECTED.astype(int).tolist(), pa.list_(pa.int8(), 4)),
        pa.array(EXPECTED.tolist()),
        pa.array(EXPECTED.tolist(), pa.list_(pa.float16())),
        pa.array(EXPECTED.astype(bool).tolist()),
        pa.chunked_array([pa.array(IDS[:1]), pa.array(IDS[1:])]),
        pa.array([[2], *IDS, [2]])[1:4],
    ],
    ids=lambda column: str(column.type),
)
def test_every_format_gives_the_same_rows(column):
    assert np.array_equal(dense(column), EXPECTED)


def test_ids_of_another_class_order_are_translated():
    assert np.array_equal(dense(pa.array(IDS), class_names=NAMES), EXPECTED)
    theirs = ["tv monitor", "bird", "cat", "dog"]
    assert np.array_equal(dense(pa.array([[0, 2], [], [3, 1]]), class_names=theirs), EXPECTED)
    with pytest.raises(ValueError, match=r"row 1: label 'horse' is not among the 4"):
        dense(pa.array([[0], [1]]), class_names=["cat", "horse"])


def test_unknown_and_soft_labels():
    column = pa.array([[0.25, None, float("nan"), -100.0], [1, 0, 0, 0], None], pa.list_(pa.float32()))
    assert np.array_equal(dense(column), [[0.25, -100, -100, -100], [1, 0, 0, 0], [-100] * 4])
    assert np.array_equal(dense(pa.array([[1, -100, None, 0]])), [[1, -100, -100, 0]])
    assert np.array_equal(dense(pa.array([["dog"], None])), [[0, 1, 0, 0], [-100] * 4])
    assert np.array_equal(dense(pa.array([None, None])), np.full((2, 4), -100))
    assert np.array_equal(dense(pa.array([[], []])), np.zeros((2, 4)))


def test_positives_count_images_that_show_a_label():
    column = pa.array([[1, 0.5, 0.4, -100], [1, 0, 0, None], None], pa.list_(pa.float64()))
    assert SparseLabels.from_arrow(column, NAMES).positives().tolist() == [2, 1, 0, 0]


def test_rows_stay_sparse_with_ten_thousand_labels():
    rng = np.random.default_rng(0)
    names = [f"label {number}" for number in range(10_000)]
    ids = [sorted(rng.choice(10_000, size=5, replace=False).tolist()) for _ in range(20_000)]
    labels = SparseLabels.from_arrow(pa.array(ids), names)
    assert labels.starts.nbytes + labels.ids.nbytes + labels.values.nbytes + labels.default.nbytes < 2e6
    assert np.flatnonzero(labels.dense(1234)).tolist() == ids[1234]
    assert labels.positives().sum() == 100_000


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([["cat"], ["dgo", "cow"]], r"row 1: label 'dgo' .*did you mean 'dog'.*\(1 more like it\)"),
        ([["cat"], [], ["dog", "aeroplane"]], r"row 2: label 'aeroplane' is not among the 4 label names; take it out"),
        ([["cat"], ["dog", None]], r"row 1: it lists null"),
        ([[0], [1, 4]], r"row 1: label id 4 is out of range; use 0 to 3"),
        ([[0], [], [-1, 3]], r"row 2: label id -1 is out of range"),
        ([[0, 1], [1, None]], r"row 1: it lists null"),
        ([[0.0, 1, 0, 0], [0, 1.5, 0, 0]], r"row 1: label 'dog' is 1.5, which is neither in \[0, 1\] nor -100"),
        ([[0, 1, 0, 0], [0, 0, 0, 7]], r"row 1: label 'tv monitor' is 7"),
        ([[0, 1, 0, 0], [0, 0, -1, 0]], r"row 1: label 'bird' is -1"),
        ([None, [0.0, 1, 0, 0], [0, 0, -0.5, 0]], r"row 2: label 'bird' is -0.5"),
        ([[0, 1, 0, 0], [0, 0, 1], [0, 0, 0, 0]], r"row 1: its list has 3 numbers for 4 labels"),
        ([[0.0, 1.0]], r"row 0: its list has 2 numbers for 4 labels; .*integer ids"),
        ([[0, 1, 0], [0, 0, 1]], r"row 0: lists of 3 zeros and ones look like multi-hot, but there are 4 labels"),
        (["cat", "dog"], r"type string, but must be a list"),
        ([{"cat": 1}], r"type struct.* but must be a list"),
        ([[{"cat": 1}]], r"lists of struct"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_row_and_label(column, message):
    with pytest.raises(ValueError, match=message) as refusal:
        dense(pa.array(column))
    assert "\n" not in str(refusal.value)


def test_texts_become_lists():
    texts = pa.chunked_array([["cat , dog", "", None], [" ", "tv monitor"]])
    assert split_text(texts).to_pylist() == [["cat", "dog"], [], None, [], ["tv monitor"]]
    assert split_text(pa.chunked_array([["3 0", "1"]]), " ", "ids").to_pylist() == [[3, 0], [1]]
    numbers = split_text(pa.chunked_array([["1;0.5;nan;-100"]]), ";", "multi_hot")
    assert np.array_equal(dense(numbers), [[1, 0.5, -100, -100]])
    with pytest.raises(ValueError, match=r"row 1: 'cat,,dog' lists an empty label"):
        split_text(pa.chunked_array([["cat", "cat,,dog"]]))
    with pytest.raises(ValueError, match=r"row 0: 'cat' must list numbers \(label_format='ids'\)"):
        split_text(pa.chunked_array([["cat"]]), label_format="ids")


def test_columns_become_multi_hot_lists():
    columns = {
        "cat": [1, 0, None, -100],
        "dog": [0.5, float("nan"), None, 1.0],
        "bird": [True, False, None, True],
        "tv monitor": ["1", "", "null", "0.0"],
    }
    stacked = stack_columns(Dataset.from_dict(columns), NAMES)
    assert np.array_equal(dense(stacked), [[1, 0.5, 1, 1], [0, -100, 0, -100], [-100] * 4, [-100, 1, 1, 0]])
    swapped = stack_columns(Dataset.from_dict(columns), NAMES[::-1])
    assert np.array_equal(dense(swapped), dense(stacked)[:, ::-1])
    rows = Dataset.from_dict({"cat": ["1", "present"], "dog": [["1"], ["0"]]})
    with pytest.raises(ValueError, match=r"row 1: column 'cat' holds 'present', but must hold 1 for present"):
        stack_columns(rows, ["cat"])
    with pytest.raises(ValueError, match=r"column 'dog' is of type list<.*>, but must hold numbers"):
        stack_columns(rows, ["dog"])


def partly_labelled():
    rng = np.random.default_rng(0)
    hot = (rng.random((2000, 4)) < [0.9, 0.5, 0.2, 0.05]).astype(np.float32)
    hot[rng.random(hot.shape) < 0.1] = -100
    hot[7] = 0
    return hot, SparseLabels.from_arrow(pa.array(hot.tolist()), NAMES)


def rows_of(labels):
    return np.stack([labels.dense(row) for row in range(len(labels))])


def test_a_known_fraction_keeps_that_many_labels_unchanged():
    hot, labels = partly_labelled()
    hidden = rows_of(labels.partially_known(known_fraction=0.3, seed=1))
    known = hidden != -100
    assert np.array_equal(hidden[known], hot[known])
    # Present or absent, each label alike.
    for kept in (known[hot == 1], known[hot == 0], *known.T):
        assert abs(kept.mean() - 0.3) < 0.05
    assert np.array_equal(hidden, rows_of(labels.partially_known(known_fraction=0.3, seed=1)))
    assert not np.array_equal(hidden, rows_of(labels.partially_known(known_fraction=0.3, seed=2)))
    assert np.array_equal(rows_of(labels.partially_known(known_fraction=1)), hot)


def test_a_single_positive_is_one_of_the_present_labels():
    hot, labels = partly_labelled()
    hidden = rows_of(labels.partially_known(single_positive=True, seed=1))
    assert np.isin(hidden, (1, -100)).all() and (hot[hidden == 1] == 1).all()
    assert np.array_equal((hidden == 1).sum(1), (hot == 1).any(1)) and (hidden[7] == -100).all()
    # Each present label alike: of the images with "cat" and "dog" alone, half keep "dog".
    both = (hot[:, :2] == 1).all(1) & (hot[:, 2:] != 1).all(1)
    assert abs((hidden[both, 1] == 1).mean() - 0.5) < 0.06
    assert np.array_equal(hidden, rows_of(labels.partially_known(single_positive=True, seed=1)))
    assert not np.array_equal(hidden, rows_of(labels.partially_known(single_positive=True, seed=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of known_fraction and single_positive"),
        ({"known_fraction": 0.5, "single_positive": True}, "Give one of"),
        ({"known_fraction": 0}, "known_fraction=0 must be above 0"),
        ({"known_fraction": 10}, "known_fraction=10 must be above 0 and at most 1"),
    ],
)
def test_what_stays_known_must_be_said(options, message):
    with pytest.raises(ValueError, match=message):
        partly_labelled()[1].partially_known(**options)


def test_the_caller_names_the_row():
    with pytest.raises(ValueError, match=r"^labels.csv, line 9: label 'cow'"):
        dense(pa.array([["cat"], ["cow"]]), where=lambda row: f"labels.csv, line {row + 8}")


def test_integers_that_could_be_either_must_be_declared():
    column = pa.array([[0, 1], [1, 0]])

    def read(label_format):
        labels = SparseLabels.from_arrow(column, NAMES[:2], label_format=label_format)
        return [labels.dense(0).tolist(), labels.dense(1).tolist()]

    with pytest.raises(ValueError, match="set label_format"):
        read("auto")
    assert read("multi_hot") == [[0, 1], [1, 0]]
    assert read("ids") == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="label_format='names' does not fit"):
        read("names")
    with pytest.raises(ValueError, match="label_format='onehot' is none of"):
        read("onehot")
