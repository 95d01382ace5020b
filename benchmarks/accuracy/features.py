"""Inputs of a head: maps of a frozen backbone from the store that training uses, or images where it is trained."""

import copy
import math
from pathlib import Path

import numpy as np
import torch

from modeling_hsvlt import EfficientNetLiteBackbone
from training.data.batches import normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.features import (
    FeatureStore,
    compute_features,
    image_keys,
    map_shapes,
    store_name,
    view_key,
)
from training.places import keep_freed_memory, user_cache


def default_cache() -> Path:
    """The folder of maps that training has by default."""
    return user_cache() / "features"


def dense_labels(dataset: MultiLabelDataset) -> torch.Tensor:
    """(n, num_labels) fp32, the label contract."""
    return torch.from_numpy(np.stack([dataset.sparse_labels.dense(row) for row in range(len(dataset))])).float()


class FeatureCache:
    """Maps and labels of a split.

    Args:
        mirrored (`bool`): Computes those of the mirror images too, which training reads.

    Attributes:
        labels (`torch.Tensor` of shape `(n, num_labels)`): the label contract.
    """

    def __init__(
        self,
        dataset: MultiLabelDataset,
        backbone: EfficientNetLiteBackbone,
        cache: Path,
        name: str,
        *,
        mirrored: bool = True,
    ):
        self.labels, self._keys = dense_labels(dataset), image_keys(dataset.split.images)
        processor = dataset.image_processor

        def maps(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return backbone(pixels).feature_maps

        keep_freed_memory()  # as training does: maps take half the time
        folder = cache / store_name(backbone, [backbone.config.to_dict(), None], processor)
        self._store = FeatureStore(folder, map_shapes(maps, processor))
        compute_features(self._store, dataset, self._keys, 1 + mirrored, maps, batch_size=32, name=name)
        self._store.refresh()
        self._first = 0  # where in a record reading begins

    def __len__(self) -> int:
        return len(self.labels)

    def last_map(self) -> "FeatureCache":
        """The same, of which the last map alone is read, half of a record."""
        narrow = copy.copy(self)
        narrow._first = self._store.numel - math.prod(self._store.shapes[-1])
        return narrow

    def batch(self, rows: torch.Tensor, mirrored: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Maps `(B, C_i, H_i, W_i)`, fp32 and channels last in memory, of some rows.

        Args:
            rows (`torch.LongTensor` of shape `(B,)`).
            mirrored (`torch.BoolTensor` of shape `(B,)`, *optional*): which of them as mirror images; None: none.
        """
        views = [0] * len(rows) if mirrored is None else mirrored.int().tolist()
        keys = [view_key(self._keys[row], view) for row, view in zip(rows.tolist(), views, strict=True)]
        records = torch.stack([self._store.record(key)[self._first :] for key in keys])
        return tuple(self._store.unpack(records, self._store.shapes[-1:] if self._first else self._store.shapes))


class ImageCache:
    """Decoded images of a split on a device, where the backbone is trained as well; read as a `FeatureCache` is."""

    def __init__(self, dataset: MultiLabelDataset, device: torch.device | str = "cpu", num_workers: int = 0):
        self.labels, self.processor = dense_labels(dataset), dataset.image_processor
        kept = MultiLabelDataset(
            dataset.split, dataset.label_names, self.processor, cache_images="memory", num_workers=num_workers
        )
        self.pixels = kept.cached.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def last_map(self) -> "ImageCache":
        """Itself: a backbone that is trained makes all its maps."""
        return self

    def batch(self, rows: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised images (B, 3, H, W) of some rows, those in `mirrored` (B,) as mirror images."""
        pixels = self.pixels[rows.to(self.pixels.device)]
        if mirrored is not None:
            pixels = torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)
        return normalize_pixels(pixels, self.processor)
