"""`selected_tags.csv`, the list of labels that the WD taggers ship beside their weights and that photo tools read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

FILE_NAME = "selected_tags.csv"
COLUMNS = ("tag_id", "name", "category", "count")
GENERAL = 0  # Danbooru's category of ordinary tags; tools show ratings (9) and characters (4) apart


def write_selected_tags(
    path: Path, label_names: Sequence[str], counts: Mapping[str, int] | Sequence[int] | None = None
) -> None:
    """Writes one row per label, in the order of the model's outputs, which is how tools match rows to scores.

    Args:
        path: The file to write, or the folder to write `selected_tags.csv` into.
        label_names: In class order, written as they are (tools turn underscores into spaces themselves).
        counts: Training images that show each label, by name or in class order; labels without one, or all of them
            where this is None, get 0.

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
        for tag_id, name in enumerate(label_names):
            writer.writerow([tag_id, name, GENERAL, int(counts.get(name, 0))])
