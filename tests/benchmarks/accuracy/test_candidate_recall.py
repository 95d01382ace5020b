import json

import numpy as np
import pytest

from benchmarks.accuracy.candidate_recall import candidate_recall, main
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor
from training.data.scene_labels import SCENE_LABELS

LABELS = {"id2label": dict(enumerate(SCENE_LABELS)), "label2id": {name: i for i, name in enumerate(SCENE_LABELS)}}


def test_recall_by_hand():
    scores = np.array([[0.9, 0.0, 0.2], [0.0, 0.0, 0.7]])
    labels = np.array([[1, 1, 0], [1, -100, 1]])
    assert candidate_recall(scores, labels) == 0.5  # 0.9 and 0.7 of four; the unknown one does not count


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


def test_a_checkpoint_without_scorer_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([save(tmp_path / "model"), "scenes", "--candidates", "2"])
    assert "no candidate scorer" in capsys.readouterr().err
