"""Heat maps laid over the images they belong to."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.pipeline_multilabel import MultiLabelImageClassificationPipeline

from .plots import shorten

NUM_IMAGES, LABELS_PER_IMAGE = 6, 3
SIDE = 224  # pixels of an image's longer side
WARM = "inferno"
SCALE_WORDS = "from least to most, within one map"
CELL, GAP, TITLE = 1.6, 0.12, 0.24  # inches: an image's width, the space between two, and a line of text
TALLEST = 1.5  # times its width; what is taller is drawn narrower


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
    warm = matplotlib.colormaps[WARM](heat_map)[..., :3] * 255
    blended = (1 - strength) * np.asarray(image.convert("RGB"), dtype=np.float64) + strength * warm
    return Image.fromarray(blended.round().astype(np.uint8))


@matplotlib.rc_context({"text.parse_math": False})  # a label may be called "$5 bill"
def draw_explained(rows: Sequence[Explained]) -> bytes:
    """A PNG: one row an image, which stands first, and then a column a label; with the same gap between all."""
    columns = 1 + max(len(row.labels) for row in rows)
    heights = [CELL * min(row.image.height / row.image.width, TALLEST) for row in rows]
    width, height = columns * (CELL + GAP) + GAP, sum(heights) + len(rows) * (GAP + TITLE) + 4 * GAP
    figure = Figure(figsize=(width, height))

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        axes = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
        axes.axis("off")
        axes.set_anchor("W")
        return axes

    top = 0.0
    for (image, labels), high in zip(rows, heights, strict=True):
        top += TITLE
        place(GAP, top, CELL, high).imshow(image)
        for column, label in enumerate(labels, start=1):
            axes = place(GAP + column * (CELL + GAP), top, CELL, high)
            axes.imshow(overlay(image, label["heat_map"]))
            figure.text(
                (GAP + column * (CELL + GAP)) / width, 1 - (top - 0.05) / height,
                f"{shorten(label['label'], 20)} {label['score']:.2f}", fontsize=7.5,
            )  # fmt: skip
        top += high + GAP
    place(GAP, top + GAP, CELL, GAP).imshow([[*range(256)]], cmap=WARM, aspect="auto")
    figure.text((CELL + 2 * GAP) / width, 1 - (top + 1.5 * GAP) / height, SCALE_WORDS, fontsize=7.5, va="center")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=144, metadata={"Software": None})
    return drawn.getvalue()


def explain_found_labels(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    rows: Dataset,
    scores: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray,
) -> list[Explained]:
    """What spoke for labels that were found rightly, in the images with most of them.

    Args:
        model, image_processor: The images' scores are theirs.
        rows: Of the images, with undecoded `image`s.
        scores, labels: (n, num_labels), of the same rows.
        thresholds: (num_labels,) from which on a label counts as found.

    Returns:
        Images of at most `SIDE` pixels; none where nothing was found, or the model has no heat maps.
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
            return []
    return explained


def heat_map_page(rows: Sequence[Explained]) -> list[dict]:
    """The images and their maps as the page shows them."""
    return [
        {
            "image": image_uri(image),
            "maps": [{**label, "heat_map": image_uri(overlay(image, label["heat_map"]))} for label in labels],
        }
        for image, labels in rows
    ]


def image_uri(image: Image.Image) -> str:
    """An image as a JPEG in a data URI."""
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
