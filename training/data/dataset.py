"""Pictures and labels on their way into a model: any multi-label dataset in, uniform batches out.

`load_multilabel_dataset` (`load.py`) reads and checks, `MultiLabelDataset` decodes and resizes, `MultiLabelCollator`
(`batches.py`) batches. Labels stay sparse, ten thousand of them if need be, up to the device, where `to_dense()` makes
a batch of them dense. Pixels stay uint8 up to there; `normalize_pixels` (after augmentation, in training) makes of them
what the processor makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from tqdm.auto import tqdm

from modeling_hsvlt.processing_multilabel import load_image

from .rows import row_namer
from .scenes import SCENE_LABELS, SceneDataset
from .sparse_labels import SparseLabels, class_names


class PictureResizer:
    """Pictures as uint8 tensors (3, height, width) at the size of `processor`; `margin` as in `MultiLabelDataset`."""

    def __init__(self, processor, margin: float = 0.0):
        self.image_processor = getattr(processor, "image_processor", processor)
        self._resizing, self._size_hint = {}, None
        if margin:
            size = _enlarged_size(self.image_processor, margin)
            self._resizing, self._size_hint = {"size": size, "do_center_crop": False}, max(size.values())

    def __call__(self, image: PILImage.Image) -> torch.Tensor:
        batch = self.image_processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt", **self._resizing
        )
        return batch["pixel_values"][0]

    def stored(self, image: dict) -> torch.Tensor:
        """Of `datasets.Image(decode=False)`. Raises a ValueError that says why it cannot be read."""
        return self(load_image(image, size_hint=self._size_hint))


def label_tensor(labels: SparseLabels, row: int) -> torch.Tensor:
    """(num_labels,) float32 labels of one picture: sparse, or dense where nothing but what is listed is known."""
    if labels.default[row]:
        return torch.from_numpy(labels.dense(row))
    ids, values = map(torch.from_numpy, labels.entries(row))
    return torch.sparse_coo_tensor(ids[None], values, (labels.num_labels,), is_coalesced=True, check_invariants=True)


class MultiLabelDataset(torch.utils.data.Dataset):
    """Map-style dataset of decoded, resized pictures and their labels, one dictionary a picture:

    - `pixel_values` (3, height, width) uint8: resized, not yet normalised, so that augmentation and `normalize_pixels`
      run on whole batches on the device;
    - `labels` (num_labels,) float32: 1 present, 0 absent, between them soft, -100 unknown; a sparse tensor where most
      labels are absent (`labels.to_dense()`), else a dense one;
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
        partial_labels: Options of `SparseLabels.partially_known`, which hides labels that are known, for experiments
            with partly labelled data; a training split only.

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
        partial_labels: dict | None = None,
    ):
        self.label_names = list(label_names)
        self._resize = PictureResizer(processor, margin)
        self.image_processor = self._resize.image_processor
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
        if partial_labels:
            if self.sparse_labels is None:
                raise ValueError("Scenes that change every epoch keep their labels; set fresh_scenes to false.")
            self.sparse_labels = self.sparse_labels.partially_known(**partial_labels)
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
            pixels, labels = self._resize(row["image"]), torch.zeros(len(self.label_names))
            labels[[self._label_index[name] for name in row["labels"]]] = 1
        else:
            pixels = self._read(index) if self._cache is None else self._cache[index]
            labels = label_tensor(self.sparse_labels, index)
        return {"pixel_values": pixels, "labels": labels, "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch to a split that changes with it."""
        if hasattr(self.split, "set_epoch"):
            self.split.set_epoch(epoch)

    def _read(self, index: int) -> torch.Tensor:
        try:
            return self._resize.stored(self.split[index]["image"])
        except ValueError as error:
            raise ValueError(f"{row_namer(self.split)(index)} cannot be read: {error}") from error

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
