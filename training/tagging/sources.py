"""Where `training.tag` takes its images from: a folder tree, a list of files, or a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ..data.image_files import find_images
from ..data.load import load_images
from ..data.rows import fingerprint_images

# What makes a folder a data set and not a tree of images.
DATASET_FILES = ("dataset_dict.json", "state.json", "*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")


class FileSource:
    """Image files, known by their names relative to `root` (or absolute ones of a list)."""

    key_name = "file_name"

    def __init__(self, root: Path, names: Sequence[str]):
        """
        Raises:
            ValueError: a name that is no UTF-8, which no file of results could hold.
        """
        odd = next((name for name in names if name != name.encode(errors="ignore").decode()), None)
        if odd is not None:
            raise ValueError(f"{str(root)!r} holds the file {odd!r}, whose name is no UTF-8; rename it.")
        self.root, self.keys = root, names

    def image(self, key: str) -> Path:
        return self.root / key

    def fingerprint(self, count: int) -> str | None:
        return None  # each image is known by its name

    path = image


class DatasetSource:
    """The rows of a data set, known by their numbers."""

    key_name = "row"

    def __init__(self, rows: Dataset):
        self.rows, self.keys = rows, range(len(rows))

    def image(self, key: int) -> dict | None:
        return self.rows[key]["image"]

    def fingerprint(self, count: int) -> str | None:
        """Of the first rows: what a number stands for."""
        return fingerprint_images(self.rows.select(range(min(count, len(self.rows)))))


def open_source(source: str, *, split: str | None = None, **options) -> FileSource | DatasetSource:
    """The images of a folder (with the folders in it), of a text file that names one a line, or of a data set.

    A folder that `datasets` wrote, or of parquet files, is a data set; so is what is no path, an id on the Hub. In a
    list, relative names start where the list is, and what follows a tab is left out, so that the `unreadable.txt` of
    another run is a list. `split` and `options`: as of `training.data.load.load_images`.

    Raises:
        FileNotFoundError, ValueError: in one sentence, what is wrong and what to do.
    """
    path = Path(source)
    if path.is_file():
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        written = (name for line in lines if (name := line.partition("\t")[0].strip()))
        names = list(dict.fromkeys(_one_spelling(name, path.parent) for name in written))
        if not names:
            raise ValueError(f"{path} names no image; write one path a line.")
        return FileSource(path.parent, names)
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in DATASET_FILES):
        names = find_images(path).names
        if not names:
            raise ValueError(f"{path} holds no images; give another folder, a list, or a data set.")
        return FileSource(path, names)
    return DatasetSource(load_images(source, split, **options))


def _one_spelling(name: str, root: Path) -> str:
    """Of all ways to write a path, one: `./a.jpg`, `b/../a.jpg` and `/root/a.jpg` are `a.jpg`."""
    return os.path.normpath(name).removeprefix(os.path.join(os.path.abspath(root), ""))
