"""Pictures and labels on their way into a model: any multi-label dataset in, uniform batches out.

`load_multilabel_dataset` reads and checks, `MultiLabelDataset` decodes and resizes, `MultiLabelCollator` batches.
Pixels stay uint8 up to the device; there `normalize_pixels` (after augmentation, in training) makes of them what the
processor makes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage
from tqdm.auto import tqdm

from modeling_hsvlt.losses_multilabel import validate_labels
from modeling_hsvlt.processing_multilabel import load_image

from .image_folder import SPLIT_ALIASES, read_image_folders, read_label_names
from .scenes import DEFAULT_NUM_SCENES, SCENE_LABELS, SceneDataset, build_scenes
from .sparse_labels import SparseLabels, arrow_column, class_names, row_namer

logger = logging.getLogger(__name__)


def load_multilabel_dataset(
    source: str | Path | Dataset | DatasetDict,
    *,
    revision: str | None = None,
    config_name: str | None = None,
    splits: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    image_column: str = "image",
    label_column: str = "labels",
    label_format: str = "auto",
    unlisted_pictures: str = "error",
    missing_pictures: str = "error",
    cache_dir: str | None = None,
    scenes: dict | None = None,
) -> tuple[DatasetDict, list[str]]:
    """Loads a multi-label image dataset and checks every label against the label contract.

    Args:
        source: One of
            - a dataset id on the Hub (pin its `revision`; `config_name` is its configuration);
            - a folder with `<split>/metadata.jsonl` (`imagefolder`: rows with `file_name` and `labels`; a `labels.txt`
              beside the splits gives the class order, one name a line);
            - a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote;
            - a folder of parquet (or another format that `datasets.load_dataset` reads);
            - "scenes", the built-in scenes, drawn by `training.scenes.build_scenes(**scenes)`;
            - a `Dataset` (taken as "train") or `DatasetDict`.
        splits: The splits to return, all of which must exist and have rows; None: all there are. Usual other names
            (`val`, `dev`, `testing`, ...) are known.
        label_names: Vocabulary in class order, for example a checkpoint's. By default that of `labels.txt`, else of
            the column's `ClassLabel`, else the sorted names that occur in the train split.
        label_format: "names", "ids", "multi_hot" or "auto", see `SparseLabels.from_arrow`.
        unlisted_pictures: "error", or "skip" to leave out pictures of an image folder that no metadata row names.
        missing_pictures: "error", or "skip" to leave out metadata rows whose picture does not exist.

    Returns:
        The splits and the label names. Rows hold `image` (`datasets.Image(decode=False)`: `path`, `bytes`) and
        `labels`: lists of class ids (`ClassLabel` with the label names in order), or, where the source was multi-hot,
        lists of one float32 a label. A `null` list, or a `null` or NaN in a multi-hot list, means unknown.

    Raises:
        ValueError, FileNotFoundError: one sentence that names the file, row and label and says what to do.
    """
    names_of_file, row_words = None, {}
    if isinstance(source, Dataset | DatasetDict):
        loaded = source
    elif str(source) == "scenes":
        loaded, names_of_file = build_scenes(**{"num_scenes": DEFAULT_NUM_SCENES, **(scenes or {})}), SCENE_LABELS
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
                unlisted_pictures=unlisted_pictures,
                missing_pictures=missing_pictures,
            )
            image_column, label_column = "image", "labels"
        else:
            loaded = load_dataset(str(folder), name=config_name, cache_dir=cache_dir)
    elif Path(source).exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source} is no folder; give a folder, the id of a dataset on the Hub, or 'scenes'.")
    else:
        try:
            loaded = load_dataset(str(source), name=config_name, revision=revision, cache_dir=cache_dir)
        except (DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"{source} is neither a folder here nor a dataset within reach: {error}") from error

    loaded = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    loaded = {SPLIT_ALIASES.get(name, name): split for name, split in loaded.items()}
    source = source if isinstance(source, str | Path) else "the dataset"
    for name in splits or loaded:
        if name not in loaded:
            raise ValueError(f"{source} has no split {name!r}, only {', '.join(loaded)}; add it or choose another.")
        if len(loaded[name]) == 0:
            raise ValueError(f"The split {name!r} of {source} has no rows; add some or leave the split out.")
        for column in (image_column, label_column):
            if column not in loaded[name].column_names:
                raise ValueError(
                    f"The split {name!r} of {source} has no column {column!r}, only "
                    f"{', '.join(loaded[name].column_names)}; name the right one with image_column or label_column, or "
                    "write a metadata.jsonl with file_name and labels beside the pictures."
                )
    label_names = _resolve_label_names(label_names or names_of_file, loaded, label_column, source)
    uniform = DatasetDict()
    for name in splits or loaded:
        images = loaded[name].select_columns([image_column]).cast_column(image_column, Image(decode=False))
        images = images if image_column == "image" else images.rename_column(image_column, "image")
        where = row_words.get(name) or row_namer(images, f"split {name!r}, ")
        labels = SparseLabels.from_dataset(
            loaded[name], label_names, label_column=label_column, label_format=label_format, where=where
        )
        uniform[name] = _with_labels(images, labels, arrow_column(loaded[name], label_column), label_names, where)
    return uniform, label_names


def _resolve_label_names(
    given: Sequence[str] | None, splits: dict[str, Dataset], label_column: str, source: str | Path
) -> list[str]:
    """The vocabulary: what was given, else the names in the features, else the names in the train split."""
    if given is not None:
        twice = [name for name, count in Counter(given).items() if count > 1]
        if twice:
            raise ValueError(f"The label names list {twice[0]!r} twice; keep one.")
        return list(given)
    train = splits.get("train") or next(iter(splits.values()))
    if (names := class_names(train, label_column)) is not None:
        return names
    column = arrow_column(train, label_column)
    values = pc.list_flatten(column) if pa.types.is_nested(column.type) else column
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ValueError(
            f"The labels of {source} ({column.type}) carry no names; give label_names, or write a labels.txt with one "
            "name a line in class order."
        )
    return sorted(values.unique().drop_null().to_pylist())


def _with_labels(
    images: Dataset, labels: SparseLabels, column: pa.ChunkedArray, label_names: list[str], where: Callable[[int], str]
) -> Dataset:
    """`images` with a column `labels`: class ids, or multi-hot as in `column` where that can say more than ids."""
    unknown = labels.default != 0
    if unknown.any():
        logger.warning(
            "%d of %d rows have null for labels, so they teach nothing (first: %s); write [] where none is present.",
            unknown.sum(),
            len(labels),
            where(int(np.argmax(unknown))),
        )
    if labels.label_format == "multi_hot":
        column, feature = pc.cast(column, pa.list_(pa.float32())), List(Value("float32"))
    else:
        starts = pa.array(labels.starts, pa.int32())
        column = pa.ListArray.from_arrays(starts, pa.array(labels.ids), mask=pa.array(unknown))
        feature = List(ClassLabel(names=label_names))
    # A column beside the pictures, so that pictures (gigabytes, perhaps) are neither copied nor rewritten.
    return images.add_column("labels", column, feature=feature)


class MultiLabelDataset(torch.utils.data.Dataset):
    """Map-style dataset of decoded, resized pictures and dense labels, one dictionary a picture:

    - `pixel_values` (3, height, width) uint8: resized, not yet normalised, so that augmentation and `normalize_pixels`
      run on whole batches on the device;
    - `labels` (num_labels,) float32: 1 present, 0 absent, between them soft, -100 unknown;
    - `index` int: the row in `split`.

    Args:
        split: A split of `load_multilabel_dataset`, or a `SceneDataset` for new scenes every epoch (`set_epoch` is
            passed on to it).
        label_names: The vocabulary in class order.
        processor: A `MultiLabelProcessor`, or any image processor of transformers.
        margin: 0: the processor's own resizing and cropping, pixel for pixel. Above 0, for training: the whole picture
            is resized (never cropped) to the processor's size enlarged by this fraction, which leaves room for a random
            crop on the device while no label's object is lost before it; large JPEGs are decoded at reduced size.
        cache_images: "memory" decodes every picture once, here, and keeps the resized pixels (3 * height * width bytes
            each; 3,633 pictures at 144 px are 226 MB). None decodes on every access.
        num_workers: Threads that fill the cache.
        label_format: As in `load_multilabel_dataset`; needed only for a split that did not come from it.

    Raises:
        ValueError: a bad label, or a picture that cannot be read, naming the row and file.
    """

    def __init__(
        self,
        split: Dataset | SceneDataset,
        label_names: Sequence[str],
        processor,
        *,
        margin: float = 0.0,
        cache_images: str | None = None,
        num_workers: int = 0,
        label_format: str = "auto",
    ):
        self.label_names = list(label_names)
        self.image_processor = getattr(processor, "image_processor", processor)
        self._resizing, self._size_hint = {}, None
        if margin:
            size = _enlarged_size(self.image_processor, margin)
            self._resizing, self._size_hint = {"size": size, "do_center_crop": False}, max(size.values())
        if isinstance(split, Dataset):
            self.split = split.cast_column("image", Image(decode=False))
            self.sparse_labels = SparseLabels.from_dataset(
                split, self.label_names, label_format=label_format, where=row_namer(self.split)
            )
        else:
            if not set(SCENE_LABELS) <= set(label_names):
                raise ValueError(f"Scenes are labelled {', '.join(SCENE_LABELS)}; take these as the label names.")
            self.split, self.sparse_labels = split, None
            self._label_index = {name: index for index, name in enumerate(self.label_names)}
        self._cache = None
        if cache_images == "memory":
            if self.sparse_labels is None:
                raise ValueError("Scenes that change every epoch cannot be cached; set cache_images to None.")
            self._cache = self._fill_cache(num_workers)
        elif cache_images is not None:
            raise ValueError(f"cache_images={cache_images!r} must be 'memory' or None.")

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        if self.sparse_labels is None:
            row = self.split[index]
            pixels, labels = self._pixels(row["image"]), np.zeros(len(self.label_names), dtype=np.float32)
            labels[[self._label_index[name] for name in row["labels"]]] = 1
        else:
            pixels = self._read(index) if self._cache is None else self._cache[index]
            labels = self.sparse_labels.dense(index)
        return {"pixel_values": pixels, "labels": torch.from_numpy(labels), "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch to a split that changes with it."""
        if hasattr(self.split, "set_epoch"):
            self.split.set_epoch(epoch)

    def _read(self, index: int) -> torch.Tensor:
        try:
            return self._pixels(load_image(self.split[index]["image"], size_hint=self._size_hint))
        except ValueError as error:
            raise ValueError(f"{row_namer(self.split)(index)} cannot be read: {error}") from error

    def _pixels(self, image: PILImage.Image) -> torch.Tensor:
        batch = self.image_processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt", **self._resizing
        )
        return batch["pixel_values"][0]

    def _fill_cache(self, num_workers: int) -> torch.Tensor:
        cache = None
        rows = range(len(self))
        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            for index, pixels in enumerate(tqdm(pool.map(self._read, rows), "Caching pictures", len(rows), unit="img")):
                if cache is None:
                    cache = torch.empty((len(self), *pixels.shape), dtype=pixels.dtype)
                cache[index] = pixels
        return cache


def _enlarged_size(image_processor, margin: float) -> dict[str, int]:
    """The size of what the model is shown, enlarged by `margin`."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", None) else image_processor.size
    height, width = (size["height"], size["width"]) if size.get("height") else (size["shortest_edge"],) * 2
    return {"height": round(height * (1 + margin)), "width": round(width * (1 + margin))}


def normalize_pixels(pixel_values: torch.Tensor, processor) -> torch.Tensor:
    """uint8 (batch, 3, height, width) to the float32 that `processor(images)` gives, on the tensor's device."""
    image_processor = getattr(processor, "image_processor", processor)
    pixels = pixel_values.float()
    if image_processor.do_rescale:
        pixels = pixels * image_processor.rescale_factor
    if image_processor.do_normalize:
        shape = (1, -1, 1, 1)
        mean = torch.tensor(image_processor.image_mean, device=pixels.device).view(shape)
        pixels = (pixels - mean) / torch.tensor(image_processor.image_std, device=pixels.device).view(shape)
    return pixels


class MultiLabelCollator:
    """Puts samples together: `pixel_values` (batch, 3, height, width), `labels` (batch, num_labels) float32, and
    `index`.

    Args:
        num_labels: Labels of the model; checked, like the label contract, on every batch.
        processor: If given, pixels are normalised here, for loops that feed the model straight from the loader
            (transformers' `Trainer`); else they stay uint8.
    """

    def __init__(self, num_labels: int, processor=None):
        self.num_labels, self.processor = num_labels, processor

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        labels = torch.stack([sample["labels"] for sample in samples])
        validate_labels(labels, self.num_labels)
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        batch = {
            "pixel_values": pixels if self.processor is None else normalize_pixels(pixels, self.processor),
            "labels": labels,
        }
        if "index" in samples[0]:  # transformers' Trainer drops what the model's forward does not take
            batch["index"] = torch.tensor([sample["index"] for sample in samples])
        return batch


def build_dataloader(
    dataset: MultiLabelDataset,
    *,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    processor=None,
) -> torch.utils.data.DataLoader:
    """A `DataLoader` whose order depends on `seed` alone, to be given to `Accelerator.prepare`.

    With `DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)` accelerate replaces the shuffling sampler
    by one that `set_epoch` controls. No worker draws random numbers: augmentation happens on the device. Before every
    epoch call `set_epoch` of the dataset as well: accelerate passes it on in one process, but not in several.

    Args:
        processor: See `MultiLabelCollator`.
    """
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=MultiLabelCollator(len(dataset.label_names), processor),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator().manual_seed(seed),
    )


def find_unreadable(dataset: Dataset, num_workers: int = 0) -> list[tuple[int, str, str]]:
    """Decodes every picture in full, with a progress bar.

    Args:
        dataset: A split of `load_multilabel_dataset`.
        num_workers: Threads (decoding releases Python's lock).

    Returns:
        (row, file name, reason) of each picture that cannot be decoded: corrupt, truncated, too large, missing.
    """

    def reason(image: dict | None) -> str | None:
        try:
            load_image(image)
        except ValueError as error:
            return str(error)
        return None

    images = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    unreadable = []
    with (
        ThreadPoolExecutor(max(num_workers, 1)) as pool,
        tqdm(total=len(images), desc="Checking pictures", unit="img") as progress,
    ):
        # In slices, for `pool.map` would queue the bytes of a whole data set.
        for start in range(0, len(images), 256):
            pictures = images[start : start + 256]["image"]
            for offset, problem in enumerate(pool.map(reason, pictures)):
                progress.update()
                if problem is not None:
                    name = (pictures[offset] or {}).get("path") or f"row {start + offset}"
                    unreadable.append((start + offset, name, problem))
    return unreadable


def without_unreadable(
    dataset: Dataset, unreadable: Sequence[tuple[int, str, str]], on_unreadable: str = "error"
) -> Dataset:
    """`dataset` without the pictures that `find_unreadable` found.

    Args:
        on_unreadable: "skip" logs each and leaves it out; "error" raises.

    Raises:
        ValueError: there are some and the policy is "error"; names each (up to 20).
    """
    if on_unreadable not in ("error", "skip"):
        raise ValueError(f"on_unreadable={on_unreadable!r} must be 'error' or 'skip'.")
    if not unreadable:
        return dataset
    listing = "; ".join(f"{name}: {reason}" for _, name, reason in unreadable[:20])
    listing += f"; and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
    if on_unreadable == "error":
        raise ValueError(
            f"{len(unreadable)} of {len(dataset)} pictures cannot be read ({listing}); repair or remove them, or pass "
            "on_unreadable='skip' to train without them."
        )
    logger.warning("Left out %d of %d pictures that cannot be read (%s).", len(unreadable), len(dataset), listing)
    bad = {row for row, _, _ in unreadable}
    return dataset.select([row for row in range(len(dataset)) if row not in bad])


def class_counts(dataset: MultiLabelDataset | Dataset, num_labels: int) -> np.ndarray:
    """(num_labels,) int64: the pictures that show each label; unknown entries count for nothing.

    Args:
        dataset: A `MultiLabelDataset` of a fixed split, or a split of `load_multilabel_dataset`.
    """
    labels = getattr(dataset, "sparse_labels", None)
    if labels is None:
        names = class_names(dataset, "labels") or [str(index) for index in range(num_labels)]
        labels = SparseLabels.from_dataset(dataset, names)
    if labels.num_labels != num_labels:
        raise ValueError(
            f"The dataset has {labels.num_labels} labels, not {num_labels}; give both the same label names."
        )
    return labels.positives()
