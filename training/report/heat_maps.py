"""Heat maps laid over the images they belong to."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no window, wherever this runs
import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.pipeline_multilabel import MultiLabelImageClassificationPipeline

NUM_IMAGES, LABELS_PER_IMAGE = 6, 3
SIDE = 224  # pixels of an image's longer side in the drawing


class Explained(NamedTuple):
    """An image and what was found in it: `{"label", "score", "heat_map"}` of each label."""

    image: Image.Image
    labels: list[dict]


def overlay(image: Image.Image, heat_map: np.ndarray, strength: float = 0.75) -> Image.Image:
    """The image, darkened where the map is low and warm where it is high.

    Args:
        image: Any size.
        heat_map: (height, width) of the image, from 0 to 1.
        strength: 0 leaves the image as it is, 1 covers it.

    Raises:
        ValueError: a map of another size.
    """
    if heat_map.shape != (image.height, image.width):
        raise ValueError(
            f"The heat map is {heat_map.shape[1]} x {heat_map.shape[0]}, the image {image.width} x "
            f"{image.height}; give the map of this image."
        )
    warm = matplotlib.colormaps["inferno"](heat_map)[..., :3] * 255
    blended = (1 - strength) * np.asarray(image.convert("RGB"), dtype=np.float64) + strength * warm
    return Image.fromarray(blended.round().astype(np.uint8))


@plt.rc_context({"text.parse_math": False})  # a label may be called "$5 bill"
def draw_explained(rows: Sequence[Explained]) -> bytes:
    """A PNG: one row an image, which stands first, and then a column a label."""
    columns = 1 + max(len(row.labels) for row in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.2 * columns, 2.3 * len(rows)), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (image, labels) in zip(axes, rows, strict=True):
        row[0].imshow(image)
        for axis, label in zip(row[1:], labels, strict=False):
            axis.imshow(overlay(image, label["heat_map"]))
            axis.set_title(f"{label['label']} {label['score']:.2f}", fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    return drawn.getvalue()


def draw_found_labels(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    rows: Dataset,
    scores: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray,
) -> bytes | None:
    """What spoke for labels that were found rightly, in the images with most of them.

    Args:
        model, image_processor: The images' scores are theirs.
        rows: Of the images, with undecoded `image`s.
        scores, labels: (n, num_labels), of the same rows.
        thresholds: (num_labels,) from which on a label counts as found.

    Returns:
        A PNG as of `draw_explained`; None where nothing was found, or the model has no heat maps.
    """
    found = (scores >= thresholds) & (labels == 1)
    count = np.minimum(found.sum(1), LABELS_PER_IMAGE)
    chosen = [int(row) for row in np.argsort(-count, kind="stable")[:NUM_IMAGES] if count[row]]
    tagger = MultiLabelImageClassificationPipeline(model=model, image_processor=image_processor, device=model.device)
    explained = []
    for row in chosen:
        image = load_image(rows[row]["image"])
        image.thumbnail((SIDE, SIDE))
        best = sorted(np.flatnonzero(found[row]), key=lambda label: -scores[row, label])[:LABELS_PER_IMAGE]
        names = [model.config.id2label[int(label)] for label in best]
        try:
            explained.append(Explained(image, tagger(image, labels=names, explain=True)))
        except ValueError:  # it has none
            return None
    return draw_explained(explained) if explained else None
