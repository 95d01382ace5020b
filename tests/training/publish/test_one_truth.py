"""From training to the card: thresholds and calibration of config.json as it is, and no path of this machine."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

import training.calibrate
import training.evaluate
import training.fit_thresholds
import training.publish.hub
import training.train
from modeling_hsvlt.label_context import LabelContext
from modeling_hsvlt.label_prompts import load_text_encoder
from training.config import TrainingConfig
from training.publish.build import check_no_path
from training.publish.hub import push_run
from training.publish.measured import PATH_OPTIONS, read_options

from ..tiny_checkpoint import save_checkpoint, tiny_model
from ..tiny_run import write_recipe

NAMES = ["red", "green", "blue"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", *NAMES]


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    monkeypatch.setattr(training.publish.hub, "check_folder", lambda *args: 0.0)


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A folder whose name no push may tell, with a CSV, its images, a text encoder and models to start from."""
    root = tmp_path_factory.mktemp("secret")
    (root / "photos").mkdir()
    (root / "table").mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 12)):
        rows = [["file_name", "labels"]]
        for number in range(count):
            shows = generator.integers(0, 2, 3)
            shows[number % 3] = 1
            pixels = np.broadcast_to(150 * shows, (24, 24, 3)) + generator.integers(0, 100, (24, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / f"{split}{number}.png")
            rows.append([f"{split}{number}.png", ",".join(np.array(NAMES)[shows == 1])])
        with (root / "table" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    (root / "exclude.txt").write_text("train\t0\tphotos/train0.png\tcopy\n")
    torch.manual_seed(0)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=len(WORDS), **tower)).save_pretrained(root / "bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(root / "bert")
    LabelContext(*load_text_encoder(root / "bert"), NAMES).save_adapter(root / "adapter")
    model = tiny_model(NAMES)
    model.save_pretrained(root / "start")
    return root


@pytest.fixture(scope="module")
def run(secret):
    """A run whose every option that can hold a path holds one."""
    options = {
        "dataset": str(secret / "table"),
        "image_folder": str(secret / "photos"),
        "exclude": str(secret / "exclude.txt"),
        "feature_cache": str(secret / "features"),
        "label_encoder": str(secret / "bert"),
        "label_context": {"adapter": str(secret / "adapter")},
        "init_from": str(secret / "start"),
        "output_dir": str(secret / "run"),
        "label_names": NAMES,
        "unlisted_images": "skip",
        "epochs": 1,
        "report": True,
        "model": {},
    }
    recipe = Path(write_recipe(secret))
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | options))
    assert training.train.main([str(recipe)]) == 0
    used = yaml.safe_load((secret / "run" / "config.yaml").read_text())
    assert [name for name in PATH_OPTIONS if not used[name]] == ["backbone"], "which init_from excludes"
    return secret / "run"


def build(run: Path, target: Path) -> str:
    """What a push would send; the card's text."""
    push_run(run, "me/tagger", dry_run=True, folder=target)
    return (target / "README.md").read_text()


def column(card: str, index: int) -> list[str]:
    rows = [line.split("|")[1:-1] for line in card.partition("### Labels")[2].splitlines() if line.startswith("|")]
    return [row[index].strip() for row in rows[2:] if row[0].strip() in NAMES]


def holding(folder: Path, text: str) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_no_path_leaves_the_machine(run, secret, tmp_path):
    assert holding(run, str(secret)), "the run itself knows its paths"
    build(run, tmp_path / "built")
    names = {path.name for path in (tmp_path / "built").iterdir()}
    assert {"README.md", "config.json", "results.json", "per_label.csv", "training_options.yaml"} <= names
    assert holding(tmp_path / "built", str(secret)) == []
    options = yaml.safe_load((tmp_path / "built" / "training_options.yaml").read_text())
    assert {name: options[name] for name in PATH_OPTIONS} == {
        "output_dir": "run", "dataset": "table", "image_folder": "photos", "exclude": "exclude.txt",
        "backbone": None, "label_encoder": "bert", "label_context": {"adapter": "adapter"}, "init_from": "start",
        "feature_cache": "features",
    }  # fmt: skip
    assert json.loads((tmp_path / "built" / "config.json").read_text())["label_text_encoder"] == "bert"


def test_a_path_in_any_file_is_taken_out_or_refused(run, secret, tmp_path):
    """Whatever wrote it there: an older version, a hand, a field that nobody marked."""
    for name in ("config.json", "processor_config.json"):
        path = run / "best" / name
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"note": str(secret / "x"), "deep": [{"a": f"{secret}/y"}]}))
        build(run, tmp_path / name)
        path.write_text(before)
        assert holding(tmp_path / name, str(secret)) == []
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text(f"See {secret / 'photos'}.")
    with pytest.raises(ValueError, match=r"README\.md would publish the path .*; nothing was pushed"):
        check_no_path(run, tmp_path / "card")


def test_options_that_others_may_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    cases = {
        "dataset": {"org/name": "org/name", "mine/photos": "photos", "../a/b": "b", "./b": "b", "~/b": "b",
                    "x/y/z": "z", "C:\\Users\\me\\images": "images", "/x/scenes": "./scenes", "scenes": "scenes"},
        "backbone": {"me/convnext": "convnext", "convnext": "convnext"},  # not pinned, so no Hub id
        "model": {"/a/b": "b", "mine/photos": "photos", "other/photos": "other/photos"},
    }  # fmt: skip
    for name, values in cases.items():
        for value, public in values.items():
            raw = {name: {"inner": [value]} if name == "model" else value, "label_names": ["/a/b"]}
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
            expected = {name: {"inner": [public]} if name == "model" else public, "label_names": ["/a/b"]}
            assert read_options(tmp_path) == expected
    raw = {"backbone": "me/convnext", "backbone_revision": "abc"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    assert read_options(tmp_path) == raw


def test_every_option_that_names_a_folder_or_file_is_marked():
    named = {"output_dir", "dataset", "exclude", "image_folder", "init_from", "backbone", "label_encoder"}
    assert set(PATH_OPTIONS) == named | {"label_context", "feature_cache"}
    path_like = [name for name in vars(TrainingConfig()) if name.endswith(("_dir", "_folder", "_path", "_file"))]
    assert set(path_like) <= set(PATH_OPTIONS)


def test_what_is_fitted_again_is_what_the_card_shows(run, secret, tmp_path):
    first = build(run, tmp_path / "first")
    results = json.loads((run / "results.json").read_text())
    config = json.loads((run / "best" / "config.json").read_text())
    assert not {"thresholds", "calibration", "label_names"} & results.keys()
    assert column(first, 1) == [f"{value:.4f}" for value in config["thresholds"]]
    assert "validation, fitted" in first and "fitted for f1" in first and "fitted anew" not in first
    assert f"at the thresholds below: CF1 {results['validation_at_thresholds']['CF1']:.4f}" in first
    assert "precision | recall | F1 |" in first and "metric_type: CF1" not in first.partition("type: mAP")[0]
    assert (tmp_path / "first" / "results.json").read_text() == (run / "results.json").read_text()

    split = [str(run / "best"), str(secret / "table"), "--image_folder", str(secret / "photos")]
    split += ["--unlisted_images", "skip", "--label_names", *NAMES]
    assert training.fit_thresholds.main([*split, "--objective", "cost", "--target", "5"]) == 0
    again = json.loads((run / "best" / "config.json").read_text())["thresholds"]
    assert again != config["thresholds"]
    second = build(run, tmp_path / "second")
    assert column(second, 1) == [f"{value:.4f}" for value in again] and "fitted for cost" in second
    # What was measured at the thresholds before is not shown beside the new ones, in no file; the rest is.
    assert "The thresholds were fitted anew after this was measured" in second and "validation, fitted" not in second
    assert "Its decisions were at other thresholds" in second and "precision | recall" not in second
    for name in ("results.json", "README.md"):
        text = (tmp_path / "second" / name).read_text()
        assert str(results["validation_at_thresholds"]["CF1"]) not in text and "mAP" in text
    assert (tmp_path / "second" / "per_label.csv").read_text().splitlines()[0] == "label,positives,known,AP"
    assert f"| {results['validation']['LRAP']:.4f} |" in second and column(second, 3) == column(first, 3)

    # Measured again, it is shown again.
    assert training.evaluate.main([*split, "--threshold", "auto", "--output", str(run / "evaluation")]) == 0
    metrics = json.loads((run / "evaluation" / "results.json").read_text())["metrics"]
    third = build(run, tmp_path / "third")
    assert f"at the thresholds below: CF1 {metrics['CF1']:.4f}" in third

    assert training.calibrate.main(split) == 0
    moved = json.loads((run / "best" / "config.json").read_text())["thresholds"]
    fourth = build(run, tmp_path / "fourth")
    assert column(fourth, 1) == [f"{value:.4f}" for value in moved] != column(third, 1)
    assert "Scores were calibrated (platt)" in fourth and "calibrated anew after this was measured" in fourth
    assert f"| mAP | {results['validation']['mAP']:.4f} |" in fourth and "| LRAP | - |" in fourth
    assert "Decisions" not in fourth and "precision" not in fourth.partition("## Training")[0].partition("### Lab")[2]
    assert holding(tmp_path / "fourth", str(secret)) == []

    # Other names: nothing that was measured belongs to them.
    path = run / "best" / "config.json"
    config = json.loads(path.read_text()) | {"thresholds": None}
    path.write_text(json.dumps(config | {"id2label": dict(enumerate(["red", "blue", "green"]))}))
    fifth = build(run, tmp_path / "fifth")
    assert "of other label names" in fifth and f"{results['validation']['mAP']:.4f}" not in fifth
    assert not os.path.exists(tmp_path / "fifth" / "results.json")
    assert {line[-1] for line in (tmp_path / "fifth" / "selected_tags.csv").read_text().splitlines()[1:]} == {"0"}


def test_an_evaluation_of_earlier_weights_is_left_out_and_said(secret, tmp_path):
    folder = tmp_path / "run"
    model = save_checkpoint(folder / "best", NAMES)
    split = [str(folder / "best"), str(secret / "table"), "--image_folder", str(secret / "photos")]
    split += ["--unlisted_images", "skip", "--label_names", *NAMES]
    assert training.evaluate.main([*split, "--output", str(folder / "evaluation")]) == 0
    assert "An evaluation: split validation" in build(folder, tmp_path / "measured")
    # Calibration changes the classifier; the weights below it are those that were measured.
    assert training.calibrate.main(split) == 0
    assert "An evaluation: split validation" in build(folder, tmp_path / "calibrated")
    with torch.no_grad():
        next(model.hsvlt.parameters()).add_(1e-3)
    model.save_pretrained(folder / "best")
    card = build(folder, tmp_path / "trained_on")
    assert "An evaluation is of earlier weights than the checkpoint has now" in card
    assert "split validation" not in card and not (tmp_path / "trained_on" / "per_label.csv").exists()
