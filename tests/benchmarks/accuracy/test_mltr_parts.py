import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from benchmarks.accuracy import mltr_parts as ablation
from benchmarks.accuracy.mltr_parts import VARIANTS, label_groups, main, options
from training.config import parse_config


def box(label, height):
    return {"x": 0, "y": 0, "w": 5, "h": height, "label": label}


def test_labels_are_parted_by_size_and_by_partner():
    # zero and one are partners, two and three, ...
    boxes = [[box(0, 10), box(0, 30), box(1, 12)], [box(2, 20)], [box(5, 11), box(9, 28)]]
    groups = {
        name: list(zip(*map(np.ndarray.tolist, mask.nonzero()), strict=True))
        for name, mask in label_groups(boxes).items()
    }
    assert groups == {
        "small": [(0, 1), (2, 5)],
        "medium": [(1, 2)],
        "large": [(0, 0), (2, 9)],  # by the largest object
        "alone": [(1, 2), (2, 5), (2, 9)],
        "with partner": [(0, 0), (0, 1)],
        "false alarms": [(1, 3), (2, 4), (2, 8)],
    }


def test_variants_differ_in_what_they_are_named_for():
    args = Namespace(output=Path("runs"), epochs=None, num_scenes=None)
    runs = {variant: options(variant, 1, args) for variant in VARIANTS}
    recipe = parse_config([str(ablation.RECIPE)])
    assert {variant: run.model for variant, run in runs.items()} == {
        "pixel and cross-window attention": {},
        "without position bias": {"use_relative_position_bias": False},
        "with absolute position embedding": {"use_absolute_embeddings": True},
        "pixel attention alone": {"block_pattern": ["pixel", "mlp"]},
        "cross-window attention alone": {"block_pattern": ["cross", "mlp"]},
        "no attention": {"block_pattern": ["mlp"]},
        "HSVLT nano": {},
    }
    for run in runs.values():  # the same budget, seed and scenes
        assert (run.epochs, run.learning_rate, run.batch_size, run.seed) == (
            recipe.epochs,
            recipe.learning_rate,
            recipe.batch_size,
            1,
        )
        assert run.scenes == {**recipe.scenes, "min_size": 12, "cooccurrence": 0.5}
    assert len({run.output_dir for run in runs.values()}) == len(runs)


@pytest.mark.slow
def test_command_trains_scores_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "native_precision", lambda: "bf16")
    monkeypatch.setitem(VARIANTS, "no attention", {"model": {"block_pattern": ["mlp"], "embed_dim": 8}})
    arguments = [
        "--seeds",
        "2",
        "--epochs",
        "1",
        "--num_scenes",
        "32",
        "--test_scenes",
        "60",
        "--output",
        str(tmp_path),
    ]
    arguments += ["--variants", "no attention", "--json", str(tmp_path / "table.json")]
    assert main(arguments) == 0
    row = json.loads((tmp_path / "table.json").read_text())["no attention"]
    assert all(0 <= row[name]["mean"] <= 1 and row[name]["std"] >= 0 for name in ablation.COLUMNS)
    assert row["parameters"] > 0 and row["macs"] > 0 and row["seconds"] > 0
    assert "1 epochs of 32 scenes, 2 seeds" in capsys.readouterr().out

    trained = []
    monkeypatch.setattr(ablation.train, "main", lambda argv: trained.append(argv) or 0)
    assert main(arguments) == 0 and trained == []  # what is done is not done again
    again = json.loads((tmp_path / "table.json").read_text())["no attention"]
    assert {**again, "seconds": 0} == {**row, "seconds": 0}

    # One seed more, in a process of its own: what is there is scored, what is not is trained, in another precision.
    monkeypatch.undo()
    monkeypatch.setattr(ablation, "native_precision", lambda: "bf16")
    monkeypatch.setitem(VARIANTS, "no attention", {"model": {"block_pattern": ["mlp"], "embed_dim": 8}})
    AcceleratorState._reset_state(True)
    arguments[1] = "3"
    assert main(arguments) == 0

    monkeypatch.setattr(ablation.train, "main", lambda argv: 1)
    assert main([*arguments, "--num_scenes", "64"]) == 1
    assert "broke off" in capsys.readouterr().err
