"""Images with their labels, for a look before and after training: in a notebook, where each of these is an image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.processing_multilabel import post_process_multi_label_classification

from ..checkpoint.loading import load_checkpoint
from ..config import TrainingConfig
from ..data.load import load
from ..data.rows import Split
from ..options import CheckpointOptions, dataset_options
from ..places import checkpoint_folder
from ..publish.try_checkpoint import draw


def show_batch(config: TrainingConfig, *, split: str = "train", count: int = 8, seed: int = 0) -> Image.Image:
    """Images of the dataset of a run to come, with the labels that training will read of them."""
    images, truth = _some(config, split, count, seed)
    return _sheet(images, [[{"label": name, "score": None} for name in names] for names in truth], truth)


def show_predictions(
    config: TrainingConfig,
    checkpoint: str | Path | None = None,
    *,
    split: str = "validation",
    count: int = 8,
    seed: int = 0,
) -> Image.Image:
    """Images with what a checkpoint finds in them: green found, red wrong, grey missed.

    Args:
        config: Of the run; says how its dataset is read.
        checkpoint: Folder or Hub id; None: best/ of the run.
        split, count, seed: Which images.
    """
    name = checkpoint_folder(str(checkpoint or config.output_dir))
    model, processor = load_checkpoint(CheckpointOptions(checkpoint=name))
    images, truth = _some(config, split, count, seed)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        logits = model.eval()(pixel_values=pixels).logits
    thresholds = getattr(model.config, "thresholds", None)
    threshold = 0.5 if thresholds is None else "auto"
    return _sheet(
        images, post_process_multi_label_classification(logits, model.config.id2label, thresholds, threshold), truth
    )


def _some(config: TrainingConfig, split: str, count: int, seed: int) -> tuple[list[Image.Image], list[list[str]]]:
    loaded = load(config.dataset, splits=[split], **dataset_options(config))
    rows: Split = loaded.splits[split]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count].tolist()
    truth = [[loaded.label_names[label] for label in np.flatnonzero(rows.labels.dense(row) == 1)] for row in chosen]
    return [load_image(rows.images[row]["image"]) for row in chosen], truth


def _sheet(images: list[Image.Image], found: list[list[dict]], truth: list[list[str]]) -> Image.Image:
    buffer = io.BytesIO()
    draw(images, found, truth, buffer)
    return Image.open(buffer)
