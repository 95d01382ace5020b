"""The most confident mistakes of a split, and which labels are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from scipy import sparse

from modeling_hsvlt.load_image import load_image

from ..data.leave_out import image_name
from .heat_maps import SIDE, image_uri
from .plots import plot_confusion, svg_uri

NUM_MISTAKES = 12  # of each kind
MISTAKES_PER_LABEL = 2  # or one label's would fill the page
MAX_CONFUSED = 20  # rows and columns of the heat map


class Mistake(NamedTuple):
    """A wrong decision to show: an image's row, the label, its score and threshold."""

    row: int
    label: int
    score: float
    threshold: float


def confident_mistakes(scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, kind: str) -> list[Mistake]:
    """The false positives of the highest score, or (`kind="misses"`) the present labels of the lowest.

    At most one an image and `MISTAKES_PER_LABEL` a label, so that there is something to see.
    """
    above = scores >= thresholds
    row, label = np.nonzero((labels == 1) & ~above if kind == "misses" else (labels == 0) & above)
    surest_first = np.argsort(scores[row, label] * (1 if kind == "misses" else -1), kind="stable")
    chosen: list[Mistake] = []
    rows: set[int] = set()
    of_label = np.zeros(scores.shape[1], dtype=np.int64)
    for place in surest_first:
        at = int(row[place]), int(label[place])
        if at[0] not in rows and of_label[at[1]] < MISTAKES_PER_LABEL:
            chosen.append(Mistake(*at, float(scores[at]), float(thresholds[at[1]])))
            rows.add(at[0])
            of_label[at[1]] += 1
        if len(chosen) == NUM_MISTAKES:
            break
    return chosen


def co_occurrence_confusion(scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Which absent label is predicted where which present one is there.

    Returns:
        "predicted" (columns,): at most `MAX_CONFUSED` labels, those with the most false positives, in class order.
        "wrong", "images" (num_labels, columns): images that show the row's label and not the column's, and how many
        of them got the column's. "usual" (columns,): the share of all images without the column's label that got it.
    """
    false = (labels == 0) & (scores >= thresholds)
    total = false.sum(0)
    predicted = np.sort(np.argsort(-total, kind="stable")[: min(MAX_CONFUSED, np.count_nonzero(total))])
    present = sparse.csr_matrix((labels == 1).T, dtype=np.int64)
    absent = (labels[:, predicted] == 0).astype(np.int64)
    return {
        "predicted": predicted,
        "wrong": present @ false[:, predicted].astype(np.int64),
        "images": present @ absent,
        "usual": total[predicted] / np.maximum(absent.sum(0), 1),
    }


def confusion_page(confusion: dict[str, np.ndarray], label_names: Sequence[str]) -> dict | None:
    predicted, wrong, images, usual = confusion.values()
    if not len(predicted):
        return None
    rates = np.where(images > 0, wrong / np.maximum(images, 1), np.nan)
    shown = np.sort(np.argsort(-wrong.sum(1), kind="stable")[:MAX_CONFUSED])
    # Of a label that is predicted everywhere no company is to blame: what counts is how many more than usual.
    excess = wrong - images * usual
    pairs = [divmod(int(place), len(predicted)) for place in np.argsort(-excess, axis=None, kind="stable")[:15]]
    return {
        "plot": svg_uri(
            plot_confusion(
                rates[shown],
                wrong[shown],
                [label_names[row] for row in shown],
                [label_names[label] for label in predicted],
            )
        ),
        "pairs": [
            {
                "present": label_names[row],
                "predicted": label_names[predicted[column]],
                "wrong": int(wrong[row, column]),
                "images": int(images[row, column]),
                "usual": usual[column],
            }
            for row, column in pairs
            if excess[row, column] > 0
        ],
    }


def mistake_page(
    mistakes: Sequence[Mistake], labels: np.ndarray, rows: Dataset, label_names: Sequence[str]
) -> list[dict]:
    images = rows.select_columns(["image"])
    cards = []
    for mistake in mistakes:
        stored = images[mistake.row]["image"]
        image = load_image(stored)
        image.thumbnail((SIDE, SIDE))
        cards.append(
            {
                "image": image_uri(image),
                "file": image_name(stored) or f"row {mistake.row}",
                "label": label_names[mistake.label],
                "score": mistake.score,
                "threshold": mistake.threshold,
                "present": [label_names[label] for label in np.flatnonzero(labels[mistake.row] == 1)],
            }
        )
    return cards
