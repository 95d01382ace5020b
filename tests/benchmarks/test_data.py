"""The benchmark of large label sets, small: its steps do what they are timed for."""

import json

import numpy as np
import pytest
from scipy.sparse import csc_array
from sklearn.metrics import average_precision_score

import benchmarks.data
from benchmarks.data import main, score_block, synthetic_dataset
from training.data import load_multilabel_dataset
from training.sparse_labels import SparseLabels


def test_figures_are_those_of_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.data, "SCORES_AT_A_TIME", 7)
    file = tmp_path / "figures.json"
    argv = ["--rows", "1500", "--labels", "40", "--threads", "2", "--seed", "3", "--json", str(file), "--quiet"]
    assert main(argv) == 0
    figures = json.loads(file.read_text())
    assert figures["duplicate_groups"] == 15
    assert figures["stratified"]["mean_positives_off"] < figures["random"]["mean_positives_off"]
    assert figures["stratified"]["labels_absent_from_a_split"] == 0
    assert "peak memory" in capsys.readouterr().out and 0 < figures["peak_gib"] < 16

    dataset, names = synthetic_dataset(1500, 40, 4, 3)
    splits, _ = load_multilabel_dataset(dataset, label_names=names)
    labels = SparseLabels.from_dataset(splits["train"], names)
    dense = np.stack([labels.dense(row) for row in range(1500)])
    assert figures["positives"] == dense.sum()
    expected = [
        average_precision_score(dense[:, label], score_block(csc_array(dense), start, stop, 3)[:, label - start])
        for start in range(0, 40, 7)
        for stop in [min(start + 7, 40)]
        for label in range(start, stop)
        if dense[:, label].any()
    ]
    assert figures["mAP"] == pytest.approx(np.mean(expected), abs=1e-9)
