"""Label any number of pictures, on all devices, in a run that may be killed and started again.

    accelerate launch -m training.tag CHECKPOINT SOURCE OUTPUT
    accelerate launch -m training.tag CHECKPOINT photos tags --threshold 0.5 --top_k 20 --format jsonl
    accelerate launch -m training.tag CHECKPOINT photos tags --sidecars txt xmp

SOURCE is a folder of pictures (with the folders in it), a text file that names one picture a line, or a data set (a
folder that `datasets` wrote, a folder of parquet files, or a Hub id). OUTPUT gets part files, complete or not there:
`file_name` (or `row`, for a data set), `labels` and `scores` from the highest score on, and `error` for a picture that
cannot be read; those are listed in `unreadable.txt` as well. Read them all with
`datasets.load_dataset("parquet", data_files="OUTPUT/part-*.parquet")`.

The same command again goes on where the last one was killed, with any number of processes, and tags pictures that came
since. Each picture has one record, whatever happened. At the end it prints where the time went.

--sidecars writes the labels beside each picture when all are tagged: `txt`, a line `dog, sofa` in 1.txt, and `xmp`,
keywords for photo tools in 1.jpg.xmp. Files that exist are left alone, unless --overwrite_sidecars says otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_hsvlt.processing_multilabel import post_process_multi_label_classification, resolve_threshold

from .checkpoint.loading import load_checkpoint
from .data.batches import normalize_pixels
from .data.dataset import PictureResizer
from .options import number_or_auto
from .tagging.results import FORMATS, UNREADABLE_FILE, FolderLock, PartWriter, Results, fingerprint, summarise
from .tagging.sidecars import PATHS, WRITERS
from .tagging.sources import DatasetSource, FileSource, open_source


class Batch(NamedTuple):
    """Pictures as a worker gives them."""

    keys: list
    pixels: torch.Tensor | None  # (readable pictures, 3, height, width) uint8
    problems: list[str | None]  # of every picture; None: readable
    seconds: float  # of decoding and resizing


class Pictures(torch.utils.data.Dataset):
    """Decodes and resizes pictures; what cannot be read is told, not raised."""

    def __init__(self, source: FileSource | DatasetSource, keys: list, processor: BaseImageProcessor):
        self.source, self.keys, self._resize = source, keys, PictureResizer(processor)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple:
        key, begin, pixels, problem = self.keys[index], time.perf_counter(), None, None
        try:
            pixels = self._resize.stored(self.source.picture(key))
        except ValueError as error:
            problem = str(error)
        return key, pixels, problem, time.perf_counter() - begin


def collate(samples: list[tuple]) -> Batch:
    """
    Raises:
        ValueError: pictures of different sizes.
    """
    keys, pixels, problems, seconds = zip(*samples, strict=True)
    readable = [picture for picture in pixels if picture is not None]
    if len({picture.shape for picture in readable}) > 1:
        raise ValueError("The processor gives pictures of different sizes; give its size a height and width.")
    return Batch(list(keys), torch.stack(readable) if readable else None, list(problems), sum(seconds))


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
    accelerator: Accelerator,
    threshold: float | str | None,
    top_k: int | None,
    clock: Clock,
) -> Iterator[list[dict]]:
    """Yields the records of each batch, in order, without their keys' name: `key`, `labels`, `scores` and `error`.

    While a GPU computes one batch the next is fetched and sent. Every batch has the same size, padded if need be, so
    that a picture's scores do not depend on who else was left to be tagged.
    """
    config, dtype = model.config, next(model.parameters()).dtype
    thresholds = getattr(config, "thresholds", None)
    under_way: deque[tuple[Batch, torch.Tensor | None]] = deque()

    def records() -> list[dict]:
        batch, logits = under_way.popleft()
        clock.enter("model")  # waits for the device
        logits = None if logits is None else logits.cpu()
        clock.enter("writing")
        found = iter(
            []
            if logits is None
            else post_process_multi_label_classification(logits, config.id2label, thresholds, threshold, top_k)
        )
        rows = []
        for key, problem in zip(batch.keys, batch.problems, strict=True):
            row = {"key": key, "labels": None, "scores": None, "error": problem}
            if problem is None:
                labels = next(found)
                row["labels"] = [label["label"] for label in labels]
                row["scores"] = [round(label["score"], 6) for label in labels]
            rows.append(row)
        return rows

    clock.enter("pictures")
    for batch in loader:
        clock.enter("model")
        clock.seconds["decoding"] += batch.seconds
        logits = None
        if batch.pixels is not None:
            count = len(batch.pixels)
            padding = batch.pixels[-1:].expand(loader.batch_size - count, *batch.pixels.shape[1:])
            pixels = torch.cat([batch.pixels, padding]).to(accelerator.device, non_blocking=True)
            with torch.inference_mode(), accelerator.autocast():
                logits = model(pixel_values=normalize_pixels(pixels, processor).to(dtype)).logits[:count]
        under_way.append((batch, logits))
        if len(under_way) > 1:
            yield records()
        clock.enter("pictures")
    while under_way:
        yield records()
    clock.enter(None)


def write_sidecars(source: FileSource, results: Results, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Writes this process's share of the sidecars, and says how many there were."""
    counts = Counter()
    for part in results.parts()[accelerator.process_index :: accelerator.num_processes]:
        for record in results.read(part):
            if not record["labels"]:
                continue
            picture = source.path(record["file_name"])
            for kind in args.sidecars:
                try:
                    done = WRITERS[kind](picture, record["labels"], args.overwrite_sidecars)
                except OSError as error:  # a folder that cannot be written to, or was moved away
                    print(f"No sidecar of {picture}: {error}", file=sys.stderr)
                    done = False
                counts["written" if done else "kept"] += 1
    totals = torch.tensor([counts["written"], counts["kept"]], device=accelerator.device)
    written, kept = accelerator.reduce(totals, "sum").tolist()
    accelerator.print(f"Sidecars written: {written:,}; left as they were or not to be written: {kept:,}.")


def check_sidecars(source: FileSource | DatasetSource, kinds: list[str]) -> None:
    """
    Raises:
        ValueError: the pictures are no files, or two would share a sidecar.
    """
    if isinstance(source, DatasetSource):
        raise ValueError("The pictures of a data set have no folder for sidecars; leave --sidecars out.")
    for kind in kinds:
        owners: dict[Path, str] = {}
        for name in source.keys:
            path = PATHS[kind](source.path(name))
            if path in owners:
                raise ValueError(f"{owners[path]} and {name} would share the sidecar {path.name}; rename one of them.")
            owners[path] = name


def report(clock: Clock, count: int, workers: int, accelerator: Accelerator) -> None:
    """Prints the speed, and whether the model or the decoding was what took the time."""
    parts = ("model", "pictures", "writing", "decoding")
    values = torch.tensor([*(clock.seconds[part] for part in parts), count], device=accelerator.device)
    *seconds, count = accelerator.reduce(values, "sum").tolist()
    seconds = dict(zip(parts, seconds, strict=True))
    total = seconds["model"] + seconds["pictures"] + seconds["writing"]
    if not count:
        return
    shares = {part: seconds[part] / total for part in parts[:3]}
    elapsed = total / accelerator.num_processes
    accelerator.print(
        f"{count:,.0f} pictures in {elapsed:.1f} s, {count / elapsed:.1f} a second on {accelerator.num_processes} "
        f"process{'es' if accelerator.num_processes > 1 else ''}. Time: model {shares['model']:.0%}, waiting for "
        f"pictures {shares['pictures']:.0%}, labels and files {shares['writing']:.0%}. Decoding one takes "
        f"{1000 * seconds['decoding'] / count:.1f} ms; workers a process: {workers}."
    )
    if shares["model"] >= shares["pictures"]:
        accelerator.print("The model is the bottleneck, not decoding.")
    else:
        accelerator.print("Decoding is the bottleneck: raise --num_workers, or store smaller pictures.")


def run(args: argparse.Namespace) -> None:
    """Tags what has no record yet, prints, and writes sidecars and the list of unreadable pictures."""
    # Processes wait for the slowest, which may have the largest pictures.
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
        # One list for all, though pictures may come and go while it is made.
        todo, run_number = broadcast_object_list(plan)
        if isinstance(todo, str):
            raise ValueError(todo)
        lock.take(alone=False)
        accelerator.wait_for_everyone()
        share = todo[accelerator.process_index :: accelerator.num_processes]
        clock = _tag_share(args, model, processor, source, results, share, run_number, accelerator)
        accelerator.wait_for_everyone()
        report(clock, len(share), args.num_workers, accelerator)
        if accelerator.is_main_process:
            name = str if isinstance(source, DatasetSource) else lambda key: os.path.abspath(source.path(key))
            total, unreadable = summarise(results, name)
            print(f"{args.output}: {total:,} pictures, {unreadable:,} of them unreadable ({UNREADABLE_FILE}).")
        if args.sidecars:
            write_sidecars(source, results, args, accelerator)
    finally:
        lock.release()
    accelerator.end_training()


def _plan(args, model: PreTrainedModel, source, results: Results, lock: FolderLock) -> list:
    """The keys that have no record and the number of this run; or, in place of the keys, why there can be none."""
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
    print(f"{args.source}: {len(source.keys):,} pictures, {len(todo):,} of them to be tagged.")
    return [todo, results.next_run()]


def _tag_share(args, model, processor, source, results, share, run_number, accelerator: Accelerator) -> Clock:
    """Tags one process's pictures."""
    loader = torch.utils.data.DataLoader(
        Pictures(source, share, processor),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if args.num_workers else None,
    )
    writer = PartWriter(results, run_number, accelerator.process_index, args.part_size)
    clock = Clock()
    words = "Tagging" if accelerator.num_processes == 1 else f"Tagging, process 1 of {accelerator.num_processes}"
    bar = tqdm(total=len(share), desc=words, unit="img", disable=not accelerator.is_main_process or not share)
    try:
        for records in tag(model, processor, loader, accelerator, args.threshold, args.top_k, clock):
            for record in records:
                writer.add({source.key_name: record.pop("key"), **record})
            bar.update(len(records))
    finally:
        bar.close()
        writer.flush()  # after Ctrl-C as well
    return clock


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused, 130 after Ctrl-C."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parser = argparse.ArgumentParser(
        prog="python -m training.tag",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id")
    parser.add_argument("source", metavar="SOURCE", help="folder, list of files, or data set")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write into")
    parser.add_argument("--revision", help="commit of a CHECKPOINT on the Hub")
    parser.add_argument(
        "--threshold",
        type=number_or_auto,
        default="auto",
        help="a number, or auto: the thresholds in the checkpoint; default: auto",
    )
    parser.add_argument("--top_k", type=int, help="at most so many labels a picture; default: all above the threshold")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="default: parquet")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures per device; default: 32")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=max(1, min(8, cores // processes - 1)),
        help="processes that decode pictures, per device; default: by the cores, here %(default)s",
    )
    parser.add_argument("--part_size", type=int, default=1000, help="pictures per part file; default: 1000")
    parser.add_argument("--sidecars", nargs="+", choices=list(WRITERS), default=[], help="default: none")
    parser.add_argument(
        "--overwrite_sidecars",
        action="store_true",
        help="replace text files that exist, and the keywords in XMP files that do",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin again, without the parts that are in OUTPUT")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--image_column", default="image", help="of a data set; default: image")
    parser.add_argument("--dataset_revision", help="commit of a data set on the Hub")
    parser.add_argument("--dataset_config", help="configuration of a data set on the Hub")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; what is tagged is kept, and the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
