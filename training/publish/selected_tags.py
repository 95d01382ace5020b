"""`selected_tags.csv`, the list of labels that the WD taggers ship beside their weights and that photo tools read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

FILE_NAME = "selected_tags.csv"
COLUMNS = ("tag_id", "name", "category", "count")
GENERAL, RATING = 0, 9  # Danbooru's categories of ordinary tags and of ratings; characters are 4
RATINGS = ("general", "sensitive", "questionable", "explicit")  # in the order of the WD taggers' outputs


def wd_outputs(label_names: Sequence[str]) -> list[str]:
    """The names of the outputs in the layout of the WD taggers: four ratings, then the labels that are none."""
    return [*RATINGS, *(name for name in label_names if name not in RATINGS)]


def write_selected_tags(
    path: Path,
    label_names: Sequence[str],
    counts: Mapping[str, int] | Sequence[int] | None = None,
    *,
    ratings: bool = False,
) -> None:
    """Writes one row per label, in the order of the model's outputs, which is how tools match rows to scores.

    Args:
        path: The file to write, or the folder to write `selected_tags.csv` into.
        label_names: In class order, written as they are (tools turn underscores into spaces themselves).
        counts: Training images that show each label, by name or in class order; labels without one, or all of them
            where this is None, get 0.
        ratings: Four rows of ratings in front, as `wd_outputs` says.

    Raises:
        ValueError: another number of counts than of labels.
    """
    if counts is None:
        counts = {}
    if not isinstance(counts, Mapping):
        if len(counts) != len(label_names):
            raise ValueError(f"There are {len(counts)} counts for {len(label_names)} labels; give one for each.")
        counts = dict(zip(label_names, counts, strict=True))
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for tag_id, name in enumerate(wd_outputs(label_names) if ratings else label_names):
            category = RATING if ratings and tag_id < len(RATINGS) else GENERAL
            writer.writerow([tag_id, name, category, int(counts.get(name, 0))])
