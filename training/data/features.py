"""Maps of a frozen backbone, computed once for an image and its mirror image, and kept on disk for the runs to come.

A store is a folder named after what its maps depend on: weights, architecture, processor. `maps.bin` holds a record
for each image, all its maps side by side as fp16, channels last; `index.bin` holds their keys in the same order, the
SHA-256 of the image's bytes. Both only grow, the maps first, so what an interruption leaves is used by the next run,
and a data set that gains an image costs that image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from .batches import MultiLabelCollator, leave_signals_to_parent
from .dataset import MultiLabelDataset

FORMAT = 1  # raise it when other maps come of the same weights, images and settings
KEY_BYTES = 32
# Of a configuration, what has no part in its maps.
BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")


def image_keys(images: Dataset) -> list[bytes]:
    """SHA-256 of each image as it is stored, of the column `image`, not decoded."""
    keys = []
    for start in range(0, len(images), 64):
        for image in images[start : start + 64]["image"]:
            data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            keys.append(hashlib.sha256(data).digest())
    return keys


def view_key(key: bytes, view: int) -> bytes:
    """The key of an image (view 0) or of its mirror image (view 1)."""
    return hashlib.sha256(key).digest() if view else key


def store_name(backbone: torch.nn.Module, settings: list, image_processor) -> str:
    """The name of the store of a backbone with these weights.

    Args:
        settings: Of its maps, as JSON holds it: configurations and what else decides which maps there are.
        image_processor: Makes the backbone's images.
    """
    kept = [
        {key: value for key, value in each.items() if key not in BOOKKEEPING} if isinstance(each, dict) else each
        for each in settings
    ]
    described = [FORMAT, kept, image_processor.to_dict()]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for tensor in backbone.state_dict().values():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


@torch.inference_mode()
def map_shapes(
    backbone: Callable[[torch.Tensor], Iterable[torch.Tensor]], image_processor, device: torch.device | str = "cpu"
) -> list[tuple[int, int, int]]:
    """(height, width, channels) of each map of the backbone, of the images that the processor makes."""
    size = image_processor.size
    maps = backbone(torch.zeros(1, 3, size["height"], size["width"], device=device))
    return [(each.shape[2], each.shape[3], each.shape[1]) for each in maps]


class FeatureStore:
    """Records on disk by key; several processes may append to one store.

    Args:
        shapes: (height, width, channels) of each map.
    """

    def __init__(self, folder: Path, shapes: Sequence[tuple[int, int, int]]):
        self.folder, self.shapes = folder, [tuple(shape) for shape in shapes]
        self.numel = sum(math.prod(shape) for shape in self.shapes)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        self._maps, self._index = ((folder / name).open("a+b") for name in ("maps.bin", "index.bin"))
        os.utime(folder / "index.bin")  # used now: of all stores, the one not used for longest goes first
        self.refresh()

    @property
    def record_bytes(self) -> int:
        return 2 * self.numel

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def keys(self) -> set[bytes]:
        return set(self._rows)

    def refresh(self) -> None:
        """Reads what is there by now, and drops what an interruption left half written."""
        with self._lock:
            keys, maps = self._size(self._index) // KEY_BYTES, self._size(self._maps) // self.record_bytes
            self._maps.truncate(min(keys, maps) * self.record_bytes)
            self._index.truncate(min(keys, maps) * KEY_BYTES)
            self._index.seek(0)
            index = self._index.read()
        keys = [index[start : start + KEY_BYTES] for start in range(0, len(index), KEY_BYTES)]
        self._rows = {key: row for row, key in enumerate(keys)}
        # Copy on write, as torch wants memory that could be written to.
        shape = (len(keys), self.numel)
        self._records = np.memmap(self._maps, np.int16, "c", shape=shape) if keys else np.empty(shape, np.int16)

    def append(self, keys: Sequence[bytes], maps: Sequence[torch.Tensor]) -> None:
        """Adds the maps (B, C_i, H_i, W_i) of B images; `refresh` lets them be read.

        Raises:
            ValueError: numbers that fp16 cannot hold.
        """
        records = torch.cat([each.permute(0, 2, 3, 1).flatten(1) for each in maps], 1).half().cpu()
        if not bool(records.isfinite().all()):
            raise ValueError("The backbone's maps hold numbers beyond fp16: train without cache_features.")
        with self._lock:
            self._maps.write(records.numpy().tobytes())
            self._maps.flush()
            os.fsync(self._maps.fileno())
            self._index.write(b"".join(keys))
            self._index.flush()
        self._rows |= dict.fromkeys(keys, -1)  # known, and readable once refreshed

    def record(self, key: bytes) -> torch.Tensor:
        """All maps of an image, (numel,) int16, not copied; see `unpack`. They are the bits of fp16, tensors of which
        autocast on a CPU refuses to put together."""
        return torch.from_numpy(self._records[self._rows[key]])

    def unpack(self, records: torch.Tensor, shapes: Sequence[tuple[int, int, int]] | None = None) -> list[torch.Tensor]:
        """Records (B, numel), or parts of them that hold maps of these shapes, to maps (B, C_i, H_i, W_i), fp32,
        channels last in memory."""
        shapes = self.shapes if shapes is None else shapes
        parts = records.split([math.prod(shape) for shape in shapes], dim=1)
        maps = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return [each.view(torch.float16).float().permute(0, 3, 1, 2) for each in maps]

    @staticmethod
    def _size(file) -> int:
        return os.fstat(file.fileno()).st_size


def make_room(root: Path, store: FeatureStore, keys: set[bytes], limit: float) -> FeatureStore:
    """Deletes the stores below `root` that were not used for longest, until all of them fit `limit` bytes with the maps
    of `keys` in `store`; and what `store` itself holds, where that is too much.

    Raises:
        ValueError: the maps of `keys` alone are more, or more than the disk has left.
    """
    needed = len(keys) * store.record_bytes
    if needed > limit:
        raise ValueError(
            f"The maps of {len(keys):,} images and mirror images take {needed / 2**30:.1f} GiB, and feature_cache_gib "
            f"is {limit / 2**30:g}: raise it, choose a smaller image_size, or leave cache_features out."
        )
    taken = needed + len(store.keys() - keys) * store.record_bytes
    if taken > limit:  # of images that are not in this data set (any more)
        shutil.rmtree(store.folder)
        store, taken = FeatureStore(store.folder, store.shapes), needed
    others = [path for path in root.iterdir() if path.is_dir() and path != store.folder]
    for other in sorted(others, key=_last_used, reverse=True):
        size = sum(file.stat().st_size for file in other.iterdir())
        if taken + size > limit:
            shutil.rmtree(other, ignore_errors=True)
        else:
            taken += size
    missing, free = len(keys - store.keys()) * store.record_bytes, shutil.disk_usage(root).free
    if missing > free:
        raise ValueError(
            f"The maps take {missing / 2**30:.1f} GiB more, and the disk of {root} has {free / 2**30:.1f} left: make "
            "room, name a folder elsewhere with feature_cache, or leave cache_features out."
        )
    return store


def _last_used(folder: Path) -> float:
    index = folder / "index.bin"
    return index.stat().st_mtime if index.is_file() else 0.0


@torch.inference_mode()
def compute_features(
    store: FeatureStore,
    dataset: MultiLabelDataset,
    keys: Sequence[bytes],
    views: int,
    backbone: Callable[[torch.Tensor], Iterable[torch.Tensor]],
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    processes: int = 1,
    name: str = "images",
) -> int:
    """Adds what `store` lacks of a data set, with a progress bar; returns how many images were computed here.

    Args:
        keys: Of `image_keys`, one an image of `dataset`.
        views: 1: the images; 2: their mirror images as well.
        backbone: Normalised images (B, 3, H, W) to maps; in evaluation mode, on `device`.
        rank, processes: Each process takes its share of the images.
        name: What the bar calls the images.
    """
    known = store.keys()
    # By row, for the store of a process that comes later holds more already.
    mine = range(rank, len(keys), processes)
    lacking = [row for row in mine if not known.issuperset(view_key(keys[row], view) for view in range(views))]
    loader = DataLoader(
        Subset(dataset, lacking),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=MultiLabelCollator(len(dataset.label_names), dataset.image_processor),
        worker_init_fn=leave_signals_to_parent,
    )
    with tqdm(total=len(lacking), desc=f"Features of {name}", unit="img", disable=rank > 0 or not lacking) as bar:
        for batch in loader:
            pixels, rows = batch["pixel_values"].to(device), batch["index"].tolist()
            for view in range(views):
                own = [view_key(keys[row], view) for row in rows]
                places = [place for place, key in enumerate(own) if key not in store]
                if places:
                    images = pixels[places].flip(-1) if view else pixels[places]
                    store.append([own[place] for place in places], list(backbone(images)))
            bar.update(len(rows))
    return len(lacking)


class FeatureDataset(torch.utils.data.Dataset):
    """The images of a `MultiLabelDataset` as records of a store: `features` (views, numel) int16, `labels`, `index`."""

    def __init__(self, dataset: MultiLabelDataset, store: FeatureStore, keys: Sequence[bytes], views: int):
        self.label_names, self.sparse_labels = dataset.label_names, dataset.sparse_labels
        self.store, self._keys, self._views = store, keys, views

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, row: int) -> dict:
        records = [self.store.record(view_key(self._keys[row], view)) for view in range(self._views)]
        return {"features": torch.stack(records), "labels": self.sparse_labels.tensor(row), "index": row}
