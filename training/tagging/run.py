"""A run of `training.tag`: what is left to do, divided over the processes, and what came of it."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_hsvlt.load_video import check_sampling
from modeling_hsvlt.processing_multilabel import resolve_threshold
from modeling_hsvlt.video_labels import check_pooling

from ..checkpoint.loading import load_checkpoint
from ..checkpoint.lock import FolderLock, check_launch
from ..data.batches import WORKER_TIMEOUT, naming_dead_workers, prefetch_that_fits
from ..options import ImageOptions
from ..say import counted, say_next
from .loop import Clock, Images, collate, report, tag
from .precision import DTYPES, choose_precision, precision_of
from .results import UNREADABLE_FILE, PartWriter, Results, fingerprint, fingerprint_weights, summarise
from .sidecars import check_sidecars, write_sidecars
from .sources import FileSource, StreamSource, open_source
from .videos import tag_videos

# Options that a resumed run must share with the one before.
SAME = (
    *("split", "image_column", "threshold", "top_k", "format"),
    *("frames_per_second", "max_frames", "pooling", "pooling_k"),
)


def tag_source(args) -> int:
    """Tags what has no record yet, prints, and writes sidecars and the list of unreadable images.

    Args:
        args: The options of `training.tag`.

    Returns:
        How many images this run could not get at, and sidecars it could not write: the next one tries them again.

    Raises:
        ValueError, OSError: in one sentence, what was wrong and what to do.
    """
    # Processes wait for the slowest, which may have the largest images.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_launch(accelerator)
    model, processor = load_checkpoint(args)
    model = model.to(accelerator.device).eval()
    thresholds = getattr(model.config, "thresholds", None)
    resolve_threshold(args.threshold, thresholds, model.config.num_labels)
    if min(args.batch_size, args.part_size, args.top_k or 1) < 1 or args.num_workers < 0:
        raise ValueError("--batch_size, --part_size and --top_k must be at least 1, --num_workers at least 0.")
    check_sampling(args.frames_per_second, args.max_frames)
    check_pooling(args.pooling, args.pooling_k)
    with accelerator.main_process_first():  # the others find a downloaded data set
        options = {field.name: getattr(args, field.name) for field in fields(ImageOptions)}
        source = open_source(args.source, split=args.split, **options)
    if args.sidecars:
        check_sidecars(source)
    if args.output.resolve().is_relative_to(Path(args.source).resolve()):
        raise ValueError(f"OUTPUT {args.output} is in SOURCE, which the next run would read as well; choose another.")
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output, source.key_name, args.format)
    lock = FolderLock(args.output)
    plan = [None, None, None]
    try:
        if accelerator.is_main_process:
            plan = _plan(args, model, processor, source, results, lock)
        # One list for all, though images may come and go while it is made.
        # Of a stream, whose length nobody knows, it is what has a record.
        todo, run_number, dtype = broadcast_object_list(plan)
        if isinstance(todo, str):
            raise ValueError(todo)
        model.to(DTYPES[dtype])
        lock.take(alone=False)
        accelerator.wait_for_everyone()
        share = todo
        if not isinstance(source, StreamSource):
            share = todo[accelerator.process_index :: accelerator.num_processes]
        clock, gone, count = tag_share(args, model, processor, source, results, share, run_number, accelerator)
        accelerator.wait_for_everyone()
        report(clock, count, args.num_workers, accelerator, "file" if source.videos else "image")
        if accelerator.is_main_process:
            name = source.where if isinstance(source, FileSource) else str
            total, unreadable = summarise(results, name)
            left_out = ", ".join(f"{count:,} {why}" for why, count in sorted(source.left_out.items()))
            left_out = f"; left out: {left_out}" if left_out else ""
            of_them = f"{unreadable:,} of them unreadable ({UNREADABLE_FILE})"
            noun = "file" if source.videos else "image"
            print(f"{args.output}: {counted(total, noun)}, {of_them}{left_out}.")
            say_next("demo", args.checkpoint)
        failed = write_sidecars(source, results, args, accelerator) if args.sidecars else 0
        gone = gather_object(gone)
    finally:
        lock.release()
    if gone and accelerator.is_main_process:
        print(
            f"error: {len(gone):,} images could not be got at, the first: {gone[0]} Nothing is written about them; the "
            "same command tries them again.",
            file=sys.stderr,
        )
    if failed and accelerator.is_main_process:
        print(
            f"error: {counted(failed, 'sidecar')} could not be written; the same command tries again.", file=sys.stderr
        )
    accelerator.end_training()
    return len(gone) + failed


def tag_share(
    args, model, processor, source, results, share, run_number, accelerator: Accelerator
) -> tuple[Clock, list[str], int]:
    """Tags one process's images and videos: the time, why there is no record of those that could not be got at, and how
    many there were.

    Args:
        share: The keys to tag; of a stream, those not to.
    """
    batches, videos = {"batch_size": args.batch_size}, []
    if isinstance(source, StreamSource):
        images = Images(None, [], processor)
        mine = source.images(accelerator.process_index, accelerator.num_processes, frozenset(share))
        batches = {"batch_sampler": iter(lambda: list(itertools.islice(mine, args.batch_size)), [])}
    else:
        images = Images(source, [key for key in share if key not in source.videos], processor)
        videos = [key for key in share if key in source.videos]
    loader = torch.utils.data.DataLoader(
        images,
        **batches,
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=prefetch_that_fits(args.batch_size * images.resize.bytes_of_one(), args.num_workers),
        timeout=WORKER_TIMEOUT if args.num_workers else 0,
    )
    writer = PartWriter(results, run_number, accelerator.process_index, args.part_size)
    clock, gone, count = Clock(), [], 0
    total = None if isinstance(source, StreamSource) else len(share)
    words = "Tagging" if accelerator.num_processes == 1 else f"Tagging, process 1 of {accelerator.num_processes}"
    bar = tqdm(total=total, desc=words, unit="img", disable=not accelerator.is_main_process or total == 0)
    try:
        with naming_dead_workers():
            of_images = tag(model, processor, loader, args.batch_size, accelerator, args.threshold, args.top_k, clock)
            of_videos = tag_videos(args, model, processor, source, videos, accelerator, clock) if videos else ()
            for records in itertools.chain(of_images, of_videos):
                for record in records:
                    key, seen = {source.key_name: record.pop("key")}, record.pop("intervals", ())
                    if record.pop("gone"):
                        gone.append(record["error"])
                    else:
                        writer.add({**key, **record}, [{**key, **interval} for interval in seen])
                bar.update(len(records))
                count += len(records)
    finally:
        bar.close()
        writer.flush()  # after Ctrl-C as well
    return clock, gone, count


def _plan(args, model: PreTrainedModel, processor, source, results: Results, lock: FolderLock) -> list:
    """The keys that have no record (of a stream, those that have one), the number of this run and what it computes in;
    or, in place of the keys, why there can be none."""
    try:
        lock.take(alone=True)
    except BlockingIOError:
        return [f"Another run is writing into {args.output}; wait for its end, or choose another OUTPUT.", None, None]
    settings = {
        "checkpoint": args.checkpoint if not Path(args.checkpoint).is_dir() else os.path.abspath(args.checkpoint),
        "revision": args.revision,
        "config": fingerprint(model.config.to_json_string()),
        "weights": fingerprint_weights(model),
        "processor": fingerprint(processor.to_json_string()),
        "source": args.source if not Path(args.source).exists() else os.path.abspath(args.source),
        "dtype": args.dtype or precision_of(model),
        **{name: getattr(args, name) for name in SAME},
    }
    try:
        if settings["dtype"] == "auto":
            begun = None if args.overwrite else results.begun_with("dtype")
            settings["dtype"] = begun if begun in DTYPES else choose_precision(args, model, processor, source)
        count = len(source) if isinstance(source, StreamSource) else len(source.keys)
        results.begin(settings, source.fingerprint, count, overwrite=args.overwrite)
        done = results.done()
    except (ValueError, OSError) as error:
        return [str(error), None, None]
    if isinstance(source, StreamSource):
        print(f"{args.source}: {counted(count, 'shard')}; {counted(len(done), 'image')} of them have a record.")
        return [list(done), results.next_run(), settings["dtype"]]
    todo = [key for key in source.keys if key not in done]
    images = counted(len(source.keys) - len(source.videos), "image")
    videos = f" and {counted(len(source.videos), 'video')}" if source.videos else ""
    print(f"{args.source}: {images}{videos}, {len(todo):,} of them to be tagged.")
    return [todo, results.next_run(), settings["dtype"]]
