"""The shards of a streaming dataset, parquet or WebDataset, on disk or on the Hub: nothing of it is copied."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from datasets import DatasetBuilder, Features, Image, List, Value, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..options import DatasetOptions
from .built_in import BUILT_IN
from .label_column import label_field
from .label_name_files import given_names, read_label_names
from .parquet import common_feature, count_rows, read_features, read_rows
from .rows import SPLIT_ALIASES, no_such_split
from .webdataset import (
    SHARD_SUFFIXES,
    check_ends,
    image_suffix,
    read_samples,
    sample_columns,
    sample_labels,
    sample_numbers,
    split_of,
)

_NO_HUB_ID = re.compile(r"^[./~]|/.*/|[*?{\[]|\.(tar|tar\.gz|tgz|parquet)$")
_OTHERWISE_COMPRESSED = re.compile(r"\.(tar\.(zst|xz|bz2|lz4|lzma|br|Z)|t[bx]z2?|tzst)$", re.I)
ROW_BITS = 40  # of a number for a row: its shard stands above them


class Row(NamedTuple):
    """A row as it is stored."""

    shard: int
    row: int  # within the shard
    values: dict  # by column

    @property
    def index(self) -> int:
        return self.shard << ROW_BITS | self.row


@dataclass
class Shards:
    """The shards of one split.

    Attributes:
        files: In the order of their names; files or addresses.
        features: Of their rows, images not decoded.
        rows_of: The rows of a file from a row on.
        image_column, label_column, label_columns: Of the rows.
        held_out: How many rows at the beginning of a shard, by its number, belong to validation.
    """

    files: list[str]
    features: Features
    rows_of: Callable[[str, int], Iterator[dict]]
    image_column: str
    label_column: str
    label_columns: list[str] | None
    held_out: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def short_names(self, source: str) -> list[str]:
        """Of the files: their paths in a folder `source` or a repository, which do not change where it is moved."""
        root = os.path.join(source if os.path.isdir(source) else os.path.dirname(source), "")
        return [re.sub(r"^\w+://[^@]*@[^/]+/", "", file).removeprefix(root) for file in self.files]

    def name(self, index: int) -> str:
        """Words for the row with this `Row.index`."""
        return f"{self.files[index >> ROW_BITS]}, row {index & ((1 << ROW_BITS) - 1)}"

    def read(self, shard: int, row: int = 0) -> Iterator[Row]:
        """The rows of a shard, from `row` on.

        Raises:
            ValueError: (while it is read) what is wrong with the file, with its name.
        """
        file, first = self.files[shard], row
        try:
            for values in self.rows_of(file, row):
                yield Row(shard, row, values)
                row += 1
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            at = f" after row {row}" if row > first else ""
            raise ValueError(
                f"{file} cannot be read{at} ({type(error).__name__}: {reason}): fetch or write it again."
            ) from error

    def count(self) -> int | None:
        """Rows that are not held out; None where only reading it all would tell."""
        counts = self.counts()
        if counts is None:
            return None
        return sum(max(0, count - self.held_out.get(shard, 0)) for shard, count in enumerate(counts))

    def counts(self) -> list[int] | None:
        """Rows of each shard; None where only reading it all would tell."""
        if not self.files[0].endswith(".parquet"):
            return None
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(count_rows, self.files))

    def fingerprint(self, count: int | None = None) -> str:
        """A short mark: names of the files (of the first `count`) with their sizes and times, or their addresses with
        the commit on the Hub, and what is held out."""
        digest = hashlib.sha256(repr(sorted(self.held_out.items())).encode())
        for file in self.files[:count]:
            facts: Any = file
            if "://" not in file:
                stat = os.stat(file)
                facts = (os.path.basename(file), stat.st_size, stat.st_mtime_ns)
            digest.update(repr(facts).encode())
        return digest.hexdigest()[:16]


def open_shards(
    options: DatasetOptions, only: Literal["labels", "images"] | None = None
) -> tuple[dict[str, Shards], list[str] | None]:
    """The shards of every split, under its usual name, and the vocabulary that is given or beside them (`labels.txt`).

    Args:
        options: How to read it.
        only: What of the rows is needed; None: both.

    Raises:
        ValueError, FileNotFoundError: neither parquet nor WebDataset shards, or no such dataset.
    """
    source = str(options.dataset)
    path, names = Path(source), given_names(options.label_names)
    if source in BUILT_IN:
        raise ValueError(f"{source} are drawn, and no stream: leave out streaming, or name a dataset of shards.")
    if path.exists():
        files = _local_files(path)
        beside = (path if path.is_dir() else path.parent) / "labels.txt"
        names = names or (read_label_names(beside) if beside.is_file() else None)
    elif _NO_HUB_ID.search(source):
        raise FileNotFoundError(
            f"{source} does not exist; give a folder of shards (no pattern), or the id of a dataset on the Hub."
        )
    else:
        files = _hub_files(options)
        names = names or _hub_names(options)
    if next(iter(files.values()))[0].endswith(".parquet"):
        shards = _parquet(files, options, only)
    else:
        shards = {split: _webdataset(of_split, options, names, only) for split, of_split in files.items()}
    return {SPLIT_ALIASES.get(split, split): of_split for split, of_split in shards.items()}, names


def wanted(shards: dict[str, Shards], name: str, source: str) -> Shards:
    """
    Raises:
        ValueError: no such split.
    """
    if name not in shards:
        raise no_such_split(name, shards, source)
    return shards[name]


def _local_files(path: Path) -> dict[str, list[str]]:
    """The shards by split, `train` where no file or folder is called like one."""
    suffixes = (".parquet", *SHARD_SUFFIXES)
    found = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if not _is_hidden(file, path)]
    found = [file for file in found if file.is_file()]
    for file in found:
        if _OTHERWISE_COMPRESSED.search(file.name):
            raise ValueError(f"{file} is compressed in a way that is not read here: unpack it, or write it as .tar.gz.")
    found = [file for file in found if file.name.endswith(suffixes)]
    if are_tables_of_shards([file for file in found if file.suffix == ".parquet"]):
        found = [file for file in found if file.suffix != ".parquet"]
    kinds = {file.suffix == ".parquet" for file in found}
    if len(kinds) != 1:
        what = "parquet files and .tar shards: give the folder of one kind" if kinds else "neither .parquet nor .tar"
        raise ValueError(
            f"{path} holds {what}; --streaming reads parquet and WebDataset shards"
            + ("." if kinds else ", and all else is read as it is without it.")
        )
    files: dict[str, list[str]] = {}
    for file in found:
        if file.suffix != ".parquet":
            check_ends(file)
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        files.setdefault(split_of(name) or "train", []).append(str(file))
    return files


def are_tables_of_shards(tables: Sequence[Path]) -> bool:
    """Whether parquet files say where the images of the .tar beside each came from, as img2dataset writes them."""
    return bool(tables) and all(table.with_suffix(".tar").is_file() for table in tables)


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _hub_files(options: DatasetOptions) -> dict[str, list[str]]:
    found = _builder(options).config.data_files or {}
    files = {str(split): list(map(str, of_split)) for split, of_split in found.items()}
    if {file.endswith((".parquet", *SHARD_SUFFIXES)) for of_split in files.values() for file in of_split} != {True}:
        raise ValueError(
            f"{options.dataset} does not consist of parquet files or .tar shards, which are what --streaming reads: "
            "leave it out."
        )
    return files


def _builder(options: DatasetOptions, **config) -> DatasetBuilder:
    """Of a dataset on the Hub."""
    where = {"name": options.dataset_config, "revision": options.dataset_revision}
    try:
        return load_dataset_builder(str(options.dataset), **where, **config)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{options.dataset} is neither a folder here nor a dataset within reach: {error}"
        ) from error


def _hub_names(options: DatasetOptions) -> list[str] | None:
    try:
        where = {"repo_type": "dataset", "revision": options.dataset_revision}
        return read_label_names(Path(hf_hub_download(str(options.dataset), "labels.txt", **where)))
    except EntryNotFoundError:
        return None


def _parquet(files: dict[str, list[str]], options: DatasetOptions, only: str | None) -> dict[str, Shards]:
    """
    Raises:
        ValueError: a file that is damaged, lacks a column, or has it written in another way than the others.
    """
    every = [file for of_split in files.values() for file in of_split]
    if is_here := "://" not in every[0]:
        schemas = {file: read_features(file) for file in every}
    else:  # one a split, for each has to be fetched; those on the Hub are written together
        schemas = {of_split[0]: read_features(of_split[0]) for of_split in files.values()}
    label_column, label_columns = options.label_column, options.label_columns
    if label_column == "labels" and not label_columns:
        label_column = label_field(schemas[every[0]]) or label_column
    columns = [] if only == "labels" else [options.image_column]
    columns += [] if only == "images" else label_columns or [label_column]
    there = schemas[every[0]]
    columns = list(dict.fromkeys(name if name in there else name.partition(".")[0] for name in columns))
    features = Features({column: common_feature(column, schemas) for column in columns})
    if not is_here:  # names of labels may be in its card alone
        features |= {name: each for name, each in (_builder(options).info.features or {}).items() if name in features}
    image_column = None if only == "labels" else options.image_column
    if image_column is not None:
        features[image_column] = Image(decode=False)
    read = partial(read_rows, columns=columns, image_column=image_column)
    return {
        split: Shards(of_split, features, read, options.image_column, label_column, label_columns)
        for split, of_split in files.items()
    }


def _webdataset(files: list[str], options: DatasetOptions, names: Sequence[str] | None, only: str | None) -> Shards:
    labels = Features({"labels": List(Value("float32" if options.label_format == "multi_hot" else "string"))})
    if options.label_columns:
        labels = Features({name: Value("float32") for name in options.label_columns})
    labels = Features() if only == "images" else labels
    read = partial(
        samples,
        label_column=None if options.label_column == "labels" else options.label_column,
        label_columns=tuple(options.label_columns or ()),
        label_separator=options.label_separator,
        label_format=options.label_format,
        image=None if options.image_column == "image" else options.image_column,
        names=None if names is None else tuple(names),
        only=only,
    )
    features = Features({"image": Image(decode=False), **labels})
    return Shards(files, features, read, "image", "labels", options.label_columns)


def samples(
    file: str,
    row: int,
    *,
    label_column: str | None,
    label_columns: Sequence[str],
    label_separator: str,
    label_format: str,
    image: str | None,
    names: Sequence[str] | None,
    only: str | None,
) -> Iterator[dict]:
    """The samples of a WebDataset shard from `row` on, as rows `image`, `labels` (or `label_columns`); `image` is the
    suffix to take of several."""
    shard = file.rpartition("/")[2]
    for key, parts in read_samples(file, row, images=only != "labels"):
        where = f"{file}, {key}"
        suffix = image_suffix(parts, where, image)
        if only == "images":
            labels = {}
        elif label_columns:
            labels = sample_columns(parts, label_columns, where)
        elif label_format == "multi_hot":
            labels = {"labels": sample_numbers(parts, label_column, where)}
        else:
            labels = {"labels": sample_labels(parts, label_column, label_separator, names, where, label_format)}
        # Without an image too, for the name of the row.
        name = f"{shard}/{key}{suffix or ''}".encode(errors="surrogateescape").decode(errors="backslashreplace")
        stored = {"bytes": None if suffix is None else parts[suffix], "path": name}
        yield {"image": stored, **labels}
