"""Any multi-label image dataset as splits of one form: pictures not yet decoded, labels checked."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..options import DatasetOptions
from .csv_table import find_csv_tables, read_csv_tables
from .image_folder import read_image_folders
from .label_names import read_label_names
from .leave_out import without_excluded
from .rows import SPLIT_ALIASES, check_policies, refuse_or_skip, row_namer
from .scenes import DEFAULT_NUM_SCENES, SCENE_LABELS, build_scenes
from .sparse_labels import SparseLabels, arrow_column, class_names, split_text, stack_columns

logger = logging.getLogger(__name__)


def load_multilabel_dataset(
    source: str | Path | Dataset | DatasetDict,
    *,
    splits: Sequence[str] | None = None,
    cache_dir: str | None = None,
    **options,
) -> tuple[DatasetDict, list[str]]:
    """Loads a multi-label image dataset and checks every label against the label contract.

    Args:
        source: One of
            - a dataset id on the Hub (pin its `dataset_revision`);
            - a folder with `<split>/metadata.jsonl` (`imagefolder`: rows with `file_name` and `labels`; a `labels.txt`
              beside the splits gives the class order, one name a line);
            - a CSV file, or a folder of `<split>.csv` or `<split>/metadata.csv`, see `csv_table.read_csv_tables`;
            - a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote;
            - a folder of parquet (or another format that `datasets.load_dataset` reads);
            - "scenes", the built-in scenes, drawn by `training.data.scenes.build_scenes(**scenes)`;
            - a `Dataset` (taken as "train") or `DatasetDict`.
        splits: The splits to return, all of which must exist and have rows; None: all there are. Usual other names
            (`val`, `dev`, `testing`, ...) are known.
        options: Fields of `training.options.DatasetOptions`, with its defaults. `label_names` is the vocabulary in
            class order, for example a checkpoint's; by default that of `labels.txt`, else of the column's `ClassLabel`,
            else `label_columns`, else the sorted names that occur in the train split. `label_format`: see
            `SparseLabels.from_arrow`; for text, what is between the separators ("auto": names).

    Returns:
        The splits and the label names. Rows hold `image` (`datasets.Image(decode=False)`: `path`, `bytes`) and
        `labels`: lists of class ids (`ClassLabel` with the label names in order), or, where single labels are soft or
        unknown, lists of one float32 a label. A `null` list, or a `null`, NaN or -100 in a multi-hot list, means
        unknown.

    Raises:
        ValueError, FileNotFoundError: one sentence that names the file, row and label and says what to do.
    """
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise ValueError(
            "A streaming data set has no rows to count and check: load it without streaming=True, or give its splits "
            "to training.data.streaming.StreamingMultiLabelDataset."
        )
    options = DatasetOptions(dataset=source, **options)
    revision = options.dataset_revision
    label_names, label_columns = options.label_names, options.label_columns
    image_column, label_column = options.image_column, options.label_column
    names_of_file, row_words, on_hub = None, {}, False
    if isinstance(source, Dataset | DatasetDict):
        loaded = source
    elif str(source) == "scenes":
        loaded, names_of_file = (
            build_scenes(**{"num_scenes": DEFAULT_NUM_SCENES, **(options.scenes or {})}),
            SCENE_LABELS,
        )
    elif tables := find_csv_tables(Path(source)):
        names_file = (Path(source) if Path(source).is_dir() else Path(source).parent) / "labels.txt"
        if names_file.is_file():
            names_of_file = read_label_names(names_file)
        loaded, row_words, image_column, label_columns = read_csv_tables(
            tables,
            image_column=image_column,
            label_column=label_column,
            label_columns=label_columns,
            picture_folder=options.picture_folder,
            unlisted_pictures=options.unlisted_pictures,
            missing_pictures=options.missing_pictures,
        )
    elif Path(source).is_dir():
        folder = Path(source)
        if (folder / "labels.txt").is_file():
            names_of_file = read_label_names(folder / "labels.txt")
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = load_from_disk(str(folder))
        elif any(folder.glob("metadata.jsonl")) or any(folder.glob("*/metadata.jsonl")):
            loaded, row_words = read_image_folders(
                folder,
                label_column,
                unlisted_pictures=options.unlisted_pictures,
                missing_pictures=options.missing_pictures,
            )
            image_column, label_column = "image", "labels"
        else:
            _check_parquet(folder)
            loaded = load_dataset(str(folder), name=options.dataset_config, cache_dir=cache_dir)
    elif Path(source).exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source} is no folder; give a folder, the id of a dataset on the Hub, or 'scenes'.")
    else:
        on_hub = True
        try:
            loaded = load_dataset(str(source), name=options.dataset_config, revision=revision, cache_dir=cache_dir)
        except (DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"{source} is neither a folder here nor a dataset within reach: {error}") from error

    loaded = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    loaded = {SPLIT_ALIASES.get(name, name): split for name, split in loaded.items()}
    source_words = source if isinstance(source, str | Path) else "the dataset"
    for name in splits or loaded:
        if name not in loaded:
            raise ValueError(
                f"{source_words} has no split {name!r}, only {', '.join(loaded)}; add it or choose another."
            )
        if len(loaded[name]) == 0:
            raise ValueError(f"The split {name!r} of {source_words} has no rows; add some or leave the split out.")
        for column in (image_column, *(label_columns or [label_column])):
            if column not in loaded[name].column_names:
                raise ValueError(
                    f"The split {name!r} of {source_words} has no column {column!r}, only "
                    f"{', '.join(loaded[name].column_names)}; name the right one with image_column, label_column or "
                    "label_columns, or write a metadata.jsonl with file_name and labels beside the pictures."
                )
    if not row_words and not isinstance(source, Dataset | DatasetDict):
        for name in splits or loaded:
            before = f"The split {name!r} of {source_words} has"
            loaded[name] = _with_pictures(loaded[name], image_column, options.missing_pictures, before)
    if label_columns:
        given = list(label_names or names_of_file or label_columns)
        if sorted(given) != sorted(label_columns):
            odd = sorted(set(given) ^ set(label_columns))[0]
            raise ValueError(f"{odd!r} is not among both the label columns and the label names; give the same in both.")
        label_names = label_columns = given

    def lists(name: str) -> pa.ChunkedArray | pa.Array:
        if label_columns:
            return stack_columns(loaded[name], label_columns, row_words[name])
        column = arrow_column(loaded[name], label_column)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = split_text(column, options.label_separator, options.label_format, row_words[name])
        return column

    images = {}
    for name, split in loaded.items():
        if image_column in split.column_names:
            image = split.select_columns([image_column]).cast_column(image_column, Image(decode=False))
            images[name] = image if image_column == "image" else image.rename_column(image_column, "image")
            row_words.setdefault(name, row_namer(images[name], f"split {name!r}, "))
    if label_names is None and names_of_file is None:
        names_of_file = _names_of_labels(loaded, lists, label_column, source_words, revision if on_hub else False)
    label_names = list(label_names or names_of_file)
    if twice := [name for name, count in Counter(label_names).items() if count > 1]:
        raise ValueError(f"The label names list {twice[0]!r} twice; keep one.")
    labels = {
        name: SparseLabels.from_arrow(
            lists(name),
            label_names,
            class_names=None if label_columns else class_names(loaded[name], label_column),
            label_format="multi_hot" if label_columns else options.label_format,
            where=row_words[name],
        )
        for name in splits or loaded
    }
    # One form for all splits, which `datasets` asks for.
    as_ids = all((of_split.values == 1).all() for of_split in labels.values())
    uniform = DatasetDict()
    for name, of_split in labels.items():
        uniform[name] = _with_labels(images[name], of_split, label_names, as_ids, row_words[name])
    if options.exclude is not None:
        uniform = DatasetDict(without_excluded(uniform, options.exclude))
    return uniform, label_names


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


def _with_pictures(split: Dataset, image_column: str, policy: str, before: str) -> Dataset:
    """The rows that hold a picture, or the path of one that is there.

    Raises:
        ValueError: the policy is "error", and some do not.
    """
    check_policies("error", policy)
    column = arrow_column(split.cast_column(image_column, Image(decode=False)), image_column)
    missing, begin = [], 0
    for chunk in column.chunks:
        without_bytes = pc.is_null(pc.struct_field(chunk, "bytes")).to_numpy(zero_copy_only=False)
        for place in np.flatnonzero(without_bytes):
            path = (chunk[place].as_py() or {}).get("path")
            if path is None or not ("://" in path or Path(path).is_file()):
                missing.append(begin + int(place))
        begin += len(chunk)
    refuse_or_skip(
        [f"row {row}" for row in missing],
        policy,
        before,
        "that are not there; add them, take the rows out, or pass missing_pictures='skip'.",
    )
    left = np.delete(np.arange(len(split)), missing)
    return split.select(left) if missing else split


def _names_of_labels(
    splits: dict[str, Dataset],
    lists: Callable[[str], pa.ChunkedArray | pa.Array],
    label_column: str,
    source: str | Path,
    hub_revision: str | None | bool,
) -> list[str]:
    """The vocabulary that the data brings: the names in the features, else of a `labels.txt` on the Hub, else those
    that occur in the train split."""
    train = "train" if "train" in splits else next(iter(splits))
    if (names := class_names(splits[train], label_column)) is not None:
        return names
    column = lists(train)
    values = pc.list_flatten(column) if pa.types.is_nested(column.type) else column
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return sorted(values.unique().drop_null().to_pylist())
    if hub_revision is not False:
        try:
            return read_label_names(
                Path(hf_hub_download(str(source), "labels.txt", repo_type="dataset", revision=hub_revision))
            )
        except EntryNotFoundError:
            pass
    raise ValueError(
        f"The labels of {source} ({column.type}) carry no names; give label_names, or write a labels.txt with one "
        "name a line in class order."
    )


def _with_labels(
    images: Dataset, labels: SparseLabels, label_names: list[str], as_ids: bool, where: Callable[[int], str]
) -> Dataset:
    """`images` with a column `labels`: class ids, or multi-hot; null for a row of which nothing is known."""
    unknown = labels.default != 0
    if unknown.any():
        logger.warning(
            "%d of %d rows have null for labels, so they teach nothing (first: %s); write [] where none is present.",
            unknown.sum(),
            len(labels),
            where(int(np.argmax(unknown))),
        )
    if as_ids:
        starts, values, feature = labels.starts, labels.ids, List(ClassLabel(names=label_names))
    else:
        rows = [labels.dense(row) for row in np.flatnonzero(~unknown)]
        starts = np.concatenate([[0], np.cumsum(~unknown)]) * labels.num_labels
        values, feature = np.concatenate([np.empty(0, np.float32), *rows]), List(Value("float32"))
    lists = pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(values), mask=pa.array(unknown))
    # A column beside the pictures, so that pictures (gigabytes, perhaps) are neither copied nor rewritten.
    return images.add_column("labels", lists.cast(pa.list_(lists.type.value_type)), feature=feature)
