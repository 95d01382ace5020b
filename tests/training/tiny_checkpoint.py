"""A checkpoint of a few kilobytes and a folder of images that it can be run on."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

NAMES = ["dog", "cat", "tv monitor"]
IMAGE_LABELS = [["cat"], [], ["dog", "tv monitor"], ["cat", "dog"], ["tv monitor"], ["dog"], ["cat"]]


def tiny_model(names=NAMES, **overrides):
    torch.manual_seed(0)
    backbone = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    config = HSVLTConfig.preset(
        "nano", backbone_config=backbone, label_embedding_dim=8, id2label=dict(enumerate(names)), **overrides
    )
    model = HSVLTForImageClassification(config).eval()
    with torch.no_grad():  # scores that differ from image to image
        for parameter in model.classifier.parameters():
            parameter.normal_(std=3.0)
    return model


def save_checkpoint(folder: Path, names=NAMES) -> HSVLTForImageClassification:
    model = tiny_model(names)
    model.save_pretrained(folder)
    processor = MultiLabelImageProcessor(size={"height": 16, "width": 16})
    MultiLabelProcessor(processor, id2label=model.config.id2label).save_pretrained(folder)
    return model


def save_images(folder: Path, labels=IMAGE_LABELS, names=NAMES, split="validation") -> None:
    """An image folder whose labels.txt holds `names`, or has none if that is None."""
    (folder / split).mkdir(parents=True)
    for number in range(len(labels)):
        pixels = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30, 20)).save(folder / split / f"{number}.png")
    rows = [json.dumps({"file_name": f"{number}.png", "labels": row}) for number, row in enumerate(labels)]
    (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    if names is not None:
        (folder / "labels.txt").write_text("\n".join(names))
