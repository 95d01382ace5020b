"""What every reader of a data set checks and says of its rows: is the picture there, is it listed, how is it called."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

logger = logging.getLogger(__name__)

# The folder names that Hugging Face datasets take for each split.
SPLIT_ALIASES = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_PICTURE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)


def pictures_below(folder: Path) -> set[str]:
    """Relative names of all picture files in a folder and its folders; hidden ones are none."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _PICTURE_SUFFIXES and not path.name.startswith((".", "__"))
    }


def check_policies(unlisted_pictures: str, missing_pictures: str) -> None:
    """Raises a ValueError for what is neither "error" nor "skip"."""
    for name, policy in (("unlisted_pictures", unlisted_pictures), ("missing_pictures", missing_pictures)):
        if policy not in ("error", "skip"):
            raise ValueError(f"{name}={policy!r} must be 'error' or 'skip'.")


def refuse_or_skip(names: list[str], policy: str, before: str, after: str) -> None:
    """Raises a ValueError that counts and names pictures (`before` and `after` stand around them), or logs a warning
    for the policy "skip"."""
    if names:
        count = f"{len(names)} picture{'s' if len(names) > 1 else ''}"
        message = f"{before} {count} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}) {after}"
        if policy == "error":
            raise ValueError(message)
        # The names in full, for whoever listens (training.check_data does).
        place = before.rpartition(" ")[0]
        logger.warning("Left out: %s", message, extra={"left_out": [f"{place}: {name}" for name in names]})


def row_namer(images: Dataset, prefix: str = "") -> Callable[[int], str]:
    """A function that gives the words for a row in an error: its number, and its picture's file name if it has one."""

    def words(row: int) -> str:
        path = (images[row]["image"] or {}).get("path")
        return f"{prefix}row {row}" + (f" ({path})" if path else "")

    return words
