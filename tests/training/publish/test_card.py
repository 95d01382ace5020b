"""Every figure on a card is looked up in what the run left."""

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import save_file

from modeling_hsvlt import (
    HPDVALConfig,
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
)
from training.config import TrainingConfig
from training.metrics.functional import multilabel_report, per_label_report
from training.metrics.glossary import HEAT_MAPS
from training.publish.card import escape, render_card
from training.publish.card_page import card_page
from training.scoring.measured_with import fingerprints

NAMES = ["dog", "a|b", "<b>bold</b> & [link](x)", "snake_case *star* `code`", "$5 bill", "#1\nline", "plain"]
THRESHOLDS = [float(value) for value in np.linspace(0.1, 0.7, 7)]
MEASURED_WITH = fingerprints({"id2label": dict(enumerate(NAMES)), "thresholds": THRESHOLDS})
CONFIGS = {"hsvlt": HSVLTConfig, "mltr": MlTrConfig, "hp_dval": HPDVALConfig, "adapter": HPDVALConfig}
MODELS = {
    "hsvlt": HSVLTForImageClassification,
    "mltr": MlTrForImageClassification,
    "hp_dval": HPDVALForImageClassification,
}
PAPER = {  # what the specifications give as published, and where the rest of the template has figures of its own
    "hsvlt": {"0.9158"},
    "mltr": {"0.819", "0.868", "0.885", "0.888", "0.958", "0.655"},
    "hp_dval": {"0.6017", "0.8505", "0.7572", "0.9159", "0.7619", "0.9306"},
}
PAPER["adapter"] = PAPER["hp_dval"]


@pytest.fixture
def run(tmp_path):
    """A run folder with all there can be in one."""
    rng = np.random.default_rng(0)
    labels = (rng.random((90, 7)) < 0.3).astype(np.float32)
    scores = np.clip(0.4 * labels + 0.6 * rng.random((90, 7)), 0, 1).astype(np.float32)
    thresholds = np.array(THRESHOLDS, dtype=np.float32)
    groups = {"head": np.array([0, 1]), "medium": np.array([2, 3, 4]), "tail": np.array([5, 6])}
    results = {
        "best_epoch": 2,
        "steps": 123,
        "measured_with": MEASURED_WITH,
        "positives_in_train": list(range(211, 218)),
    }
    for split, rows in (("validation", slice(0, 50)), ("test", slice(50, 90))):
        results[split] = multilabel_report(scores[rows], labels[rows], groups=groups)
        results[f"{split}_at_thresholds"] = multilabel_report(scores[rows], labels[rows], thresholds, groups=groups)
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "results.json").write_text(json.dumps(results))
    report = multilabel_report(scores[:60], labels[:60], 0.37)
    per_label = per_label_report(scores[:60], labels[:60], 0.37, label_names=NAMES)
    record = {
        "split": "validation",
        "threshold": 0.37,
        "measured_with": MEASURED_WITH,
        "ap_definition": "non-interpolated",
        "metrics": report,
    }
    (run / "evaluation" / "results.json").write_text(json.dumps(record))
    with (run / "evaluation" / "per_label.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *per_label])
        writer.writerows(zip(NAMES, *per_label.values(), strict=True))
    options = TrainingConfig(
        dataset="/home/someone/photos", output_dir=str(run), loss_type="asymmetric", optimizer="muon"
    )
    (run / "config.yaml").write_text(options.to_yaml())
    log = [{"step": step, "train/loss": 1 / step, "train/images_per_second": 10.0 * step} for step in range(1, 6)]
    log += [{"step": 3, "epoch": 1, "validation/mAP": 0.5}, {"step": 6, "epoch": 2, "validation/mAP": 0.6}]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    row = {"model": "hsvlt", "num_labels": 7, "batch_size": 8, "images_per_second": 12.345, "ratio": 1.2345}
    speed = {"setting": {"preset": "nano", "image_size": 64, "dtype": "float32"}, "device": "a CPU", "torch": "2.13.0"}
    speed |= {"reference": "bare", "rows": [row | {"ratio_spread": [1.1111, 1.3333]}]}
    (run / "speed.json").write_text(json.dumps(speed))
    for path in (run / "predictions.png", run / "evaluation" / "heat_maps.png"):
        Image.new("RGB", (8, 8)).save(path)
    return run


def checkpoint(run: Path, kind: str, **options) -> Path:
    folder = run / "best"
    config = CONFIGS[kind].preset("nano", id2label=dict(enumerate(NAMES)), thresholds=THRESHOLDS, **options)
    config.save_pretrained(folder)
    save_file({"a": np.zeros((13, 17), np.float32)}, folder / "model.safetensors")
    size = {"height": 64, "width": 96}
    processor = {"image_processor": {"size": size, "resize_mode": "pad"}, "id2label": dict(enumerate(NAMES))}
    processor["thresholds"] = THRESHOLDS
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if kind == "adapter":
        (folder / "config.json").rename(run / "config.json")
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    return folder


def tables(body: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as people see them: rows of cells, as the reference parser reads them."""
    found, rows, cells = [], [], None
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline" and cells is not None:
            cells.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows.append(cells)
            cells = None
        elif token.type == "table_close":
            found.append(rows)
    return found


def rendered(run, kind, **options):
    folder = checkpoint(run, kind, **options)
    card = render_card(run, folder, repo_id="org/name", tag="v1", images=True)
    card.save(folder / "README.md")
    return ModelCard.load(folder / "README.md"), folder


def rounded(value):
    return f"{value:.4f}"


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_figure_is_the_run_s(run, kind):
    card, folder = rendered(run, kind)
    results = json.loads((run / "results.json").read_text())
    record = json.loads((run / "evaluation" / "results.json").read_text())
    found = {rows[0][0] + str(len(rows[0])): rows for rows in tables(card.text.partition("## What the paper")[0])}
    headlines, decisions = found["metric4"], found["metric6"]
    keys = {
        "mAP": "mAP",
        "mAP, VOC07": "mAP_voc07",
        "mAP, VOC10": "mAP_voc10",
        "mAP, micro": "mAP_micro",
        "LRAP": "LRAP",
    }
    assert {row[0] for row in headlines[1:]} == {*keys, "images", "labels without a positive"}
    for name, validation, test, _ in headlines[1:]:
        if name in keys:
            assert [validation, test] == [rounded(results[split][keys[name]]) for split in ("validation", "test")]
    assert decisions[0][1:5] == ["validation, 0.5", "validation, fitted", "test, 0.5", "test, fitted"]
    reports = [results[name] for name in ("validation", "validation_at_thresholds", "test", "test_at_thresholds")]
    assert len(decisions) == 8
    for name, *values, _ in decisions[1:]:
        key = {"macro F1": "f1_macro"}.get(name, name)
        assert values == [rounded(report[key]) for report in reports]
    for name, _, *values in found["group6"][1:]:
        pairs = [
            (results[split][f"mAP_{name}"], results[split][f"num_labels_{name}"]) for split in ("validation", "test")
        ]
        assert values == [text for mean, count in pairs for text in (rounded(mean), str(count))]
    measured = list(csv.DictReader((run / "evaluation" / "per_label.csv").open(newline="")))
    assert found["label7"][0][-3:] == ["precision at 0.37", "recall at 0.37", "F1 at 0.37"]
    for index, (row, name, source) in enumerate(zip(found["label7"][1:], NAMES, measured, strict=True)):
        values = [THRESHOLDS[index], *(float(source[key]) for key in ("AP", "precision", "recall", "f1"))]
        assert row[0] == " ".join(name.split()) and row[2] == str(results["positives_in_train"][index])
        assert [row[1], *row[3:]] == [rounded(value) for value in values]
    assert found["model5"][1] == ["hsvlt", "7", "8", "12.35", "1.234 (1.111 to 1.333)"]
    assert "at most, Muon and AdamW, learning rate 0.0001" in card.text
    assert f"mAP {rounded(record['metrics']['mAP'])}" in card.text
    assert f"at a score of 0.37: CF1 {rounded(record['metrics']['CF1'])}" in card.text

    # Outside the tables as well: whatever decimal number the card shows is one of those, or the paper's.
    text = card.text
    known = set(
        re.findall(r"\d+\.\d+", json.dumps([results, record, yaml.safe_load((run / "config.yaml").read_text())]))
    )
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    ours, _, paper = prose.partition("## What the paper reports")
    for number in re.findall(r"(?<![\w./:-])\d+\.\d+(?!\w)", re.sub(r"\[arXiv [\d.]+\]\(\S+\)", "", ours)):
        same = [value for value in known if rounded(float(value)) == number or value == number]
        assert same or number in {"0.5", "30.0", "2.13"} or float(number) in (1e-4,), number
    published = (
        paper.partition("## Licence")[0] + text.partition("## What the paper reports")[2].partition("## Licence")[0]
    )
    assert set(re.findall(r"\d+\.\d+", published)) == PAPER[kind]
    assert not PAPER[kind] & set(re.findall(r"\d+\.\d+", text.partition("## What the paper reports")[0]))

    count = 221  # an adapter's are those in its file
    if kind != "adapter":
        count = MODELS[kind](CONFIGS[kind].from_pretrained(folder)).num_parameters()
    assert f"7 labels; {count:,} parameters; images of 96 x 64 px, aspect ratio kept" in text
    assert "someone" not in card.content and "photos" in text and "undefined" not in text.lower()
    for path in re.findall(r"!\[[^]]*\]\((\S+)\)", text):
        assert (folder / path).is_file(), path
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "training.png",
        "predictions.png",
        "heat_maps.png",
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_metadata_is_what_the_hub_reads(run, kind):
    card, _ = rendered(run, kind)
    data, results = card.data, json.loads((run / "results.json").read_text())
    assert data.pipeline_tag == "image-classification" and data.license == "unknown"
    assert data.library_name == ("peft" if kind == "adapter" else "transformers")
    assert data.base_model == ("org/base" if kind == "adapter" else None)
    assert {"multi-label-image-classification", "custom_code"} <= set(data.tags)
    entries = {(entry.dataset_split, entry.metric_type): entry.metric_value for entry in data.eval_results}
    assert entries == {
        (split, key): results[split if key == "mAP" else f"{split}_at_thresholds"][key]
        for split in ("validation", "test")
        for key in ("mAP", "CF1", "OF1")
    }
    # Parsed as the Hub does it, by YAML alone.
    raw = yaml.safe_load(card.content.split("---\n")[1])
    assert raw["model-index"][0]["name"] == "name"
    assert all(entry["dataset"]["type"] == "photos" for entry in raw["model-index"][0]["results"])
    paper = {"hsvlt": "2407.16244", "mltr": "2106.06195"}.get(kind, "10.1109/TIP.2025.3609185")
    assert paper in card.text.partition("```bibtex")[2]
    if kind == "mltr":
        assert "**MlTr, reconstructed; layout inferred from the published parameter counts**" in card.text


def test_a_hub_data_set_and_a_licence_are_named(run):
    (run / "config.yaml").write_text(TrainingConfig(dataset="org/images", dataset_revision="abc").to_yaml())
    folder = checkpoint(run, "hsvlt")
    card = render_card(run, folder, repo_id="org/name", licence="mit")
    assert card.data.datasets == ["org/images"] and card.data.license == "mit"
    assert "org&#47;images (revision abc)" in card.text and "Weights: mit." in card.text
    assert {path.name for path in (folder / "figures").iterdir()} == {"training.png"}, "no images of others' data"


def test_scenes_are_this_project_s_own(run):
    (run / "config.yaml").write_text(TrainingConfig(dataset="scenes").to_yaml())
    folder = checkpoint(run, "hsvlt")
    card = render_card(run, folder, repo_id="org/name")
    assert card.data.license == "apache-2.0" and "of no use for photographs" in card.text
    assert (folder / "figures" / "heat_maps.png").is_file()


def test_a_checkpoint_alone_has_a_card_too(run):
    folder = checkpoint(run, "hsvlt", classifier="shared", label_text_encoder="org/encoder")
    text = render_card(folder, folder, repo_id="org/name").content
    assert "No results came with this checkpoint" in text and "without the options of its run" in text
    assert "set_labels" in text and "model-index" not in text and tables(text)[0][1][1] == "0.1000"
    assert "any other gets a guess" in text and "classes of the backbone" not in text
    shared = {"classifier": "shared", "label_text_encoder": "org/encoder"}
    folder = checkpoint(run, "hsvlt", **shared, residual_attention=True, text_classes=5)
    text = render_card(folder, folder, repo_id="org/name").content
    assert "gets its weights from 5 classes of the backbone" in text and "any other gets a guess" not in text


EXCLUSIVE = [  # of each, a card may say one
    ("No results came with", "Measured by the run", "An evaluation: split", "earlier weights"),
    ("No results came with", "A further evaluation", "By label: split"),
    ("No thresholds were fitted", 'threshold="auto"'),
    ("No thresholds were fitted", "| label | threshold |"),
    ("Scores are not calibrated", "Scores were calibrated"),
    ("Labels can be exchanged by name", "of no known text encoder", "weights for each label", "labels are fixed"),
    ("random vectors or of an unknown encoder", "Labels can be exchanged by name"),
]


@pytest.mark.parametrize("has", itertools.product([True, False], repeat=3))
def test_a_card_does_not_contradict_itself(run, has):
    has_results, has_evaluation, has_thresholds = has
    encoder = {"label_text_encoder": "org/encoder", "label_pooling": "mean"} if has_results != has_thresholds else {}
    folder = checkpoint(run, "hsvlt", classifier="shared", **encoder)
    if not has_thresholds:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"thresholds": None}))
    if not has_results:
        (run / "results.json").unlink()
    if not has_evaluation:
        (run / "evaluation" / "results.json").unlink()
    text = render_card(run, folder, repo_id="org/name").text
    for statements in EXCLUSIVE:
        said = [statement for statement in statements if statement in text]
        assert len(said) <= 1, said
    assert text.count("A heat map (") == 1 and HEAT_MAPS["hsvlt"] in text
    assert not re.search(r"\b1 (labels|images|parameters)\b", text)


def test_labels_of_the_split_that_the_run_measured_are_no_further_evaluation(run):
    folder = checkpoint(run, "hsvlt")
    path = run / "evaluation" / "results.json"
    record = json.loads(path.read_text())
    assert "A further evaluation: split validation, mAP" in render_card(run, folder, repo_id="org/name").text
    path.write_text(json.dumps(record | {"dataset": "/home/someone/other"}))
    assert "A further evaluation: split validation of other, mAP" in render_card(run, folder, repo_id="org/name").text
    record["metrics"]["mAP"] = json.loads((run / "results.json").read_text())["validation"]["mAP"]
    path.write_text(json.dumps(record))
    text = render_card(run, folder, repo_id="org/name").text
    assert "By label: split validation" in text and "further evaluation" not in text


def test_many_labels_are_cut(run):
    folder = checkpoint(run, "hsvlt")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {str(index): f"label {index}" for index in range(300)}, "thresholds": None}
    (folder / "config.json").write_text(json.dumps(config))
    text = render_card(folder, folder, repo_id="org/name").text
    assert "100 more labels are in" in text and len(tables(text)[0]) == 201


@pytest.mark.parametrize(
    "name", [*NAMES, "![x](y)", "{{ 7 * 7 }}", "{% raw %}", "~~x~~", "1. one", "a\\|b", "http://x.y", "&amp;"]
)
def test_names_show_as_they_are(name):
    (row,) = tables(f"| h | i |\n|---|---|\n| {escape(name)} | 1 |")[0][1:]
    assert row == [" ".join(name.split("\n")), "1"]
    html = MarkdownIt("commonmark").render(escape(name))
    assert not re.search(r"<(?!/?p>)", html.strip())


def test_the_card_as_a_page(run):
    """It opens alone, holds what the card holds, scrolls its tables, and markup in a name is text."""
    card, folder = rendered(run, "hsvlt")
    html = card_page(folder, "org/name")
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    assert html.count("<table") == html.count('<div class="scroll" tabindex="0"><table') == len(tables(card.text)) > 3
    sources = re.findall(r'<img src="([^"]*)" alt="[^"]+"', html)
    assert len(sources) == html.count("<img") == 3
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "<b>bold</b>" not in html and "&lt;b&gt;bold&lt;/b&gt; &amp; [link](x)" in html
    for row in tables(card.text)[0]:
        assert all(f">{cell}</t" in html for cell in row[1:3])
    assert "pipeline_tag: image-classification" in html and "{{" not in html.replace("{{HSVLT}", "")
