"""The benchmark of large label sets, small: its steps do what they are timed for."""

import json

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score
from tqdm.auto import tqdm

from benchmarks.cost.million_rows import SyntheticScores, main, synthetic_dataset
from training.data.load import load
from training.metrics import ranking


def test_figures_are_those_of_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", 7 * 1500)
    file = tmp_path / "figures.json"
    argv = ["--rows", "1500", "--labels", "40", "--threads", "2", "--seed", "3", "--json", str(file), "--quiet"]
    argv += ["--shards", "3", "--shard_images", "12", "--image_size", "32", "--rounds", "1"]
    assert main(argv) == 0
    figures = json.loads(file.read_text())
    assert figures["duplicate_groups"] == 15
    assert figures["stratified"]["mean_positives_off"] < figures["random"]["mean_positives_off"]
    assert figures["stratified"]["labels_absent_from_a_split"] == 0
    speeds = figures["images_per_second"]
    assert list(speeds) == ["map-style", "stream, parquet", "stream, webdataset"] and min(map(min, speeds.values())) > 0
    assert "peak memory" in capsys.readouterr().out and 0 < figures["peak_gib"] < 16

    dataset, names = synthetic_dataset(1500, 40, 4, 3)
    splits = load(dataset, label_names=names).splits
    labels = splits["train"].labels
    dense = np.stack([labels.dense(row) for row in range(1500)])
    assert figures["positives"] == dense.sum()
    matrix = csr_array(dense.astype(np.int8))
    scores = SyntheticScores(matrix, 3, tqdm(disable=True))
    whole = scores[:, :]
    assert np.array_equal(scores[100:130, :], whole[100:130]) and np.array_equal(scores[:, 7:9], whole[:, 7:9])
    assert whole.min() >= 0 and whole.max() < 1 and abs(whole[dense == 0].mean() - 1 / 3) < 0.01
    assert whole[dense == 1].mean() == pytest.approx(2 / 3, abs=0.02)
    found = figures["report"]
    assert found["mAP"] == pytest.approx(average_precision_score(dense, whole), abs=1e-9)
    assert found["mAP_micro"] == pytest.approx(average_precision_score(dense, whole, average="micro"), abs=1e-9)
    assert found["LRAP"] == pytest.approx(label_ranking_average_precision_score(dense, whole), abs=1e-9)
