"""What every kind gives back, and the rows of a split on the way there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image

from ..data.load import load
from ..data.rows import ListedOnce, Split, refuse_or_skip
from ..options import option


@dataclass(kw_only=True)
class SourceOptions:
    """Of a data set in files of its own."""

    source: Path = option(reason="where it was unpacked to, see above", positional=True, metavar="SOURCE")
    missing_images: Literal["error", "skip"] = option("error", "listed but not there; skip leaves out, and says so")


@dataclass(kw_only=True)
class Reading:
    """A data set that was read.

    Attributes:
        splits: As `load` gives them, by the names that the source has for them.
        label_names: In class order.
        usual_names: What a split of the source is called in a Hugging Face dataset, for those to take by default.
        title: Of the data set that `published` is about.
        published: Images, and images that show a label (None: not published), by the source's name of the split.
    """

    splits: dict[str, Split]
    label_names: list[str]
    usual_names: dict[str, str]
    title: str = ""
    published: dict[str, tuple[int, int | None]] = field(default_factory=dict)


class Rows:
    """The rows of one split: each image once, and there.

    Args:
        missing_images: "error", or "skip" to leave rows without an image out, with a warning.
    """

    def __init__(self, missing_images: str):
        self.missing_images = missing_images
        self.images, self.labels, self.missing = [], [], []
        self._once = ListedOnce()

    def add(self, image: Path, labels: list[int] | np.ndarray, where: str) -> None:
        """One image with its label ids, or multi-hot labels; `where` names its file and line.

        Raises:
            ValueError: the image has a row already.
        """
        self._once.add(str(image), where, where)
        if image.is_file():
            self.images.append(str(image))
            self.labels.append(labels)
        else:
            self.missing.append(("", f"{where}: {image}"))

    def dataset(self, kind: pa.DataType) -> Dataset:
        """Columns `image` and `labels`, lists of `kind`.

        Raises:
            ValueError: images that do not exist, or none at all.
        """
        refuse_or_skip(
            "missing_image",
            self.missing,
            self.missing_images,
            "The lists",
            "name",
            "that are not there; add them, or pass --missing_images skip.",
        )
        if not self.images:
            raise ValueError("A list of images is empty; take that split out with --split, or add some.")
        images = Dataset.from_dict({"image": self.images}, features=Features({"image": Image(decode=False)}))
        return images.add_column("labels", pa.array(self.labels, pa.list_(kind)))


def checked(splits: dict[str, Dataset], label_names: list[str], label_format: str) -> dict[str, Split]:
    """The splits as `load` gives them, held against the label contract."""
    # Under names of their own: `load` would rename "val".
    parts = DatasetDict({f"part{number}": split for number, split in enumerate(splits.values())})
    loaded = load(parts, label_names=label_names, label_format=label_format)
    return dict(zip(splits, loaded.splits.values(), strict=True))


def text_lines(path: Path) -> list[str]:
    """The lines of a list, without blanks at their ends and without empty lines at the end of the file.

    Raises:
        FileNotFoundError, ValueError: no such file, or no UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder that the data set was unpacked to.")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); unpack it again.") from error


def first_folder(*folders: Path) -> Path:
    """The first that exists; the last where none does."""
    return next((folder for folder in folders if folder.is_dir()), folders[-1])
