"""The batches of a step: augmented, each image once, and how many of their labels are known."""

import numpy as np
import torch
from accelerate.utils import set_seed

from modeling_hsvlt.label_contract import UNKNOWN_LABEL

from ..data.batches import normalize_pixels
from .frozen import FEATURES, mirrored
from .run import Run


def augmented(run: Run, batch: dict, place: int) -> tuple[dict, torch.Tensor]:
    """What the model reads, and labels, of batch `place` of the epoch; the same every time they are asked for."""
    seeds = np.random.SeedSequence((run.config.seed, run.progress.epoch, place, run.accelerator.process_index))
    set_seed(int(seeds.generate_state(1)[0]))
    labels = batch["labels"].to_dense()
    if "features" in batch:
        records = batch["features"]
        views = mirrored(run.augmentation, labels).to(records.device)
        records = records[torch.arange(len(records), device=records.device), views]
        store = run.loaders["train" + FEATURES].dataset.store
        return {"feature_maps": store.unpack(records)}, _once(run, labels, place)
    pixel_values = batch["pixel_values"]
    if run.augmentation is not None:
        pixel_values, labels = run.augmentation(pixel_values / 255, labels)
        pixel_values = pixel_values * 255
    return {"pixel_values": normalize_pixels(pixel_values, run.processor)}, _once(run, labels, place)


def _once(run: Run, labels: torch.Tensor, place: int) -> torch.Tensor:
    """Labels of batch `place` of the epoch, unknown where accelerate filled up the last batches of the processes with
    images from the first, so that no image counts twice."""
    if run.stream is not None:
        return labels
    count, index, size = run.accelerator.num_processes, run.accelerator.process_index, run.config.batch_size
    left = len(run.train_data) % (size * count)
    if count == 1 or not left or place < len(run.loaders["train"]) - 1:
        return labels
    image = index * size + torch.arange(len(labels), device=labels.device)
    return labels.masked_fill((image >= left)[:, None], UNKNOWN_LABEL)


def known_labels(run: Run, batches: list[dict]) -> torch.Tensor:
    """How many labels are known in the batches of a step, on all processes: each of them counts once in its loss."""
    mixup = run.augmentation is not None and run.augmentation.mixup
    known = 0
    for place, batch in enumerate(batches, run.progress.batch):
        labels = batch["labels"].to_dense()
        if mixup and (labels == UNKNOWN_LABEL).any():  # what is mixed with an unknown label is unknown as well
            labels = augmented(run, batch, place)[1]
        known = known + (_once(run, labels, place) != UNKNOWN_LABEL).sum()
    return run.accelerator.reduce(known, "sum").clamp(min=1)
