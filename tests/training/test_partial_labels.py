"""Unknown labels through the training command: they move no weight, and no metric or threshold counts them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from training.train import main

from .tiny_run import write_recipe

NAMES = ["round", "square", "never"]


def write_photos(root, unknown_cell, hidden):
    """24 images of a split; where `hidden` (of `never` always) the cell is `unknown_cell`."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        (root / split).mkdir(parents=True)
        lines = [",".join(["file_name", *NAMES])]
        for number in range(24):
            shows = generator.integers(0, 2, 2)
            pixels = generator.integers(0, 80, (32, 32, 3)) + np.array([120 * shows[0], 0, 120 * shows[1]])
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"{number}.png")
            cells = [unknown_cell if hidden and (number + label) % 3 == 0 else str(shows[label]) for label in range(2)]
            lines.append(",".join([f"{number}.png", *cells, unknown_cell if hidden else "0"]))
        (root / split / "metadata.csv").write_text("\n".join(lines))
    return root


def train(folder, recipe, *options):
    arguments = ["--output_dir", str(folder / "run"), "--augmentation", "null", "--epochs", "1", *map(str, options)]
    assert main([recipe, *arguments]) == 0
    return json.loads((folder / "run" / "results.json").read_text()), load_file(folder / "run/best/model.safetensors")


@pytest.mark.one_machine
def test_unknown_labels_of_a_table_reach_no_weight_metric_or_threshold(tmp_path):
    runs = []
    for spelling, cell in (("empty", ""), ("number", "-100"), ("nan", "NaN")):
        photos = write_photos(tmp_path / spelling / "photos", cell, hidden=True)
        recipe = write_recipe(tmp_path)
        runs.append(train(tmp_path / spelling, recipe, "--dataset", photos))
    (results, weights), *others = runs
    for other_results, other_weights in others:
        assert other_results["validation"] == results["validation"]
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert results["validation"]["num_labels_without_positive"] == 1 and 0 <= results["validation"]["mAP"] <= 1
    assert not any(isinstance(value, float) and np.isnan(value) for value in results["validation"].values())


@pytest.mark.parametrize(
    ("hide", "loss"), [("{known_fraction: 0.5}", "partial_bce"), ("{single_positive: true}", "weak_assume_negative")]
)
@pytest.mark.one_machine
def test_labels_can_be_hidden_for_an_experiment(tmp_path, hide, loss):
    recipe = write_recipe(tmp_path)
    options = ["--dataset", "scenes", "--fresh_scenes", "false", "--loss_type", loss]
    results, weights = train(tmp_path / "hidden", recipe, *options, "--partial_labels", hide)
    assert 0 < results["validation"]["mAP"] <= 1
    _, seed = train(tmp_path / "same", recipe, *options, "--partial_labels", hide)
    assert all(torch.equal(weights[name], seed[name]) for name in weights)
    _, other = train(tmp_path / "other", recipe, *options, "--partial_labels", hide.replace("}", ", seed: 1}"))
    assert not all(torch.equal(weights[name], other[name]) for name in weights)
