import json

import numpy as np
import pytest

from benchmarks.accuracy.candidate_recall import candidate_recall, main, most_lost
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor
from training.data.scene_labels import SCENE_LABELS
from training.metrics.functional import average_precision

LABELS = {"id2label": dict(enumerate(SCENE_LABELS)), "label2id": {name: i for i, name in enumerate(SCENE_LABELS)}}


def test_recall_by_hand():
    scores = np.array([[0.9, 0.0, 0.2], [0.0, 0.0, 0.7]])
    labels = np.array([[1, 1, 0], [1, -100, 1]])
    assert candidate_recall(scores, labels) == 0.5  # 0.9 and 0.7 of four; the unknown one does not count


def test_what_candidates_cost_is_bounded_by_the_labels_of_which_a_present_one_was_left_out():
    """Whatever the scores, the number of candidates and which they are."""
    random, lost = np.random.default_rng(0), []
    for _ in range(200):
        labels = (random.random((12, 6)) < 0.3).astype(np.float32)
        labels[0] = 1
        labels[random.random((12, 6)) < 0.1] = -100
        labels[1] = 1
        scores = random.integers(1, 9, labels.shape) / 9  # with ties
        chosen = random.random(labels.shape) < random.random() + (labels == 1) * random.random()
        few = np.where(chosen, scores, 0)
        missed = [any(labels[row, label] == 1 and not chosen[row, label] for row in range(12)) for label in range(6)]
        assert most_lost(few, labels) == pytest.approx(np.mean(missed))
        before, after = (average_precision(each, labels) for each in (scores, few))
        assert (after >= before - 1e-12)[~np.array(missed)].all()
        lost.append((before.mean() - after.mean(), most_lost(few, labels)))
        assert lost[-1][0] <= lost[-1][1] + 1e-12
    assert any(cost > 0 for cost, _ in lost) and any(cost < 0 for cost, _ in lost)


def save(folder, **fields):
    config = HSVLTConfig.preset("nano", **LABELS, **fields)
    HSVLTForImageClassification(config).save_pretrained(folder)
    MultiLabelImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_recall_rises_to_one_with_all_labels(tmp_path, capsys):
    checkpoint = save(tmp_path / "model", candidate_labels=2)
    scenes = json.dumps({"num_scenes": {"validation": 40}})
    argv = [checkpoint, "scenes", "--scenes", scenes, "--candidates", "5", "1", "--json", str(tmp_path / "out")]
    assert main(argv) == 0
    rows = json.loads((tmp_path / "out").read_text())
    assert rows["1"]["recall"] < rows["5"]["recall"] < rows["10"]["recall"] == 1
    assert "| 5 of 10 |" in capsys.readouterr().out
    assert rows["1"]["lost at most"] >= rows["5"]["lost at most"] >= rows["10"]["lost at most"] == 0


def test_a_checkpoint_without_scorer_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([save(tmp_path / "model"), "scenes", "--candidates", "2"])
    assert "no candidate scorer" in capsys.readouterr().err
