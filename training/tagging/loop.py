"""Images in, labels out: the loop that `training.tag` runs in each process, and where its time goes."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_hsvlt.processing_multilabel import post_process_multi_label_classification

from ..checkpoint.loading import computing
from ..data.batches import normalize_pixels
from ..data.dataset import ImageResizer
from ..say import counted
from .sources import DatasetSource, FileSource


class Batch(NamedTuple):
    """Images as a worker gives them."""

    keys: list
    pixels: torch.Tensor | None  # (readable images, 3, height, width) uint8
    problems: list[str | None]  # of every image; None: readable
    gone: list[bool]  # whether that is no verdict: the file, or its disk, is not there now
    seconds: float  # of decoding and resizing


class Images(torch.utils.data.Dataset):
    """Decodes and resizes images; what cannot be read is told, not raised.

    Args:
        source: Of the images; None: those of a stream, which come as key and image in place of an index.
        keys: Of `source`.
    """

    def __init__(self, source: FileSource | DatasetSource | None, keys: list, processor: BaseImageProcessor):
        self.source, self.keys, self.resize = source, keys, ImageResizer(processor)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | tuple) -> tuple:
        begin, pixels, problem, gone = time.perf_counter(), None, None, False
        if self.source is not None:
            key = self.keys[index]
            image = self.source.image(key)
        else:
            key, image = index
            if not image["bytes"]:  # a path may lead anywhere on this machine
                return key, None, "The row holds no image.", False, 0.0
        try:
            pixels = self.resize.stored(image)
        except ValueError as error:
            problem, gone = str(error), is_gone(image, error)
        return key, pixels, problem, gone, time.perf_counter() - begin


def is_gone(image: Path | str | dict | None, error: Exception) -> bool:
    """Whether the operating system did not give the file, so that nothing is known about the image."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return True
    if isinstance(image, str):  # a URL
        return "cannot be downloaded" in str(error)
    path = image if not isinstance(image, dict) else None if image.get("bytes") else image.get("path")
    return path is not None and not os.path.exists(path)


def collate(samples: list[tuple]) -> Batch:
    """
    Raises:
        ValueError: images of different sizes.
    """
    keys, pixels, problems, gone, seconds = zip(*samples, strict=True)
    readable = [image for image in pixels if image is not None]
    if len({image.shape for image in readable}) > 1:
        raise ValueError("The processor gives images of different sizes; give its size a height and width.")
    return Batch(list(keys), torch.stack(readable) if readable else None, list(problems), list(gone), sum(seconds))


class Clock:
    """Where the time of a loop goes: each moment belongs to the part that was last named."""

    def __init__(self):
        self.seconds, self._part, self._since = Counter(), None, time.perf_counter()

    def enter(self, part: str | None) -> None:
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


def tag(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    loader: torch.utils.data.DataLoader,
    batch_size: int,
    accelerator: Accelerator,
    threshold: float | str | None,
    top_k: int | None,
    clock: Clock,
) -> Iterator[list[dict]]:
    """Yields the records of each batch, in order, without their keys' name: `key`, `labels`, `scores`, `error`, `gone`.

    While a GPU computes one batch the next is fetched and sent. Every batch has the same size, padded if need be, so
    that an image's scores do not depend on who else was left to be tagged.
    """
    config = model.config
    thresholds = getattr(config, "thresholds", None)
    under_way: deque[tuple[Batch, torch.Tensor | None]] = deque()

    def records() -> list[dict]:
        batch, logits = under_way.popleft()
        clock.enter("model")  # waits for the device
        logits = None if logits is None else logits.cpu()
        clock.enter("writing")
        found, rows = iter(()), []
        if logits is not None:
            check_scores(logits, model, f"{batch.keys[0]} or an image after it")
            found = iter(post_process_multi_label_classification(logits, config.id2label, thresholds, threshold, top_k))
        for key, problem, gone in zip(batch.keys, batch.problems, batch.gone, strict=True):
            row = {"key": key, "labels": None, "scores": None, "error": problem, "gone": gone}
            if problem is None:
                labels = next(found)
                row["labels"] = [label["label"] for label in labels]
                row["scores"] = [round(label["score"], 6) for label in labels]
            rows.append(row)
        return rows

    clock.enter("images")
    for batch in loader:
        clock.enter("model")
        clock.seconds["decoding"] += batch.seconds
        logits = None
        if batch.pixels is not None:
            logits = padded_logits(model, processor, batch.pixels, batch_size, accelerator)
        under_way.append((batch, logits))
        if len(under_way) > 1:
            yield records()
        clock.enter("images")
    while under_way:
        yield records()
    clock.enter(None)


def padded_logits(model, processor, pixels: torch.Tensor, batch_size: int, accelerator: Accelerator) -> torch.Tensor:
    """Of at most `batch_size` images, computed as that many, on the device."""
    count = len(pixels)
    padding = pixels[-1:].expand(batch_size - count, *pixels.shape[1:])
    pixels = torch.cat([pixels, padding]).to(accelerator.device, non_blocking=True)
    with torch.inference_mode(), accelerator.autocast():
        pixels = normalize_pixels(pixels, processor).to(next(model.parameters()).dtype)
        with computing(model):
            return model(pixel_values=pixels).logits[:count]


def check_scores(logits: torch.Tensor, model: PreTrainedModel, of: str) -> None:
    """
    Raises:
        ValueError: some are NaN.
    """
    if logits.isnan().any():
        raise ValueError(
            f"The model gives {of} scores that are no numbers: its weights are damaged, or too large for "
            f"{str(model.dtype).removeprefix('torch.')}."
        )


def report(clock: Clock, count: int, workers: int, accelerator: Accelerator, noun: str = "image") -> None:
    """Prints the speed, and whether the model or the decoding was what took the time."""
    parts = ("model", "images", "writing", "decoding")
    values = torch.tensor([*(clock.seconds[part] for part in parts), count], device=accelerator.device)
    *seconds, count = accelerator.reduce(values, "sum").tolist()
    seconds = dict(zip(parts, seconds, strict=True))
    total = seconds["model"] + seconds["images"] + seconds["writing"]
    if not count:
        return
    shares = {part: seconds[part] / total for part in parts[:3]}
    elapsed = total / accelerator.num_processes
    accelerator.print(
        f"{counted(int(count), noun)} in {elapsed:.1f} s, {count / elapsed:.1f} a second on "
        f"{counted(accelerator.num_processes, 'process')}. Time: model {shares['model']:.0%}, waiting for "
        f"images {shares['images']:.0%}, labels and files {shares['writing']:.0%}. Decoding one takes "
        f"{1000 * seconds['decoding'] / count:.1f} ms; workers a process: {workers}."
    )
    if shares["model"] >= shares["images"]:
        accelerator.print("The model is the bottleneck, not decoding.")
    else:
        accelerator.print("Decoding is the bottleneck: raise --num_workers, or store smaller images.")
