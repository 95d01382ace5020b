"""Feature maps of a frozen backbone, computed once for every image of a split and its mirror image.

They lie as fp16 in memory-mapped files, one a map, in a folder named after what they were computed from (images,
size, backbone); a head then trains in minutes on two cores.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.peers.efficientnet_lite import EfficientNetLiteBackbone
from training.data.batches import build_dataloader, normalize_pixels
from training.data.dataset import MultiLabelDataset

VIEWS = 2  # the image and its mirror image


def default_cache() -> Path:
    """The user's cache folder for features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hsvlt" / "features"


def dense_labels(dataset: MultiLabelDataset) -> torch.Tensor:
    """(n, num_labels) fp32, the label contract."""
    return torch.from_numpy(np.stack([dataset.sparse_labels.dense(row) for row in range(len(dataset))])).float()


class FeatureCache:
    """Maps and labels of a split.

    Attributes:
        labels (`torch.Tensor` of shape `(n, num_labels)`): the label contract.
        maps: memory-mapped `(VIEWS, n, H_i, W_i, C_i)` fp16 arrays, one for each of the backbone's `out_features`.
    """

    def __init__(self, dataset: MultiLabelDataset, backbone: EfficientNetLiteBackbone, cache: Path, name: str):
        self.labels = dense_labels(dataset)
        folder = cache / self._fingerprint(dataset, backbone)
        if not folder.is_dir():
            self._fill(folder, dataset, backbone, name)
        self.maps = [np.load(folder / f"{feature}.npy", mmap_mode="r") for feature in backbone.out_features]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: torch.Tensor, mirrored: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Maps `(B, C_i, H_i, W_i)`, fp32 and channels last in memory, of some rows.

        Args:
            rows (`torch.LongTensor` of shape `(B,)`).
            mirrored (`torch.BoolTensor` of shape `(B,)`, *optional*): which of them as mirror images; None: none.
        """
        views = np.zeros(len(rows), dtype=int) if mirrored is None else mirrored.numpy().astype(int)
        return tuple(torch.from_numpy(each[views, rows.numpy()]).float().permute(0, 3, 1, 2) for each in self.maps)

    @staticmethod
    def _fingerprint(dataset: MultiLabelDataset, backbone: EfficientNetLiteBackbone) -> str:
        digest = hashlib.sha256(json.dumps([backbone.config.to_diff_dict(), backbone.out_features]).encode())
        digest.update(repr(sorted(dataset.image_processor.to_dict().items(), key=str)).encode())
        digest.update(next(backbone.parameters()).detach().numpy().tobytes())
        for image in dataset.split.images["image"]:
            if image["bytes"] is not None:
                digest.update(image["bytes"])
            else:
                stat = os.stat(image["path"])
                digest.update(f"{os.path.abspath(image['path'])} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:24]

    @staticmethod
    @torch.inference_mode()
    def _fill(folder: Path, dataset: MultiLabelDataset, backbone: EfficientNetLiteBackbone, name: str) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
        try:
            files, begin = None, 0
            loader = build_dataloader(dataset, batch_size=32, processor=dataset.image_processor)
            for batch in tqdm(loader, f"Features of {name}", leave=False):
                pixels = batch["pixel_values"]
                for view in range(VIEWS):
                    maps = backbone(pixels.flip(-1) if view else pixels).feature_maps
                    if files is None:
                        files = [
                            np.lib.format.open_memmap(
                                partial / f"{feature}.npy",
                                mode="w+",
                                dtype=np.float16,
                                shape=(VIEWS, len(dataset), *each.shape[2:], each.shape[1]),
                            )
                            for feature, each in zip(backbone.out_features, maps, strict=True)
                        ]
                    for file, each in zip(files, maps, strict=True):
                        file[view, begin : begin + len(pixels)] = each.permute(0, 2, 3, 1).numpy()
                begin += len(pixels)
            for file in files:
                file.flush()
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


class ImageCache:
    """Decoded images of a split in memory, where the backbone is trained as well; read as a `FeatureCache` is."""

    def __init__(self, dataset: MultiLabelDataset):
        self.labels = dense_labels(dataset)
        self.dataset = MultiLabelDataset(
            dataset.split, dataset.label_names, dataset.image_processor, cache_images="memory"
        )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised images (B, 3, H, W) of some rows, those in `mirrored` (B,) as mirror images."""
        pixels = torch.stack([self.dataset[row]["pixel_values"] for row in rows.tolist()])
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return normalize_pixels(pixels, self.dataset.image_processor)
