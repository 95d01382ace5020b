"""Any multi-label image dataset as one object: splits of undecoded images with sparse labels, which were checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from modeling_hsvlt.label_names import check_label_names

from ..options import DatasetOptions
from .built_in import BUILT_IN
from .csv_table import find_csv_tables, read_csv_tables
from .formats import command_for
from .image_folder import read_image_folders
from .label_column import LabelColumn, label_field
from .label_name_files import given_names, read_label_names
from .leave_out import read_exclusions
from .rows import (
    SPLIT_ALIASES,
    Loaded,
    Split,
    Table,
    name_by_number,
    no_such_split,
    only_images,
    refuse_paths_elsewhere,
    without_missing,
)
from .sparse_labels import SparseLabels
from .stream_parts import load_streamed
from .vocabulary import names_of_splits, names_outside, warn_without_positive

logger = logging.getLogger(__name__)


def load(
    source: str | Path | Dataset | DatasetDict | Table,
    *,
    splits: Sequence[str] | None = None,
    cache_dir: str | None = None,
    fresh_scenes: bool = False,
    report_labels: bool = False,
    **options,
) -> Loaded:
    """Loads a multi-label image dataset and checks every label against the label contract.

    Args:
        source: One of
            - a dataset id on the Hub (pin its `dataset_revision`);
            - a folder with `<split>/metadata.jsonl` (`imagefolder`: rows with `file_name` and `labels`; a `labels.txt`
              beside the splits gives the class order, one name a line);
            - a CSV file, or a folder of `<split>.csv` or `<split>/metadata.csv`, see `csv_table.read_csv_tables`;
            - a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote;
            - a folder of parquet (or another format that `datasets.load_dataset` reads);
            - "scenes", the built-in scenes, with the settings `scenes`, see `scenes.read_scenes`;
            - a `Dataset` (taken as "train") or `DatasetDict`, or the `Table` of a reader.
        splits: The splits to return, all of which must exist and have rows; None: all there are. Usual other names
            (`val`, `dev`, `testing`, ...) are known.
        fresh_scenes: Whether the train split of the scenes is drawn anew every epoch.
        report_labels: Whether names that are not in the vocabulary, or look misspelled, become labels with a note
            (`Loaded.label_notes`) in place of an error.
        options: Fields of `training.options.DatasetOptions`, with its defaults. `label_names` is the vocabulary in
            class order (a checkpoint's, say) or a file of it; by default that of `labels.txt`, else of the column's
            `ClassLabel`, else `label_columns`, else the sorted names that occur in any split. `label_format`:
            see `SparseLabels.from_arrow`; for text, what is between the separators ("auto": names).

    Returns:
        The data set. A `null` list, or a `null`, NaN or -100 in a multi-hot list, means unknown.

    Raises:
        ValueError, FileNotFoundError: one sentence that names the file, row and label and says what to do.
    """
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise ValueError(
            "A streaming data set has no rows to count and check: load it without streaming=True, name it with the "
            "option streaming, or give its splits to training.data.streaming.StreamingMultiLabelDataset."
        )
    options = DatasetOptions(dataset=source, **options)
    if options.streaming:
        return load_streamed(options, splits or ["train"])
    label_names, revision = given_names(options.label_names), options.dataset_revision
    source_words = source if isinstance(source, str | Path) else "the dataset"
    if str(source_words) in BUILT_IN:
        read = BUILT_IN[str(source_words)].read
        table = read(splits, options.scenes, label_names=label_names, fresh=fresh_scenes)
    else:
        table = source if isinstance(source, Table) else _read(source, options, cache_dir)
    if options.label_column == "labels" and not table.label_columns:
        columns = next((split.features for split in table.splits.values()), {})
        table.label_column = label_field(columns) or table.label_column
    splits = list(splits or table.splits)
    to_read = [name for name in splits if name not in table.ready]
    _check_splits(table, to_read, source_words)

    images = {}
    for name in table.splits:
        if table.image_column not in table.splits[name].column_names:
            continue
        images[name] = only_images(table.splits[name], table.image_column)
        if name not in table.row_names:
            if name in to_read and isinstance(source, str | Path):
                refuse_paths_elsewhere(images[name], source)
                kept, left_out = without_missing(images[name], name, options.missing_images, str(source))
                table.left_out += left_out
                if kept is not None:
                    images[name], table.splits[name] = images[name].select(kept), table.splits[name].select(kept)
            table.row_names[name] = partial(name_by_number, images[name], f"split {name!r}, ")

    column = LabelColumn(table, options, label_names or table.label_names)
    label_names, notes = column.known or column.class_names(), []
    if not label_names and column.of_names():
        label_names, notes = names_of_splits(column.of_names(), table.row_names, report=report_labels)
    label_names = label_names or _names_of_the_hub(table, column, source_words, revision)
    check_label_names(label_names)
    if report_labels:
        notes += (outside := names_outside(column.of_names(), label_names, table.row_names))
        label_names = [*label_names, *(note.label for note in outside)]
    ready = dict(table.ready)
    for name in to_read:
        labels = SparseLabels.from_arrow(
            column.lists(name),
            label_names,
            class_names=column.own_names(name),
            label_format="multi_hot" if table.label_columns else options.label_format,
            where=table.row_names[name],
            uncertain=options.uncertain,
            blank=options.blank,
        )
        ready[name] = Split(images[name], labels, table.row_names[name], table.drawn)
        _warn_of_unknown(ready[name])
    if "train" in to_read:
        warn_without_positive(ready["train"].labels, label_names, notes)
    loaded = Loaded({name: ready[name] for name in splits}, label_names, table.left_out, notes)
    if options.exclude is not None:
        for name, reasons in read_exclusions(options.exclude, {name: ready[name] for name in to_read}).items():
            loaded.leave_out("excluded", name, reasons)
    return loaded


def load_images(source: str, split: str | None = None, **options) -> Dataset:
    """The images of one split as the column `image`, not decoded; labels are not looked at, and need not be there.

    Args:
        source: As for `load`.
        split: None: the only one.
        options: Fields of `training.options.DatasetOptions`.

    Raises:
        ValueError, FileNotFoundError: one sentence that names the split or column and says what to do.
    """
    options = DatasetOptions(dataset=source, **options)
    table = BUILT_IN[source].read(None, options.scenes) if source in BUILT_IN else _read(source, options, None)
    if split is None and len(table.splits) > 1:
        raise ValueError(f"{source} has the splits {', '.join(table.splits)}; choose one with --split.")
    name = SPLIT_ALIASES.get(split, split) or next(iter(table.splits))
    _check_splits(table, [name], source, labels=False)
    images = only_images(table.splits[name], table.image_column)
    if name not in table.row_names:
        refuse_paths_elsewhere(images, source)
    return images


def _read(source: str | Path | Dataset | DatasetDict, options: DatasetOptions, cache_dir: str | None) -> Table:
    """The rows of a source by the reader of its format, under the usual names of splits."""
    path = None if isinstance(source, Dataset | DatasetDict) else Path(source)
    columns = {name: getattr(options, name) for name in ("image_column", "label_column", "label_columns")}
    policies = {name: getattr(options, name) for name in ("unlisted_images", "missing_images")}
    names_file, on_hub = None, False
    if path is None:
        loaded = source
    elif tables := find_csv_tables(path):
        if sentence := command_for(path):
            raise ValueError(f"{sentence}.")
        names_file = (path if path.is_dir() else path.parent) / "labels.txt"
        loaded = read_csv_tables(tables, **columns, image_folder=options.image_folder, **policies)
    elif path.is_dir():
        names_file = path / "labels.txt"
        if sentence := command_for(path):
            raise ValueError(f"{sentence}.")
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = _undamaged(load_from_disk, str(path))
        elif any(path.glob("metadata.jsonl")) or any(path.glob("*/metadata.jsonl")):
            loaded = read_image_folders(path, columns["label_column"], **policies)
            loaded.label_columns = columns["label_columns"]
        else:
            _check_parquet(path)
            loaded = _undamaged(load_dataset, str(path), name=options.dataset_config, cache_dir=cache_dir)
    elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(
            f"{source} does not exist or is no folder; give a folder, the id of a dataset on the Hub, or 'scenes'."
        )
    else:
        on_hub = True
        try:
            where = {"name": options.dataset_config, "revision": options.dataset_revision}
            loaded = load_dataset(str(source), **where, cache_dir=cache_dir)
        except (DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"{source} is neither a folder here nor a dataset within reach: {error}") from error
    if not isinstance(loaded, Table):
        loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        loaded = Table({SPLIT_ALIASES.get(name, name): split for name, split in loaded.items()}, **columns)
        loaded.on_hub = on_hub
    if names_file is not None and names_file.is_file():
        loaded.label_names = read_label_names(names_file)
    return loaded


def _undamaged(read: Callable, folder: str, **options) -> Dataset | DatasetDict:
    """
    Raises:
        ValueError: for what damaged files make `datasets` raise, which is nearly everything.
    """
    try:
        return read(folder, **options)
    except (ValueError, OSError):
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{folder} cannot be read ({type(error).__name__}: {reason}): write it again.") from error


def _check_splits(table: Table, splits: list[str], source: str | Path, *, labels: bool = True) -> None:
    """
    Raises:
        ValueError: a split that is not there or has no rows, or no column of images or labels.
    """
    for name in splits:
        if name not in table.splits:
            raise no_such_split(name, table.splits, source)
        split = table.splits[name]
        if len(split) == 0:
            raise ValueError(f"The split {name!r} of {source} has no rows; add some or leave the split out.")
        label_column = table.label_column if table.label_column in split.column_names else _root(table.label_column)
        for column in (table.image_column, *((table.label_columns or [label_column]) if labels else ())):
            if column not in split.column_names:
                raise ValueError(
                    f"The split {name!r} of {source} has no column {column!r}, only {', '.join(split.column_names)}; "
                    "name the right one with image_column, label_column or label_columns, or write a metadata.jsonl "
                    "with file_name and labels beside the images."
                )


def _check_parquet(folder: Path) -> None:
    """
    Raises:
        ValueError: a file that is no parquet, or not a whole one; `load_dataset` names none.
    """
    for path in sorted(folder.rglob("*.parquet")):
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole parquet file ({error}); fetch or write it again.") from error


def _names_of_the_hub(
    table: Table,
    column: LabelColumn,
    source: str | Path,
    revision: str | None,
) -> list[str]:
    """The vocabulary of a `labels.txt` beside the data on the Hub, for labels without names."""
    if table.on_hub:
        try:
            return read_label_names(
                Path(hf_hub_download(str(source), "labels.txt", repo_type="dataset", revision=revision))
            )
        except EntryNotFoundError:
            pass
    kind = column.lists(next(iter(table.splits))).type
    raise ValueError(
        f"The labels of {source} ({kind}) carry no names; give label_names, or write a labels.txt with one name a line "
        "in class order."
    )


def _root(column: str) -> str:
    """The column that holds a field such as `objects.category`."""
    return column.partition(".")[0]


def _warn_of_unknown(split: Split) -> None:
    unknown = split.labels.default != 0
    if unknown.any():
        logger.warning(
            "%d of %d rows have null for labels, so they teach nothing (first: %s); write [] where none is present.",
            unknown.sum(),
            len(split),
            split.row_name(int(np.argmax(unknown))),
        )
