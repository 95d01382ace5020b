"""Images and labels on their way into a model: any multi-label dataset in, uniform batches out.

`load` (`load.py`) reads and checks, `MultiLabelDataset` decodes and resizes, `MultiLabelCollator`
(`batches.py`) batches. Labels stay sparse, ten thousand of them if need be, up to the device, where `to_dense()` makes
a batch of them dense. Pixels stay uint8 up to there; `normalize_pixels` (after augmentation, in training) makes of them
what the processor makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image as PILImage
from tqdm.auto import tqdm

from modeling_hsvlt.load_image import load_image

from .rows import Split
from .scenes import SceneSplit


class ImageResizer:
    """Images as uint8 tensors (3, height, width) at the size of `processor`; `margin` as in `MultiLabelDataset`."""

    def __init__(self, processor, margin: float = 0.0):
        self.image_processor = getattr(processor, "image_processor", processor)
        self._resizing, self._size_hint = {}, None
        if margin:
            size = _enlarged_size(self.image_processor, margin)
            self._resizing, self._size_hint = {"size": size, "do_center_crop": False}, max(size.values())
        self._unchanged = None  # (width, height) of images that come out as they are
        channels, *size = self.blank().shape
        noise = np.random.default_rng(0).integers(0, 256, (*size, channels), np.uint8)
        if channels == 3 and torch.equal(self(PILImage.fromarray(noise)), torch.from_numpy(noise.transpose(2, 0, 1))):
            self._unchanged = noise.shape[1::-1]

    def __call__(self, image: PILImage.Image) -> torch.Tensor:
        if image.mode == "RGB" and image.size == self._unchanged:  # saves a quarter of a millisecond
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
        batch = self.image_processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt", **self._resizing
        )
        return batch["pixel_values"][0]

    def blank(self) -> torch.Tensor:
        """A black image."""
        return self(PILImage.new("RGB", (64, 64)))

    def bytes_of_one(self) -> int:
        return self.blank().nbytes

    def stored(self, image: dict | PILImage.Image) -> torch.Tensor:
        """Of a `datasets.Image`, decoded or not. Raises a ValueError that says why it cannot be read."""
        return self(load_image(image, size_hint=self._size_hint))


class MultiLabelDataset(torch.utils.data.Dataset):
    """Map-style dataset of decoded, resized images and their labels, one dictionary an image:

    - `pixel_values` (3, height, width) uint8: resized, not yet normalised, so that augmentation and `normalize_pixels`
      run on whole batches on the device;
    - `labels` (num_labels,) float32: 1 present, 0 absent, between them soft, -100 unknown; a sparse tensor where most
      labels are absent (`labels.to_dense()`), else a dense one;
    - `index` int: the row in `split`.

    Args:
        split: Of `load`; `set_epoch` is passed on to one that changes every epoch.
        label_names: The vocabulary in class order.
        processor: A `MultiLabelProcessor`, or any image processor of transformers.
        margin: 0: the processor's own resizing and cropping, pixel for pixel. Above 0, for training: the whole image
            is resized (never cropped) to the processor's size enlarged by this fraction, which leaves room for a random
            crop on the device while no label's object is lost before it; large JPEGs are decoded at reduced size.
        cache_images: "memory" decodes every image once, here, and keeps the resized pixels (3 * height * width bytes
            each; 3,633 images at 144 px are 226 MB). None decodes on every access.
        num_workers: Threads that fill the cache.
        partial_labels: Options of `SparseLabels.partially_known`, which hides labels that are known, for experiments
            with partly labelled data; a training split only.

    Raises:
        ValueError: an image that cannot be read, naming the row and file.
    """

    def __init__(
        self,
        split: Split | SceneSplit,
        label_names: Sequence[str],
        processor,
        *,
        margin: float = 0.0,
        cache_images: str | None = None,
        num_workers: int = 0,
        partial_labels: dict | None = None,
    ):
        self.label_names = list(label_names)
        self._resize = ImageResizer(processor, margin)
        self.image_processor = self._resize.image_processor
        if split.labels is None and (partial_labels or cache_images):
            what = (
                "keep their labels; set fresh_scenes to false"
                if partial_labels
                else "cannot be cached; set cache_images to None"
            )
            raise ValueError(f"Scenes that change every epoch {what}.")
        if partial_labels:
            split = replace(split, labels=split.labels.partially_known(**partial_labels))
        self.split, self.sparse_labels = split, split.labels
        self.cached = None  # (n, 3, height, width)
        if cache_images == "memory":
            self.cached = self._fill_cache(num_workers)
        elif cache_images is not None:
            raise ValueError(f"cache_images={cache_images!r} must be 'memory' or None.")

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        if self.cached is None:
            row = self.split[index]
            return {"pixel_values": self._read(index, row["image"]), "labels": row["labels"], "index": index}
        return {"pixel_values": self.cached[index], "labels": self.sparse_labels.tensor(index), "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch to a split that changes with it."""
        if hasattr(self.split, "set_epoch"):
            self.split.set_epoch(epoch)

    def _read(self, index: int, image: dict | PILImage.Image) -> torch.Tensor:
        try:
            return self._resize.stored(image)
        except ValueError as error:
            raise ValueError(f"{self.split.row_name(index)} cannot be read: {error}") from error

    def _fill_cache(self, num_workers: int) -> torch.Tensor:
        cache = None
        rows = range(len(self))

        def read(index: int) -> torch.Tensor:
            return self._read(index, self.split[index]["image"])

        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            for index, pixels in enumerate(tqdm(pool.map(read, rows), "Caching images", len(rows), unit="img")):
                if cache is None:
                    cache = torch.empty((len(self), *pixels.shape), dtype=pixels.dtype)
                cache[index] = pixels
        return cache


def _enlarged_size(image_processor, margin: float) -> dict[str, int]:
    """The size of what the model is shown, enlarged by `margin`."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", None) else image_processor.size
    height, width = (size["height"], size["width"]) if size.get("height") else (size["shortest_edge"],) * 2
    return {"height": round(height * (1 + margin)), "width": round(width * (1 + margin))}
