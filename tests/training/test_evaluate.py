"""The command that prints scores and writes them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, precision_score
from transformers import AutoImageProcessor

from training.evaluate import main
from training.scoring import predict
from training.scoring.measured_with import weights_of
from training.scoring.thresholds import store_thresholds

from ..tolerance import METRIC, assert_close_metrics
from .scoring.test_predict import launch
from .tiny_checkpoint import IMAGE_LABELS, NAMES, save_checkpoint, save_images, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    save_images(tmp_path / "photos")
    return tmp_path / "photos"


def read_csv(path):
    with path.open(newline="") as file:
        return {row.pop("label"): row for row in csv.DictReader(file)}


def test_the_command_writes_what_scikit_learn_finds(checkpoint, images, tmp_path, capsys):
    # The same labels in another order: they are matched by name.
    (images / "labels.txt").write_text("\n".join(["tv monitor", "dog", "cat"]))
    assert main([str(checkpoint), str(images), "--output", str(tmp_path / "results"), "--batch_size", "3"]) == 0

    model, processor = tiny_model(), AutoImageProcessor.from_pretrained(checkpoint)
    images = [Image.open(images / "validation" / f"{number}.png") for number in range(len(IMAGE_LABELS))]
    with torch.no_grad():
        scores = model(**processor(images, return_tensors="pt")).logits.sigmoid().numpy()
    labels = np.array([[name in row for name in NAMES] for row in IMAGE_LABELS])
    ap = average_precision_score(labels, scores, average=None)

    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["metrics"]["mAP"] == pytest.approx(ap.mean(), abs=1e-6)
    assert (results["split"], results["threshold"], results["metrics"]["num_samples"]) == ("validation", 0.5, 7)
    table = read_csv(tmp_path / "results" / "per_label.csv")
    assert list(table) == NAMES
    assert [float(row["AP"]) for row in table.values()] == pytest.approx(ap, abs=1e-6)
    precision = precision_score(labels, scores >= 0.5, average=None, zero_division=0)
    assert [float(row["precision"]) for row in table.values()] == pytest.approx(precision)
    assert [int(row["positives"]) for row in table.values()] == labels.sum(0).tolist()

    printed = capsys.readouterr().out
    assert f"mAP {ap.mean():.4f} (non-interpolated" in printed and "7 images, 3 labels" in printed
    for word in ("CP", "CR", "CF1", "OP", "OR", "OF1", "score >= 0.5", "top 3"):
        assert word in printed


def test_thresholds_of_the_checkpoint(checkpoint, images, tmp_path, capsys):
    assert main([str(checkpoint), str(images), "--threshold", "auto"]) == 2
    assert "holds no thresholds; fit them with hsvlt thresholds" in capsys.readouterr().err
    own = tmp_path / "own"
    save_checkpoint(own)
    store_thresholds(own, [0.25, 0.5, 0.75], {})
    assert main([str(own), str(images), "--threshold", "auto", "--output", str(tmp_path / "results")]) == 0
    thresholds = [row["threshold"] for row in read_csv(tmp_path / "results" / "per_label.csv").values()]
    assert thresholds == ["0.25", "0.5", "0.75"]
    assert "fitted thresholds" in capsys.readouterr().out


def test_results_are_of_the_weights_that_were_scored(checkpoint, images, tmp_path, monkeypatch):
    """A run that trains replaces best/ while it is evaluated."""
    best, scored = shutil.copytree(checkpoint, tmp_path / "best"), predict.score_split
    weights = weights_of(best, {})

    def score_split(*args, **kwargs):
        found = scored(*args, **kwargs)
        model = tiny_model()
        torch.nn.init.zeros_(model.classifier.bias)
        model.save_pretrained(best)
        return found

    monkeypatch.setattr(predict, "score_split", score_split)
    assert main([str(best), str(images), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["weights"] == weights != weights_of(best, {})


def test_a_label_without_positives_is_named_and_empty_in_the_table(checkpoint, tmp_path, capsys):
    labels = [[name for name in row if name != "dog"] for row in IMAGE_LABELS]
    save_images(tmp_path / "photos", labels)
    assert main([str(checkpoint), str(tmp_path / "photos"), "--output", str(tmp_path / "results")]) == 0
    assert "having no positive here: 1 label (dog)" in capsys.readouterr().out
    row = read_csv(tmp_path / "results" / "per_label.csv")["dog"]
    assert (row["AP"], row["recall"], row["positives"]) == ("", "", "0")
    assert "NaN" not in (tmp_path / "results" / "results.json").read_text()


def test_results_are_not_overwritten_unless_asked(checkpoint, images, tmp_path, capsys):
    (tmp_path / "per_label.csv").write_text("mine")
    command = [str(checkpoint), str(images), "--output", str(tmp_path)]
    assert main(command) == 2
    assert "per_label.csv exists; choose another --output, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "per_label.csv").read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "per_label.csv").read_text() != "mine"


def test_other_labels_are_refused_by_name(checkpoint, tmp_path, capsys):
    save_images(tmp_path / "photos", [["cat"], ["horse"]], ["dog", "cat", "horse"])
    assert main([str(checkpoint), str(tmp_path / "photos")]) == 2
    error = capsys.readouterr().err
    assert f"only {checkpoint} has 'tv monitor'; only {tmp_path / 'photos'} has 'horse'" in error
    assert "Traceback" not in error


def test_a_dataset_without_a_vocabulary_can_borrow_the_checkpoints(checkpoint, tmp_path, capsys):
    save_images(tmp_path / "photos", [["cat"], ["dog", "cat"]], names=None)
    assert main([str(checkpoint), str(tmp_path / "photos")]) == 2
    assert "pass --use_checkpoint_labels" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "photos"), "--use_checkpoint_labels"]) == 0


@pytest.mark.parametrize(
    ("checkpoint_name", "options", "message"),
    [
        (None, ["--split", "test"], "has no split 'test'"),
        ("./nowhere", [], "./nowhere is no folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(checkpoint, images, capsys, checkpoint_name, options, message):
    assert main([checkpoint_name or str(checkpoint), str(images), *options]) == 2
    assert message in capsys.readouterr().err


def test_unknown_options_are_refused(checkpoint, images, capsys):
    for option in (["--threshhold", "0.5"], ["--thresh", "0.5"], ["--threshold", "high"], ["--label_format", "words"]):
        with pytest.raises(SystemExit):
            main([str(checkpoint), str(images), *option])
        assert option[0] in capsys.readouterr().err


def evaluate_to(checkpoint, images, folder):
    assert main([str(checkpoint), str(images), "--batch_size", "2", "--output", str(folder)]) == 0


@pytest.mark.slow
def test_the_command_gives_the_same_on_several_processes(checkpoint, images, tmp_path):
    launch(evaluate_to, [checkpoint, images], tmp_path)
    results = [json.loads((tmp_path / n / "results.json").read_text())["metrics"] for n in "123"]
    tables = [read_csv(tmp_path / n / "per_label.csv") for n in "123"]
    for several in (1, 2):  # a score depends in its last digits on the batch that it is in
        assert_close_metrics(results[several], results[0])
        assert tables[several].keys() == tables[0].keys()
        for label, row in tables[0].items():
            assert {key: float(value) for key, value in tables[several][label].items()} == pytest.approx(
                {key: float(value) for key, value in row.items()}, abs=METRIC
            )
