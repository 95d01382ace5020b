"""Samples become batches: uint8 pixels, and labels that stay sparse until the device."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modeling_hsvlt.label_contract import validate_labels

from .dataset import MultiLabelDataset


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


class SparseBatch:
    """Labels of a batch of which nearly all are 0, on their way to the device: a few hundred bytes an image, whatever
    the number of labels. `DataLoader` pins it and accelerate moves it as they do with a tensor.

    Args:
        positions: (entries,) int64 places in the flattened dense batch, each once.
        values: (entries,) float32.
        shape: (batch, num_labels).
    """

    def __init__(self, positions: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]):
        self.positions, self.values, self.shape = positions, values, shape

    def __len__(self) -> int:
        return self.shape[0]

    def pin_memory(self) -> SparseBatch:
        return SparseBatch(self.positions.pin_memory(), self.values.pin_memory(), self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseBatch:
        moved = (part.to(device, non_blocking=non_blocking) for part in (self.positions, self.values))
        return SparseBatch(*moved, self.shape)

    def to_dense(self) -> torch.Tensor:
        """(batch, num_labels) float32 on the device where this is."""
        dense = self.values.new_zeros(self.shape[0] * self.shape[1])
        return dense.index_copy_(0, self.positions, self.values).view(self.shape)


class MultiLabelCollator:
    """Puts samples together: `pixel_values` (batch, 3, height, width), `labels` (batch, num_labels) float32, and
    `index`; of a `features.FeatureDataset`, `features` in place of `pixel_values`.

    Args:
        num_labels: Labels of the model; checked, like the label contract, on every batch.
        processor: If given, pixels are normalised here, for loops that feed the model straight from the loader
            (transformers' `Trainer`); else they stay uint8.
        sparse_labels: Whether `labels` is a `SparseBatch` where every sample's labels are sparse, for loops that call
            `batch["labels"].to_dense()` on the device, which a tensor has as well.
    """

    def __init__(self, num_labels: int, processor=None, sparse_labels: bool = False):
        self.num_labels, self.processor, self.sparse_labels = num_labels, processor, sparse_labels

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor | SparseBatch]:
        labels = [sample["labels"] for sample in samples]
        if self.sparse_labels and all(of_sample.is_sparse for of_sample in labels):
            labels = self._sparse(labels)
        else:
            labels = torch.stack([of_sample.to_dense() for of_sample in labels])
            validate_labels(labels, self.num_labels)
        what = "features" if "features" in samples[0] else "pixel_values"
        inputs = torch.stack([sample[what] for sample in samples])
        if what == "pixel_values" and self.processor is not None:
            inputs = normalize_pixels(inputs, self.processor)
        batch = {what: inputs, "labels": labels}
        if "index" in samples[0]:  # transformers' Trainer drops what the model's forward does not take
            batch["index"] = torch.tensor([sample["index"] for sample in samples])
        return batch

    def _sparse(self, labels: list[torch.Tensor]) -> SparseBatch:
        for of_sample in labels:
            if of_sample.shape != (self.num_labels,):
                raise ValueError(f"A sample has {len(of_sample)} labels for the {self.num_labels} of the model.")
        positions = [of_sample.indices()[0] + row * self.num_labels for row, of_sample in enumerate(labels)]
        values = torch.cat([of_sample.values() for of_sample in labels])
        validate_labels(values[None], len(values))  # what is not listed is 0, which the contract allows
        return SparseBatch(torch.cat(positions), values, (len(labels), self.num_labels))


def build_dataloader(
    dataset: MultiLabelDataset,
    *,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    processor=None,
    sparse_labels: bool = False,
) -> torch.utils.data.DataLoader:
    """A `DataLoader` whose order depends on `seed` alone, to be given to `Accelerator.prepare`.

    With `DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)` accelerate replaces the shuffling sampler
    by one that `set_epoch` controls. No worker draws random numbers: augmentation happens on the device. Before every
    epoch call `set_epoch` of the dataset as well: accelerate passes it on in one process, but not in several.

    Args:
        processor, sparse_labels: See `MultiLabelCollator`.
    """
    if num_workers:
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)
    collate = MultiLabelCollator(len(dataset.label_names), processor, sparse_labels)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_that_fits(
            batch_size * image_bytes(dataset, collate) if num_workers else 0, num_workers
        ),
        timeout=WORKER_TIMEOUT if num_workers else 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator().manual_seed(seed),
    )


SHARED_MEMORY = "/dev/shm"  # where workers hand their batches over
WORKER_TIMEOUT = 900  # seconds without a batch: by then no worker is going to give one


def image_bytes(dataset: torch.utils.data.Dataset, collate: Callable) -> int:
    """Bytes that an image takes in a batch; 0 where there is none to look at, or only a stream of them."""
    batch = collate([dataset[0]]) if hasattr(dataset, "__len__") and len(dataset) else {}
    return sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))


def prefetch_that_fits(batch_bytes: int, num_workers: int) -> int | None:
    """Batches that each worker may have ready, at most 4: as many as there is shared memory for, beside two that the
    process itself holds, that of the step and the next. A container gets 64 MiB of it unless told, and workers that
    run out of it hang or die of a bus error.

    Raises:
        ValueError: there is none for one batch a worker.
    """
    if not num_workers:
        return None
    if not os.path.isdir(SHARED_MEMORY):
        return 4
    free = shutil.disk_usage(SHARED_MEMORY).free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = int(free // max(batch_bytes, 1) - 2) // num_workers
    if fits < 1:
        raise ValueError(
            f"{SHARED_MEMORY} has room for {free / 2**20:.0f} MiB, and {num_workers} workers hand over batches of "
            f"{batch_bytes / 2**20:.0f} MiB: start the container with --shm-size=8g, or lower num_workers or "
            "batch_size; num_workers 0 needs none."
        )
    return min(fits, 4)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """What PyTorch says of workers that died or hang, as an OSError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise OSError(
            f"The processes that decode images died or gave nothing for {WORKER_TIMEOUT} s "
            f"({str(error).splitlines()[0]}): look at memory and {SHARED_MEMORY}, or set num_workers to 0."
        ) from error


def _kill_workers() -> None:
    """At the end of the process. Python itself sends them a SIGTERM, which they do not heed, and waits: for one that
    hangs, for ever."""
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's own complains of workers that die
        for worker in workers:
            worker.kill()


def leave_signals_to_parent(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: a signal to the whole process group must not take the workers away from a
    training process that is about to save; it ends them itself, and they end where it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
