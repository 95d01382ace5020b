"""Videos in, labels out: frames in batches as they are decoded, pooled at each video's end."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_hsvlt.load_video import sample_video
from modeling_hsvlt.processing_multilabel import resolve_threshold, resolve_top_k
from modeling_hsvlt.video_labels import label_video

from ..data.batches import WORKER_TIMEOUT, prefetch_that_fits
from ..data.dataset import ImageResizer
from .loop import Clock, check_scores, is_gone, padded_logits
from .sources import FileSource


class Chunk(NamedTuple):
    """Some frames of a video as a worker gives them; the last of a video has none."""

    key: str
    times: list[tuple[float, float]]  # start and end in seconds of what each frame stands for
    pixels: torch.Tensor | None  # (frames, 3, height, width) uint8
    seconds: float  # of decoding and resizing
    last: bool = False
    problem: str | None = None
    gone: bool = False  # as of an image


class Chunks(torch.utils.data.IterableDataset):
    """The frames of videos, `size` at a time; each worker has its own videos."""

    def __init__(self, source: FileSource, keys: list[str], processor: BaseImageProcessor, size: int, sampling: dict):
        self.source, self.keys, self.size, self.sampling = source, keys, size, sampling
        self.resize = ImageResizer(processor)

    def __iter__(self) -> Iterator[Chunk]:
        worker = torch.utils.data.get_worker_info()
        for key in self.keys if worker is None else self.keys[worker.id :: worker.num_workers]:
            yield from self._of_one(key)

    def _of_one(self, key: str) -> Iterator[Chunk]:
        video, begin = self.source.image(key), time.perf_counter()
        frames = sample_video(video, **self.sampling)
        try:
            while batch := list(itertools.islice(frames, self.size)):
                pixels = [self.resize(frame.image) for frame in batch]
                if len({image.shape for image in pixels}) > 1:
                    raise ValueError(f"{video} changes its size; give the processor's size a height and width.")
                times = [(frame.start, frame.end) for frame in batch]
                yield Chunk(key, times, torch.stack(pixels), time.perf_counter() - begin)
                begin = time.perf_counter()
            yield Chunk(key, [], None, 0.0, last=True)
        except ValueError as error:
            seconds = time.perf_counter() - begin
            yield Chunk(key, [], None, seconds, last=True, problem=str(error), gone=is_gone(video, error))


def tag_videos(
    args, model: PreTrainedModel, processor, source: FileSource, keys: list[str], accelerator: Accelerator, clock: Clock
) -> Iterator[list[dict]]:
    """Yields the record of each video, as `loop.tag` does, with `intervals`: `label`, `start` and `end` in seconds."""
    sampling = {"frames_per_second": args.frames_per_second, "max_frames": args.max_frames}
    chunks = Chunks(source, keys, processor, args.batch_size, sampling)
    workers = min(args.num_workers, len(keys))
    loader = torch.utils.data.DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch_that_fits(args.batch_size * chunks.resize.bytes_of_one(), workers),
        timeout=WORKER_TIMEOUT if workers else 0,
    )
    names, own = model.config.id2label, getattr(model.config, "thresholds", None)
    cuts, top_k = resolve_threshold(args.threshold, own, len(names)), resolve_top_k(args.top_k)
    under_way = defaultdict(list)
    clock.enter("images")
    for chunk in loader:
        clock.enter("model")
        clock.seconds["decoding"] += chunk.seconds
        if chunk.pixels is not None:
            logits = padded_logits(model, processor, chunk.pixels, args.batch_size, accelerator).cpu()
            check_scores(logits, model, chunk.key)
            under_way[chunk.key].append((logits, chunk.times))
        if chunk.last:
            clock.enter("writing")
            frames = under_way.pop(chunk.key, [])
            row = {"key": chunk.key, "labels": None, "scores": None, "error": chunk.problem, "gone": chunk.gone}
            if chunk.problem is None:
                logits, times = torch.cat([part for part, _ in frames]), [time for _, part in frames for time in part]
                pooling = {"pooling": args.pooling, "pooling_k": args.pooling_k}
                labels = label_video(logits, times, names, cuts, top_k, seen_from=cuts, **pooling)
                row["labels"] = [label["label"] for label in labels]
                row["scores"] = [round(label["score"], 6) for label in labels]
                row["intervals"] = [
                    {"label": label["label"], "start": start, "end": end}
                    for label in labels
                    for start, end in label["intervals"]
                ]
            yield [row]
        clock.enter("images")
    clock.enter(None)
