"""Train a multi-label image classifier on any Hugging Face dataset.

    accelerate launch -m training.train CONFIG.yaml [--key value ...]

    # a folder of photographs with metadata.jsonl, on two CPU cores (accelerate takes one thread unless told)
    accelerate launch --num_cpu_threads_per_process 2 -m training.train training/configs/photos.yaml --dataset FOLDER
    # eight GPUs
    accelerate launch --multi_gpu --num_processes 8 -m training.train training/configs/hsvlt_small_coco.yaml
    # after an interruption
    accelerate launch -m training.train runs/NAME/config.yaml --resume

Every option, with the reason for its default, is in training/config.py. The run folder holds config.yaml, log.jsonl,
best/ (the checkpoint to use), checkpoint-STEP/ (to resume from) and results.json. SIGINT (Ctrl-C) and SIGTERM end a run
after the step in hand, with everything saved and exit status 0.
"""

import gc
import sys
import traceback

import transformers

from .checkpoint.folder import CheckpointError
from .checkpoint.series import checkpoints
from .config import describe_options, parse_config
from .loop.finish import finish
from .loop.fit import fit
from .loop.interruption import Stopped
from .loop.run import Run
from .loop.setup import setup


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all is done, or when SIGINT or SIGTERM ended it with everything saved; 2 when the run was refused, 1 when
        it broke, 130 when a second signal ended it at once.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "-h" in arguments or "--help" in arguments:
        print(f"{__doc__}\nOptions, their defaults, and why:\n\n{describe_options()}")
        return 0
    transformers.utils.logging.disable_progress_bar()  # one bar, ours
    try:
        run = setup(parse_config(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = 0
    try:
        with run.stop:
            fit(run)
            finish(run)
    except Stopped:
        _say_what_is_kept(run, f"Stopped by {run.stop.signal or 'a signal to another process'}")
    except (FloatingPointError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        traceback.clear_frames(error.__traceback__)  # the writer may keep the error, and its frames the loaders
        status = 1
    except KeyboardInterrupt:
        _say_what_is_kept(run, "Interrupted")
        status = 130
    finally:
        run.writer.close()
        # DistributedDataParallel must not hold the last reference to the process group: it would drop that with
        # Python's lock in hand, join gloo's threads, and hang where one of them waits for the lock (torch 2.13).
        (run.model,) = run.accelerator.free_memory(run.model)
        # A loader that is collected ends its workers. Python itself would send them a SIGTERM, which they do not heed,
        # and wait for them without end.
        run.loaders.clear()
        gc.collect()
        run.held.close()
    if status == 0:
        run.accelerator.end_training()
    return status


def _say_what_is_kept(run: Run, what: str) -> None:
    if not run.accelerator.is_main_process:
        return
    run.writer.error(wait=True)
    kept = checkpoints(run.folder)
    if kept:
        words = f"{kept[0]} is whole; continue with `{run.folder}/config.yaml --resume`"
    else:
        words = "before the first save; there is nothing to continue from"
    print(f"\n{what} at step {run.progress['step']}: {words}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
