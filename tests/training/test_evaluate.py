"""Scores by row whatever the processes, and the command that prints and writes them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import average_precision_score, precision_score
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from training.evaluate import main, match_labels, predict
from training.metrics.functional import multilabel_report
from training.thresholds import store_thresholds

from ..tolerance import METRIC, assert_close_metrics, assert_close_outputs
from .tiny_checkpoint import NAMES, PICTURE_LABELS, save_checkpoint, save_pictures, tiny_model

ROOT = Path(__file__).parents[2]


class Pictures(torch.utils.data.Dataset):
    """Rows as `MultiLabelDataset` and the collator with a processor give them."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator)
        self.labels = torch.randint(-1, 2, (count, 3), generator=generator).float()
        self.labels[self.labels < 0] = -100

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "index": index}


def test_scores_are_the_sigmoid_of_the_logits_row_by_row():
    model, data = tiny_model().train(), Pictures(11)
    scores, labels = predict(model, DataLoader(data, batch_size=4), progress=False)
    assert scores.dtype == labels.dtype == np.float32 and model.training
    model.eval()
    with torch.no_grad():
        expected = torch.stack([model(pixel_values=pixels[None]).logits[0].sigmoid() for pixels in data.pixels])
    assert_close_outputs(scores, expected)
    assert expected.std(0).min() > 1e-3  # else any order would pass
    np.testing.assert_array_equal(labels, data.labels)


def test_a_shuffling_loader_gives_the_same_rows():
    model, data = tiny_model(), Pictures(11)
    expected = predict(model, DataLoader(data, batch_size=4), progress=False)
    shuffled = predict(model, DataLoader(data, batch_size=4, shuffle=True), progress=False)
    assert_close_outputs(shuffled[0], expected[0])
    np.testing.assert_array_equal(shuffled[1], expected[1])


def test_the_sigmoid_of_a_bf16_model_is_fp32():
    scores, _ = predict(tiny_model().to(torch.bfloat16), DataLoader(Pictures(5), batch_size=4), progress=False)
    assert (torch.from_numpy(scores).to(torch.bfloat16).float().numpy() != scores).any()


def test_labels_that_a_model_left_out_score_zero():
    scores, _ = predict(tiny_model(candidate_labels=2), DataLoader(Pictures(5), batch_size=4), progress=False)
    assert ((scores == 0).sum(1) == 1).all()


def test_loaders_that_would_give_wrong_scores_are_refused():
    data = Pictures(5)
    with pytest.raises(RuntimeError, match="gave 4 of 5 rows"):
        predict(tiny_model(), DataLoader(data, batch_size=2, drop_last=True), progress=False)
    data.pixels = data.pixels.to(torch.uint8)
    with pytest.raises(ValueError, match="pixels are uint8"):
        predict(tiny_model(), DataLoader(data, batch_size=2), progress=False)


def launch(function, arguments, folder):
    """`function(*arguments, folder / "<n>")` on n = 1, 2 and 3 processes, each on one thread.

    From a fresh process: a fork of this one, whose thread pools have run, can hang.
    """
    code = (
        "import sys\n"
        "from accelerate import debug_launcher\n"
        f"from {__name__} import {function.__name__} as function\n"
        "arguments = sys.argv[1:]\n"
        "for n in (2, 3):\n"
        "    debug_launcher(function, (*arguments[:-1], f'{arguments[-1]}/{n}'), num_processes=n)\n"
        "function(*arguments[:-1], f'{arguments[-1]}/1')\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


COUNTS = (1, 2, 11, 13, 24)


def predict_and_save(folder):
    accelerator, folder = Accelerator(cpu=True), Path(folder)
    assert accelerator.num_processes == int(folder.name)
    folder.mkdir(exist_ok=True)
    for count in COUNTS:
        loader = DataLoader(Pictures(count), batch_size=4)
        scores, labels = predict(tiny_model(), loader, accelerator, progress=False)
        np.savez(folder / f"{count}-{accelerator.process_index}.npz", scores=scores, labels=labels)


@pytest.mark.slow
def test_several_processes_equal_one(tmp_path):
    launch(predict_and_save, [], tmp_path)
    for count in COUNTS:
        expected = np.load(tmp_path / "1" / f"{count}-0.npz")
        np.testing.assert_array_equal(expected["labels"], Pictures(count).labels)
        for num_processes in (2, 3):
            for process in range(num_processes):
                found = np.load(tmp_path / str(num_processes) / f"{count}-{process}.npz")
                assert_close_outputs(found["scores"], expected["scores"])
                np.testing.assert_array_equal(found["labels"], expected["labels"])
                if count > 2:
                    assert_close_metrics(multilabel_report(**found), multilabel_report(**expected))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    save_pictures(tmp_path / "photos")
    return tmp_path / "photos"


def read_csv(path):
    with path.open(newline="") as file:
        return {row.pop("label"): row for row in csv.DictReader(file)}


def test_the_command_writes_what_scikit_learn_finds(checkpoint, pictures, tmp_path, capsys):
    # The same labels in another order: they are matched by name.
    (pictures / "labels.txt").write_text("\n".join(["tv monitor", "dog", "cat"]))
    assert main([str(checkpoint), str(pictures), "--output", str(tmp_path / "results"), "--batch_size", "3"]) == 0

    model, processor = tiny_model(), AutoImageProcessor.from_pretrained(checkpoint)
    images = [Image.open(pictures / "validation" / f"{number}.png") for number in range(len(PICTURE_LABELS))]
    with torch.no_grad():
        scores = model(**processor(images, return_tensors="pt")).logits.sigmoid().numpy()
    labels = np.array([[name in row for name in NAMES] for row in PICTURE_LABELS])
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
    assert f"mAP {ap.mean():.4f} (non-interpolated" in printed and "7 pictures, 3 labels" in printed
    for word in ("CP", "CR", "CF1", "OP", "OR", "OF1", "score >= 0.5", "top 3"):
        assert word in printed


def test_thresholds_of_the_checkpoint(checkpoint, pictures, tmp_path, capsys):
    assert main([str(checkpoint), str(pictures), "--threshold", "auto"]) == 2
    assert "holds no thresholds; fit them with python -m training.thresholds" in capsys.readouterr().err
    own = tmp_path / "own"
    save_checkpoint(own)
    store_thresholds(own, [0.25, 0.5, 0.75], {})
    assert main([str(own), str(pictures), "--threshold", "auto", "--output", str(tmp_path / "results")]) == 0
    thresholds = [row["threshold"] for row in read_csv(tmp_path / "results" / "per_label.csv").values()]
    assert thresholds == ["0.25", "0.5", "0.75"]
    assert "fitted thresholds" in capsys.readouterr().out


def test_a_label_without_positives_is_named_and_empty_in_the_table(checkpoint, tmp_path, capsys):
    labels = [[name for name in row if name != "dog"] for row in PICTURE_LABELS]
    save_pictures(tmp_path / "photos", labels)
    assert main([str(checkpoint), str(tmp_path / "photos"), "--output", str(tmp_path / "results")]) == 0
    assert "having no positive here: 1 labels (dog)" in capsys.readouterr().out
    row = read_csv(tmp_path / "results" / "per_label.csv")["dog"]
    assert (row["AP"], row["recall"], row["positives"]) == ("", "", "0")
    assert "NaN" not in (tmp_path / "results" / "results.json").read_text()


def test_results_are_not_overwritten_unless_asked(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "per_label.csv").write_text("mine")
    command = [str(checkpoint), str(pictures), "--output", str(tmp_path)]
    assert main(command) == 2
    assert "per_label.csv exists; choose another --output, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "per_label.csv").read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "per_label.csv").read_text() != "mine"


def test_other_labels_are_refused_by_name(checkpoint, tmp_path, capsys):
    save_pictures(tmp_path / "photos", [["cat"], ["horse"]], ["dog", "cat", "horse"])
    assert main([str(checkpoint), str(tmp_path / "photos")]) == 2
    error = capsys.readouterr().err
    assert f"only {checkpoint} has 'tv monitor'; only {tmp_path / 'photos'} has 'horse'" in error
    assert "Traceback" not in error


def test_a_dataset_without_a_vocabulary_can_borrow_the_checkpoints(checkpoint, tmp_path, capsys):
    save_pictures(tmp_path / "photos", [["cat"], ["dog", "cat"]], names=None)
    assert main([str(checkpoint), str(tmp_path / "photos")]) == 2
    assert "pass --use_checkpoint_labels" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "photos"), "--use_checkpoint_labels"]) == 0


def test_matching_gives_each_checkpoint_label_its_column():
    assert match_labels(["a", "b", "c"], ["c", "a", "b"], "checkpoint", "data") == [1, 2, 0]
    many = [f"label {number}" for number in range(30)]
    with pytest.raises(ValueError, match=r"only data has 'label 0', .*'label 4' and 25 more;"):
        match_labels(["a"], ["a", *many], "checkpoint", "data")


@pytest.mark.parametrize(
    ("checkpoint_name", "options", "message"),
    [
        (None, ["--split", "test"], "has no split 'test'"),
        ("./nowhere", [], "./nowhere is no folder"),
        (None, ["--image_column", "photo", "--label_format", "words"], "label_format='words'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(checkpoint, pictures, capsys, checkpoint_name, options, message):
    assert main([checkpoint_name or str(checkpoint), str(pictures), *options]) == 2
    assert message in capsys.readouterr().err


def test_unknown_options_are_refused(checkpoint, pictures, capsys):
    for option in (["--threshhold", "0.5"], ["--thresh", "0.5"], ["--threshold", "high"]):
        with pytest.raises(SystemExit):
            main([str(checkpoint), str(pictures), *option])
        assert option[0] in capsys.readouterr().err


def evaluate_to(checkpoint, pictures, folder):
    assert main([checkpoint, pictures, "--batch_size", "2", "--output", folder]) == 0


@pytest.mark.slow
def test_the_command_gives_the_same_on_several_processes(checkpoint, pictures, tmp_path):
    launch(evaluate_to, [checkpoint, pictures], tmp_path)
    results = [json.loads((tmp_path / n / "results.json").read_text())["metrics"] for n in "123"]
    tables = [read_csv(tmp_path / n / "per_label.csv") for n in "123"]
    for several in (1, 2):  # a score depends in its last digits on the batch that it is in
        assert_close_metrics(results[several], results[0])
        assert tables[several].keys() == tables[0].keys()
        for label, row in tables[0].items():
            assert {key: float(value) for key, value in tables[several][label].items()} == pytest.approx(
                {key: float(value) for key, value in row.items()}, abs=METRIC
            )
