"""A user's own tables, read as they are by every command: one column a label, or text; rows left out by a list."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import training.calibrate
import training.evaluate
import training.fit_thresholds
import training.train

from .tiny_run import write_recipe

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def shelves(tmp_path_factory):
    """Images in one folder, and beside it tables whose columns bear names of their own."""
    root = tmp_path_factory.mktemp("own")
    (root / "photos").mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 12)):
        tables = {"columns": [["photo", *NAMES, "weight"]], "text": [["photo", "what"]]}
        for number in range(count):
            shows = generator.integers(0, 2, 3)
            shows[number % 3] = 1
            pixels = np.broadcast_to(200 * shows, (24, 24, 3)) + generator.integers(0, 50, (24, 24, 3))
            name = f"{split}{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / name)
            tables["columns"].append([name, *map(str, shows), "7.5"])
            tables["text"].append([name, " / ".join(np.array(NAMES)[shows == 1])])
        for layout, rows in tables.items():
            (root / layout).mkdir(exist_ok=True)
            with (root / layout / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return root


COLUMNS = ["--image_column", "photo", "--label_columns"]
TEXT = ["--image_column", "photo", "--label_column", "what", "--label_separator", "/"]


def test_a_table_of_ones_own_is_trained_on_scored_and_fitted_to(shelves, tmp_path, capsys):
    recipe, folder = write_recipe(tmp_path), shelves / "photos"
    # The images of validation stand in the same folder, and each table names its own split's only.
    shared = ["--image_folder", str(folder)]
    results = {}
    for layout, for_training, for_scoring in (
        ("columns", [*COLUMNS, json.dumps(NAMES)], [*COLUMNS, *NAMES]),
        ("text", [*TEXT, "--label_names", json.dumps(NAMES)], [*TEXT, "--label_names", *NAMES]),
    ):
        run = tmp_path / layout
        argv = [recipe, "--output_dir", str(run), "--dataset", str(shelves / layout), "--epochs", "1"]
        argv += ["--augmentation", "null", "--report", str(layout == "columns").lower()]
        assert training.train.main([*argv, *shared, *for_training]) == 0, capsys.readouterr()
        scoring = [str(run / "best"), str(shelves / layout), *shared, *for_scoring]
        assert training.evaluate.main([*scoring, "--output", str(run / "scored"), "--count_split", "train"]) == 0
        results[layout] = json.loads((run / "scored" / "results.json").read_text())["metrics"]
        # As at the end of training: the same images and labels.
        assert results[layout]["mAP"] == json.loads((run / "results.json").read_text())["validation"]["mAP"]
    at_the_end = json.loads((tmp_path / "columns" / "report" / "results.json").read_text())
    assert at_the_end["metrics"]["mAP"] == results["columns"]["mAP"] and at_the_end["threshold"] == "auto"
    assert "0.5 for every label" in at_the_end["thresholds_compared"]
    assert (tmp_path / "columns" / "report" / "report.html").exists() and not (tmp_path / "text" / "report").exists()
    assert results["columns"] == results["text"] and results["text"]["num_samples"] == 12

    excluded = tmp_path / "exclude.txt"
    excluded.write_text("validation\t3\tphotos/val3.png\tcopy\ntrain\t0\tphotos/train0.png\tcopy\n")
    for command in (training.evaluate, training.fit_thresholds, training.calibrate):
        options = ["--shared"] if command is training.calibrate else []
        assert command.main([*scoring, "--exclude", str(excluded), *options]) == 0, capsys.readouterr()
    config = json.loads((run / "best" / "config.json").read_text())
    assert config["threshold_info"]["num_samples"] == config["calibration_info"]["num_samples"] == 11
    excluded.write_text("validation\t3\tphotos/val4.png\tcopy\n")
    capsys.readouterr()
    assert training.evaluate.main([*scoring, "--exclude", str(excluded)]) == 2
    assert "exclude.txt, line 1: row 3 of validation is not 'photos/val4.png'" in capsys.readouterr().err
