"""The training batches of a stream: read in this process, decoded in workers, with the state to go on from in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from modeling_hsvlt.label_contract import UNKNOWN_LABEL

from .batches import WORKER_TIMEOUT, MultiLabelCollator, leave_signals_to_parent, prefetch_that_fits
from .dataset import ImageResizer
from .shards import Row
from .stream_order import StreamOrder, divide_states
from .stream_parts import StreamSplit


class RawBatch(list):
    """Rows that a worker is to decode, and the state to go on from after them."""

    def __init__(self, rows: Sequence[Row], state: dict):
        super().__init__(rows)
        self.state = state


class StreamDataset(torch.utils.data.Dataset):
    """Makes a batch of a `RawBatch`, in a worker.

    What is wrong is told, not raised: images that cannot be read in `problems` (names and reasons), labels in `fault`.
    Neither teaches anything: all labels of such an image, or batch, are unknown, and another image of the batch stands
    for what cannot be read. So every batch has its size, and no process waits for another.
    """

    sparse_labels = None  # nobody knows them beforehand

    def __init__(self, split: StreamSplit, processor, margin: float = 0.0):
        self.split, self.label_names = split, split.row_labels.label_names
        self.resize = ImageResizer(processor, margin)
        self._collate = MultiLabelCollator(len(self.label_names), sparse_labels=True)

    def __getitems__(self, rows: RawBatch) -> dict:
        """`pixel_values` (B, 3, height, width) uint8, `labels`, `index`, `problems`, `fault` and `state`."""
        labels, fault = None, None
        try:
            labels = self.split.row_labels([row.values for row in rows], partial(self.split.name_of, rows))
        except ValueError as error:
            fault = str(error)
        pixels: list[torch.Tensor | None] = []
        problems = []
        for place, row in enumerate(rows):
            image = row.values[self.split.shards.image_column]
            try:
                if not (image or {}).get("bytes"):  # a path may lead anywhere on this machine
                    raise ValueError("The row holds no image.")
                pixels.append(self.resize.stored(image))
            except ValueError as error:
                pixels.append(None)
                problems.append((self.split.name_of(rows, place), str(error)))
        readable = [image for image in pixels if image is not None]
        stand_in = readable[0] if readable else self.resize.blank()
        unknown = torch.full((len(self.label_names),), float(UNKNOWN_LABEL))
        samples = [
            {
                "pixel_values": stand_in if image is None else image,
                "labels": unknown if image is None or labels is None else labels.tensor(place),
                "index": row.index,
            }
            for place, (row, image) in enumerate(zip(rows, pixels, strict=True))
        ]
        return {**self._collate(samples), "problems": problems, "fault": fault, "state": rows.state}

    def set_epoch(self, epoch: int) -> None:
        """An epoch is a number of steps, whatever of the stream they see."""


class StreamLoader:
    """Batches of one process, without end; each row once a pass, over all processes and whatever the workers.

    Args:
        dataset: What makes batches of rows.
        batch_size: Images of a batch, of which each has as many.
        epoch_batches: What `len` says.
        seed, buffer: See `StreamOrder`.
        num_workers: Processes that decode; rows are read in this one, so that their order does not depend on it.
        process, processes: Which of how many.
        device: Where batches go.

    Attributes:
        state: To go on from, after the last batch that was given; what workers have ready does not count.
        problems, fault: Of the batches that were given, see `StreamDataset`; for the caller to clear.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        *,
        batch_size: int,
        epoch_batches: int,
        seed: int,
        buffer: int,
        num_workers: int = 0,
        process: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self._epoch_batches, self._workers = epoch_batches, num_workers
        self._order = {"process": process, "processes": processes, "seed": seed, "buffer": buffer}
        self.state: dict = {"parts": [], "next": 0}
        self.problems: list[tuple[str, str]] = []
        self.fault: str | None = None
        self._batches: Iterator[dict] | None = None

    def __len__(self) -> int:
        return self._epoch_batches

    def restore(self, states: Sequence[dict]) -> None:
        """Goes on where the processes of a run, this one or another, had these states."""
        self.state = divide_states(states, self._order["processes"], self._order["process"])

    def take(self, count: int) -> Iterator[dict]:
        """The next `count` batches; those after them are read and decoded meanwhile.

        Raises:
            ValueError: a damaged shard.
        """
        if self._batches is None:
            self._batches = iter(self._loader())
        for batch in islice(self._batches, count):
            self.state, fault = batch.pop("state"), batch.pop("fault")
            self.fault = self.fault or fault
            self.problems += batch.pop("problems")
            yield send_to_device(batch, self.device, non_blocking=True)

    def close(self) -> None:
        """Ends its workers and its reader."""
        self._batches = None

    def _loader(self) -> DataLoader:
        order = StreamOrder(self.dataset.split.shards, state=self.state, **self._order)
        image_bytes = self.dataset.resize.bytes_of_one()
        return DataLoader(
            self.dataset,
            batch_sampler=(RawBatch(*batch) for batch in order.batches(self.batch_size)),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=prefetch_that_fits(self.batch_size * image_bytes, self._workers),
            timeout=WORKER_TIMEOUT if self._workers else 0,
            worker_init_fn=leave_signals_to_parent,
        )


def _as_it_is(batch: dict) -> dict:
    return batch
