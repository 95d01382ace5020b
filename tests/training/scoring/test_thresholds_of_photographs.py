"""Thresholds from photographs to the pipeline: fitted to one half of a validation split, they decide better than 0.5
does on images of the other half; the report of those says so; and the checkpoint's folder carries them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoModelForImageClassification, pipeline

import training.evaluate
import training.fit_thresholds
from benchmarks.peers.efficientnet_lite import (
    EfficientNetLiteHeadConfig,
    EfficientNetLiteWithHead,
    image_processor,
    load_backbone,
)
from modeling_hsvlt import MultiLabelProcessor
from modeling_hsvlt.losses_multilabel import binary_cross_entropy_loss
from training.data.batches import build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load

VOC = Path(__file__).parents[4] / "shared" / "data" / "voc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VOC.is_dir(), reason="the photographs of ../shared/data are not on this machine"),
]


def halves(folder):
    """Every other image of validation, and half of the others, by links."""
    lines = [line for line in (VOC / "validation" / "metadata.jsonl").read_text().splitlines() if line.strip()]
    for name, part in (("fitted", lines[::2]), ("held_out", lines[1::4])):
        split = folder / name / "validation"
        split.mkdir(parents=True)
        for line in part:
            image = json.loads(line)["file_name"]
            (split / image).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(VOC / "validation" / image, split / image)
        (split / "metadata.jsonl").write_text("\n".join(part))
        (folder / name / "labels.txt").write_text((VOC / "labels.txt").read_text())
    return str(folder / "fitted"), folder / "held_out"


def train_a_head(folder):
    """ImageNet's EfficientNet-Lite0 at 64 px, and a linear head that has seen some photographs; with its processor."""
    loaded = load(VOC, splits=["train"])
    splits, names = loaded.splits, loaded.label_names
    processor = image_processor(64)
    data = MultiLabelDataset(
        splits["train"].select(np.random.default_rng(0).permutation(len(splits["train"]))[:600]), names, processor
    )
    torch.manual_seed(0)
    model = EfficientNetLiteWithHead(EfficientNetLiteHeadConfig(id2label=dict(enumerate(names))))
    model.backbone.load_state_dict(load_backbone().state_dict())
    model.eval()
    with torch.no_grad():
        batches = list(build_dataloader(data, batch_size=100, processor=processor))
        maps = torch.cat([model.backbone(batch["pixel_values"]).feature_maps[-1] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(60):
        binary_cross_entropy_loss(model.head(maps), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    MultiLabelProcessor(processor, id2label=model.config.id2label).save_pretrained(folder)
    return names


def test_fitted_thresholds_raise_macro_f1_on_the_other_half(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    names = train_a_head(checkpoint)
    fitted, held_out = halves(tmp_path)
    assert training.fit_thresholds.main([str(checkpoint), fitted, "--batch_size", "64"]) == 0, capsys.readouterr()
    scoring = [str(checkpoint), str(held_out), "--threshold", "auto", "--batch_size", "64"]
    assert training.evaluate.main([*scoring, "--output", str(tmp_path / "report")]) == 0, capsys.readouterr()

    # What the report says of images that nothing was fitted to
    compared = json.loads((tmp_path / "report" / "results.json").read_text())["thresholds_compared"]
    at_half, at_fitted = compared["0.5 for every label"]["f1_macro"], compared["the checkpoint's"]["f1_macro"]
    assert at_fitted > at_half + 0.01 > 0.11  # by how much depends on the photographs
    html = (tmp_path / "report" / "report.html").read_text()
    assert f"{at_half:.4f}" in html and f"{at_fitted:.4f}" in html

    # A stranger's pipeline decides as the report counted, by the thresholds in the folder
    thresholds = AutoModelForImageClassification.from_pretrained(checkpoint).config.thresholds
    assert len(set(thresholds)) > 10
    tagger = pipeline("multi-label-image-classification", model=str(checkpoint), device="cpu")
    rows = [json.loads(line) for line in (held_out / "validation" / "metadata.jsonl").read_text().splitlines()]
    images = [str(held_out / "validation" / row["file_name"]) for row in rows]
    found = tagger(images, threshold="auto", batch_size=64)
    predicted, present = (
        np.array([[name in of_row for name in names] for of_row in listed])
        for listed in ([[label["label"] for label in row] for row in found], [row["labels"] for row in rows])
    )
    rated = present.any(0)
    macro_f1 = f1_score(present[:, rated], predicted[:, rated], average="macro", zero_division=0)
    assert macro_f1 == pytest.approx(at_fitted, abs=0.002)  # batches are put together otherwise
