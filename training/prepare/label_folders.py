"""A folder for each label, with or without a folder for each split above them: cat/1.jpg, train/cat/1.jpg. The same
image (equal bytes, or a link) in several folders has all their labels. SOURCE: the folder above."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from pathlib import Path

from ..data.image_files import find_images
from ..data.rows import SPLIT_NAMES
from .reading import Reading, Rows, SourceOptions

Options = SourceOptions


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the file."""
    root = args.source
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give one with a folder for each label.")
    names = find_images(root).names
    if not names:
        raise FileNotFoundError(f"{root} holds no images; give a folder with a folder for each label.")
    sizes = {name: (root / name).stat().st_size for name in names}
    of_size = Counter(sizes.values())
    images: dict[tuple[str, str], tuple[str, list[str]]] = {}  # by split and content: the first file, the labels
    divided = any(name.count("/") == 2 and name.partition("/")[0].lower() in SPLIT_NAMES for name in names)
    for name in names:
        parts = name.split("/")
        split = parts.pop(0) if divided and parts[0].lower() in SPLIT_NAMES else ""
        if len(parts) != 2:
            what = "in no folder of a label" if len(parts) < 2 else f"in {len(parts) - 1} folders"
            raise ValueError(f"{root / name} is {what}; put every image into the folder of its label.")
        content = _digest(root / name) if of_size[sizes[name]] > 1 else name
        _, labels = images.setdefault((split, content), (name, []))
        labels.append(parts[0])
    rows = Rows(None, args)
    for (split, _), (name, labels) in images.items():
        rows.add(split, root / name, labels, str(root / name), name=name)
    return rows.reading()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
