"""What a run needs to train on a stream."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from ..checkpoint.state import read_progress
from ..config import TrainingConfig
from ..data.rows import Loaded
from ..data.stream_loader import StreamDataset, StreamLoader
from ..data.stream_parts import load_streamed, stream_label_names
from ..options import DatasetOptions, dataset_options
from ..say import counted
from .run import Run


def open_stream(config: TrainingConfig, splits: Sequence[str], accelerator: Accelerator, source: Path | None) -> Loaded:
    """Train as a stream, and a part of the other splits.

    Args:
        source: The checkpoint to go on from, which knows the label names.

    Raises:
        ValueError, OSError: in one sentence, what is wrong with it and what to do.
    """
    found: list = [None, None]
    if accelerator.is_main_process:  # for it may read all labels, which a resumed run has behind it
        try:
            found[0] = stream_label_names(config, None if source is None else read_progress(source)["label_names"])
        except (ValueError, OSError) as error:
            found[1] = error
    names, error = broadcast_object_list(found)
    if error is not None:
        raise error
    options = DatasetOptions(dataset=config.dataset, **dataset_options(config) | {"label_names": names})
    return load_streamed(options, splits, train=True)


def stream_loader(config: TrainingConfig, dataset: StreamDataset, accelerator: Accelerator) -> StreamLoader:
    """The batches of one process.

    Raises:
        ValueError: nobody says how long an epoch is.
    """
    steps = config.epoch_steps
    if steps is None:
        rows = dataset.split.shards.count()
        if rows is None:
            raise ValueError(
                f"Only reading all of {config.dataset} would tell how many images it has: say with epoch_steps how "
                "many steps an epoch is."
            )
        images = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        steps = max(1, math.ceil(rows / images))
    return StreamLoader(
        dataset,
        batch_size=config.batch_size,
        epoch_batches=steps * config.gradient_accumulation_steps,
        seed=config.seed,
        buffer=config.shuffle_buffer,
        num_workers=config.workers,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        device=accelerator.device,
    )


def leave_out_unreadable(run: Run) -> None:
    """Count and name the images of a stream that some process could not read in this step; they taught nothing.

    Raises:
        ValueError: labels that cannot be read, or images where that is to end the run; on every process.
    """
    stream, progress = run.stream, run.progress
    problems, faults = gather_object(stream.problems), gather_object([stream.fault] if stream.fault else [])
    stream.problems, stream.fault = [], None
    if faults:
        raise ValueError(faults[0])
    listing = "; ".join(f"{name}: {reason}" for name, reason in problems[:20])
    listing += f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    if run.config.on_unreadable == "error":
        raise ValueError(
            f"{counted(len(problems), 'image')} of step {progress.step + 1} cannot be read ({listing}): repair or "
            "remove them, or leave such images out with --on_unreadable skip; --resume continues from the last good "
            "save."
        )
    progress.unreadable += len(problems)
    if run.accelerator.is_main_process:
        tqdm.write(f"Left out {counted(len(problems), 'image')} that cannot be read ({listing}).", file=sys.stderr)
        run.log.log({"unreadable": [name for name, _ in problems]}, step=progress.step + 1)
