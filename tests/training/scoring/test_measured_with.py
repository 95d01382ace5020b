"""What was measured is held against the checkpoint as it is: its weights, names, thresholds and calibration."""

import torch
from safetensors.torch import save_file

from training.scoring.measured_with import fingerprints, still_true, weights_of

CONFIG = {"id2label": {"0": "cat", "1": "dog"}, "thresholds": [0.5, 0.4]}
RESULTS = {
    "weights": "a",
    "measured_with": fingerprints(CONFIG),
    "threshold": "auto",
    "metrics": {"mAP": 0.5, "LRAP": 0.6, "CF1": 0.7, "num_samples": 9},
    "validation_at_thresholds": {"CF1": 0.7},
}


def test_all_holds_for_the_same_checkpoint():
    assert still_true(RESULTS, CONFIG, "a") == still_true(RESULTS, CONFIG) == (RESULTS, [])
    older = {name: value for name, value in RESULTS.items() if name != "weights"}
    assert still_true(older, CONFIG, "a") == (older, []), "written before weights were noted"


def test_nothing_holds_for_other_weights_or_names():
    assert still_true(RESULTS, CONFIG, "b") == ({}, ["weights"])
    assert still_true(RESULTS, CONFIG | {"id2label": {"0": "dog", "1": "cat"}}, "a") == ({}, ["label_names"])


def test_other_thresholds_leave_the_ranking():
    kept, changed = still_true(RESULTS, CONFIG | {"thresholds": [0.1, 0.1]}, "a")
    assert changed == ["thresholds"] and kept["metrics"] == {"mAP": 0.5, "LRAP": 0.6, "num_samples": 9}
    assert "validation_at_thresholds" not in kept


def test_calibration_leaves_the_order_within_a_label():
    kept, changed = still_true(RESULTS, CONFIG | {"calibration_info": {"scale": [2.0], "bias": [0.0]}}, "a")
    assert changed == ["calibration"] and kept["metrics"] == {"mAP": 0.5, "num_samples": 9}


def test_weights_are_told_by_their_files_and_kept_through_calibration(tmp_path):
    assert weights_of("org/name", CONFIG) is None
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    before = weights_of(tmp_path, CONFIG)
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert before is not None and weights_of(tmp_path, CONFIG) not in (None, before)
    assert weights_of(tmp_path, CONFIG | {"calibration_info": {"weights": before}}) == before
