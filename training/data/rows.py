"""Rows of a data set: what every reader checks of their images, how each is called, and what a split of them is."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE

from ..options import plain
from .sparse_labels import SparseLabels, arrow_column

logger = logging.getLogger(__name__)

# The folder names that Hugging Face datasets take for each split.
SPLIT_ALIASES = {"training": "train", **dict.fromkeys(("valid", "val", "dev"), "validation")}
SPLIT_ALIASES |= dict.fromkeys(("testing", "eval", "evaluation"), "test")
SPLIT_NAMES = frozenset(SPLIT_ALIASES) | frozenset(SPLIT_ALIASES.values())


class LeftOut(NamedTuple):
    """A row or an image that takes no part."""

    kind: str  # "missing_image", "unlisted_image", "excluded" or "unreadable"
    split: str  # "" where an image belongs to none
    row: str  # in words: its line, or its file
    message: str


@dataclass
class Split:
    """Images with their labels.

    Attributes:
        images: Column `image`, not decoded (`path`, `bytes`).
        labels: Of the same rows.
        row_name: Words for a row in a message: its table and line, or its number, and its file.
        drawn: Whether the images were drawn here, so that they need no check.
    """

    images: Dataset
    labels: SparseLabels
    row_name: Callable[[int], str] | None = None
    drawn: bool = False

    def __post_init__(self):
        # Objects that can be pickled, here and below: workers of a `DataLoader` may be spawned.
        self.row_name = self.row_name or partial(name_by_number, self.images, "")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        """`image` as it is stored, `labels` as a tensor of `SparseLabels.tensor`."""
        return {"image": self.images[row]["image"], "labels": self.labels.tensor(row)}

    def select(self, rows: Sequence[int]) -> Split:
        """These rows, which keep their names."""
        rows = np.asarray(rows, dtype=np.int64)
        row_name = partial(_name_of_selected, self.row_name, rows)
        return replace(self, images=self.images.select(rows), labels=self.labels.select(rows), row_name=row_name)


@dataclass
class Loaded:
    """A data set, as `load` gives it.

    Attributes:
        splits: By name; a `scenes.SceneSplit` where images are drawn anew every epoch.
        label_names: The vocabulary in class order.
        left_out: Rows and images that take no part, and why.
        label_notes: `vocabulary.LabelNote`s, what is odd about the names.
        validation_of_train: Whether validation is a part of train, which a stream of it leaves out.
    """

    splits: dict[str, Split]
    label_names: list[str]
    left_out: list[LeftOut] = field(default_factory=list)
    label_notes: list = field(default_factory=list)
    validation_of_train: bool = False

    def leave_out(self, kind: str, split: str, reasons: dict[int, str]) -> None:
        """Takes rows out of a split, each for a reason."""
        rows = self.splits[split]
        self.left_out += [LeftOut(kind, split, rows.row_name(row), reason) for row, reason in reasons.items()]
        if reasons:
            self.splits[split] = rows.select([row for row in range(len(rows)) if row not in reasons])


@dataclass
class Table:
    """What a reader of one format gives: rows whose labels are still as they were written.

    Attributes:
        splits: Columns of images and labels.
        row_names: Of each split, see `Split.row_name`.
        image_column, label_column, label_columns: Those to read; `label_columns` (one a label) goes first.
        label_names: The vocabulary in class order, where the format has a place for it.
        left_out: What the reader left out.
        ready: Splits that need no reading, by name.
        on_hub: Whether a `labels.txt` may be beside the data on the Hub.
        drawn: See `Split.drawn`.
    """

    splits: dict[str, Dataset]
    row_names: dict[str, Callable[[int], str]] = field(default_factory=dict)
    image_column: str = "image"
    label_column: str = "labels"
    label_columns: list[str] | None = None
    label_names: list[str] | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    ready: dict = field(default_factory=dict)
    on_hub: bool = False
    drawn: bool = False


def list_once(first: dict[str, str], image: str, where: str, line: str) -> None:
    """Refuses the second row of an image.

    Args:
        first: What the rows before are called, by image; takes this one in.
        where: Names the row, in full.
        line: What the row is called in the message about the next one.

    Raises:
        ValueError: the image has a row already.
    """
    if image in first:
        raise ValueError(f"{where}: {image!r} has a row already on {first[image]}; keep one of them.")
    first[image] = line


def splits_by_folder(names: Sequence[str], where: Callable[[int], str]) -> list[str] | None:
    """The split of each name such as `train/1.jpg` or `images/test/2.jpg`; None where no folder is called like one.

    Args:
        where: Words for the place of a name.

    Raises:
        ValueError: some names have a folder of a split and some have none at that depth.
    """
    folders = [name.lower().split("/")[:-1] for name in names]
    depths = {next((depth for depth, part in enumerate(parts) if part in SPLIT_NAMES), None) for parts in folders}
    if depths == {None} or not names:
        return None
    if len(depths) > 1:
        depth = next(depth for depth in depths if depth is not None)
        inside = [len(parts) > depth and parts[depth] in SPLIT_NAMES for parts in folders]
        one, other = inside.index(True), inside.index(False)
        raise ValueError(
            f"{where(other)} names {names[other]!r}, which is in no split, but {names[one]!r} is in one by its folder; "
            "say the split of every row in a column 'split', or put all images into folders of splits."
        )
    (depth,) = depths
    return [SPLIT_ALIASES.get(parts[depth], parts[depth]) for parts in folders]


def no_such_split(name: str, there: Iterable[str], source: str | Path) -> ValueError:
    remedy = f"add it, divide what is there with hsvlt split {source} TARGET --fractions 0.8 0.1 0.1, or choose another"
    return ValueError(f"{source} has no split {name!r}, only {', '.join(there)}; {remedy}.")


def check_policies(unlisted_images: str, missing_images: str) -> None:
    """Raises a ValueError for what is neither "error" nor "skip"."""
    for name, policy in (("unlisted_images", unlisted_images), ("missing_images", missing_images)):
        if policy not in ("error", "skip"):
            raise ValueError(f"{name}={policy!r} must be 'error' or 'skip'.")


def refuse_or_skip(
    kind: str, rows: Sequence[tuple[str, str]], policy: str, where: str, says: str, remedy: str
) -> list[LeftOut]:
    """What a policy makes of (split, row) pairs: nothing is left out where there are none.

    Raises:
        ValueError: the policy is "error", and there are some. `where` `says` so many images, `remedy`.
    """
    if not rows:
        return []
    names = [plain(row) for _, row in rows[:5]]
    count = f"{len(rows)} image{'s' if len(rows) > 1 else ''}"
    message = f"{where} {says} {count} ({', '.join(names)}{', ...' if len(rows) > 5 else ''}) {remedy}"
    if policy == "error":
        raise ValueError(message)
    logger.warning("Left out: %s", message)
    return [LeftOut(kind, split, row, f"{where}: {row}") for split, row in rows]


def rows_without_image(rows: Sequence[tuple[str, str]], policy: str, table: Path, folder: Path) -> list[LeftOut]:
    """`refuse_or_skip` of the rows of a table whose images `folder` does not hold."""
    remedy = f"that {folder} does not hold; add the images, take the rows out, or pass missing_images='skip'."
    return refuse_or_skip("missing_image", rows, policy, str(table), "names", remedy)


def images_without_row(names: Iterable[str], split: str, policy: str, folder: Path, table: str) -> list[LeftOut]:
    """`refuse_or_skip` of the images in `folder` that no row names."""
    remedy = f"without a row in {table}; add rows, take the images out, or pass unlisted_images='skip'."
    return refuse_or_skip("unlisted_image", [(split, name) for name in names], policy, str(folder), "holds", remedy)


def without_missing(images: Dataset, split: str, policy: str, source: str) -> tuple[np.ndarray | None, list[LeftOut]]:
    """The rows that hold an image, or the path of one that is there (None: all of them), and the others.

    Raises:
        ValueError: the policy is "error", and some do not.
    """
    check_policies("error", policy)
    missing, begin = [], 0
    for chunk in arrow_column(images, "image").chunks:
        without_bytes = pc.is_null(pc.struct_field(chunk, "bytes")).to_numpy(zero_copy_only=False)
        for place in np.flatnonzero(without_bytes):
            path = (chunk[place].as_py() or {}).get("path")
            if path is None or not ("://" in path or Path(path).is_file()):
                missing.append(begin + int(place))
        begin += len(chunk)
    left_out = refuse_or_skip(
        "missing_image",
        [(split, f"row {row}") for row in missing],
        policy,
        f"The split {split!r} of {source}",
        "has",
        "that are not there; add them, take the rows out, or pass missing_images='skip'.",
    )
    return np.delete(np.arange(len(images)), missing) if missing else None, left_out


def refuse_paths_elsewhere(images: Dataset, source: str | Path) -> None:
    """Rows of a table that somebody else wrote hold their images, or name files of the data set itself.

    Raises:
        ValueError: a row without bytes whose path leads out of `source` and of the caches of `datasets`.
    """
    roots = [os.path.realpath(root) for root in (source, HF_DATASETS_CACHE, HF_HUB_CACHE)]
    for row, (path, length, _) in enumerate(_stored_images(images)):
        if length is None and path is not None and "://" not in path:
            real = os.path.realpath(path)
            if not any(real.startswith(f"{root}{os.sep}") for root in roots):
                raise ValueError(
                    f"Row {row} of {source} names the file {path!r}, which is not in it: store the images' bytes."
                )


def fingerprint_images(images: Dataset, *, every_byte: bool = False) -> str:
    """A short mark of images in their order: of files their name, size and time, of stored images their length and last
    64 bytes; with `every_byte` all that is in them."""
    digest = hashlib.sha256()
    for number, (path, length, end) in enumerate(_stored_images(images)):
        name, known = os.path.basename(path or ""), (length, end)
        if every_byte and length is not None:
            known = hashlib.sha256(images[number]["image"]["bytes"]).digest()
        elif length is None and path and os.path.isfile(path):
            facts = os.stat(path)
            known = (facts.st_size, facts.st_mtime_ns)
            if every_byte:
                with open(path, "rb") as file:
                    known = hashlib.file_digest(file, "sha256").digest()
        digest.update(repr((name, known)).encode())
    return digest.hexdigest()[:16]


def _stored_images(images: Dataset) -> Iterator[tuple[str | None, int | None, bytes | None]]:
    """Path, length and last 64 bytes of each image, of which no more is read."""
    for chunk in arrow_column(images, "image").chunks:
        data, paths = pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")
        columns = (paths, pc.binary_length(data), pc.binary_slice(data, -64))
        yield from zip(*(column.to_pylist() for column in columns), strict=True)


def name_by_number(images: Dataset, prefix: str, row: int) -> str:
    """Names a row by its number, and its image's file if it has one."""
    path = (images[row]["image"] or {}).get("path")
    return f"{prefix}row {row}" + (f" ({path})" if path else "")


def name_by_line(table: Path, lines: Sequence[int], names: Sequence[str], row: int) -> str:
    """Names a row by its line in a table, and its image."""
    return f"{table}, line {lines[row]} ({names[row]})"


def _name_of_selected(row_name: Callable[[int], str], rows: np.ndarray, row: int) -> str:
    return row_name(int(rows[row]))


def only_images(split: Dataset, column: str) -> Dataset:
    """The images of a split, not decoded, as the one column `image`."""
    images = split.select_columns([column]).cast_column(column, Image(decode=False))
    return images if column == "image" else images.rename_column(column, "image")
