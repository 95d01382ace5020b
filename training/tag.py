"""Label any number of images, on all devices, in a run that may be killed and started again.

    accelerate launch -m training.tag CHECKPOINT SOURCE OUTPUT
    accelerate launch -m training.tag CHECKPOINT photos tags --threshold 0.5 --top_k 20 --format jsonl
    accelerate launch -m training.tag CHECKPOINT photos tags --sidecars txt xmp

SOURCE is a folder of images (with the folders in it), a text file that names one image a line, or a data set (a
folder that `datasets` wrote, a folder of parquet files, or a Hub id). OUTPUT gets part files, complete or not there:
`file_name` (or `row`, for a data set), `labels` and `scores` from the highest score on, and `error` for an image that
cannot be read; those are listed in `unreadable.txt` as well. Read them all with
`datasets.load_dataset("parquet", data_files="OUTPUT/part-*.parquet")`.

The same command again goes on where the last one was killed, with any number of processes, and tags images that came
since. Each image has one record, whatever happened. At the end it prints where the time went.

--sidecars writes the labels beside each image when all are tagged: `txt`, a line `dog, sofa` in 1.txt, and `xmp`,
keywords for photo tools in 1.jpg.xmp. Files that exist are left alone, unless --overwrite_sidecars says otherwise.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .options import CheckpointOptions, ImageOptions, number_or_auto, option, read_options
from .places import free_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .checkpoint.lock import FolderLock
    from .tagging.results import Results

WRITERS = ("txt", "xmp")


@dataclass(kw_only=True)
class TagOptions(ImageOptions, CheckpointOptions):
    source: str = option(reason="folder, list of files, or dataset", positional=True, metavar="SOURCE")
    output: Path = option(reason="folder to write into", positional=True, metavar="OUTPUT")
    threshold: float | str = option("auto", "a number, or auto: the thresholds in the checkpoint", read=number_or_auto)
    top_k: int | None = option(None, "at most so many labels an image; null: all above the threshold")
    format: Literal["parquet", "jsonl"] = option("parquet", "of the part files")
    batch_size: int = option(32, "images per device")
    num_workers: int = field(
        default_factory=free_cores, metadata={"help": "processes that decode images, per device; by the cores here"}
    )
    part_size: int = option(1000, "images per part file")
    sidecars: list[str] = option(list, f"write the labels beside each image: {', '.join(WRITERS)}", choices=WRITERS)
    overwrite_sidecars: bool = option(False, "replace text files that exist, and the keywords in XMP files that do")
    overwrite: bool = option(False, "begin again, without the parts that are in OUTPUT")
    split: str | None = option(None, "of a dataset that has several")


def run(args: TagOptions) -> None:
    """Tags what has no record yet, prints, and writes sidecars and the list of unreadable images."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import broadcast_object_list

    from modeling_hsvlt.processing_multilabel import resolve_threshold

    from .checkpoint.loading import load_checkpoint
    from .checkpoint.lock import FolderLock
    from .tagging.loop import report, tag_share
    from .tagging.results import UNREADABLE_FILE, Results, summarise
    from .tagging.sidecars import check_sidecars, write_sidecars
    from .tagging.sources import DatasetSource, open_source

    # Processes wait for the slowest, which may have the largest images.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    model, processor = load_checkpoint(args)
    model = model.to(accelerator.device).eval()
    thresholds = getattr(model.config, "thresholds", None)
    resolve_threshold(args.threshold, thresholds, model.config.num_labels)
    if min(args.batch_size, args.part_size, args.top_k or 1) < 1 or args.num_workers < 0:
        raise ValueError("--batch_size, --part_size and --top_k must be at least 1, --num_workers at least 0.")
    with accelerator.main_process_first():  # the others find a downloaded data set
        source = open_source(
            args.source,
            split=args.split,
            image_column=args.image_column,
            revision=args.dataset_revision,
            config_name=args.dataset_config,
        )
    if args.sidecars:
        check_sidecars(source, args.sidecars)
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output, source.key_name, args.format)
    lock = FolderLock(args.output)
    plan = [None, None]
    try:
        if accelerator.is_main_process:
            plan = _plan(args, model, source, results, lock)
        # One list for all, though images may come and go while it is made.
        todo, run_number = broadcast_object_list(plan)
        if isinstance(todo, str):
            raise ValueError(todo)
        lock.take(alone=False)
        accelerator.wait_for_everyone()
        share = todo[accelerator.process_index :: accelerator.num_processes]
        clock = tag_share(args, model, processor, source, results, share, run_number, accelerator)
        accelerator.wait_for_everyone()
        report(clock, len(share), args.num_workers, accelerator)
        if accelerator.is_main_process:
            name = str if isinstance(source, DatasetSource) else lambda key: os.path.abspath(source.path(key))
            total, unreadable = summarise(results, name)
            print(f"{args.output}: {total:,} images, {unreadable:,} of them unreadable ({UNREADABLE_FILE}).")
        if args.sidecars:
            write_sidecars(source, results, args, accelerator)
    finally:
        lock.release()
    accelerator.end_training()


def _plan(args, model: PreTrainedModel, source, results: Results, lock: FolderLock) -> list:
    """The keys that have no record and the number of this run; or, in place of the keys, why there can be none."""
    from .tagging.results import fingerprint

    settings = {
        "checkpoint": args.checkpoint if not Path(args.checkpoint).is_dir() else os.path.abspath(args.checkpoint),
        "revision": args.revision,
        "config": fingerprint(model.config.to_json_string()),
        "source": args.source if not Path(args.source).exists() else os.path.abspath(args.source),
        "split": args.split,
        "image_column": args.image_column,
        "threshold": args.threshold,
        "top_k": args.top_k,
        "format": args.format,
    }
    try:
        lock.take(alone=True)
    except BlockingIOError:
        return [f"Another run is writing into {args.output}; wait for its end, or choose another OUTPUT.", None]
    try:
        results.begin(settings, overwrite=args.overwrite)
        done = results.done()
    except (ValueError, OSError) as error:
        return [str(error), None]
    todo = [key for key in source.keys if key not in done]
    print(f"{args.source}: {len(source.keys):,} images, {len(todo):,} of them to be tagged.")
    return [todo, results.next_run()]


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused, 130 after Ctrl-C."""
    try:
        run(read_options(TagOptions, "tag", __doc__, argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; what is tagged is kept, and the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
