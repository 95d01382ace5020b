"""Train a multi-label image classifier on any Hugging Face dataset.

    hsvlt train FOLDER                          your photographs, with the recipe `photos`
    hsvlt train RECIPE [DATASET] [--key value ...]
    hsvlt train runs/photos --resume            after an interruption

RECIPE is a YAML file, or one of

{recipes}

All GPUs of the machine are used, or what `accelerate config` was told; otherwise start it as
`accelerate launch --config_file FILE -m hsvlt_training.train ...` (in a checkout: -m training.train).

The run folder holds config.yaml, log.jsonl, best/ (the checkpoint to use), checkpoint-STEP/ (to resume from) and
results.json. SIGINT (Ctrl-C) and SIGTERM end a run after the step in hand, with everything saved and exit status 0.
"""

from __future__ import annotations

import gc
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .config import TrainingConfig, describe_options, parse_config
from .options import refuse, say_error
from .places import recipes
from .say import say_next

if TYPE_CHECKING:
    from .loop.run import Run


def train(config: TrainingConfig) -> dict:
    """A whole run, from Python.

    Returns:
        What results.json holds: the metrics of best/ in the run's folder.

    Raises:
        ValueError, OSError, FloatingPointError, CheckpointError: in one sentence, what was wrong and what to do.
        Stopped: by SIGINT or SIGTERM; everything is saved.
    """
    from accelerate.state import AcceleratorState, GradientState

    from .loop.finish import finish
    from .loop.fit import fit
    from .loop.setup import setup

    # A notebook is one process for many runs, and accelerate would keep the settings of the first.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=False)
    run = setup(config)
    with run.stop, _closing(run):
        fit(run)
        results = finish(run)
    run.accelerator.end_training()
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all is done, or when SIGINT or SIGTERM ended it with everything saved; 2 when the run was refused, 1 when
        it broke, 130 when a second signal ended it at once.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "-h" in arguments or "--help" in arguments:
        first = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in recipes().items()}
        lines = (f"    {name:<21} {re.split('[.:] |[.]$', words.lstrip('# '))[0]}" for name, words in first.items())
        print(__doc__.format(recipes="\n".join(lines)))
        print(f"Options, their defaults, and why:\n\n{describe_options()}")
        return 0
    try:
        config = parse_config(arguments)
        # After the options, so that what they have wrong is said at once.
        from .checkpoint.folder import CheckpointError
        from .data.batches import naming_dead_workers
        from .loop.finish import finish
        from .loop.fit import fit
        from .loop.interruption import Stopped
        from .loop.setup import setup

        run = setup(config)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("\nInterrupted before the first step: the same command starts again.", file=sys.stderr)
        return 130
    with run.stop, _closing(run):  # a signal while it closes would leave that half done
        try:
            with naming_dead_workers():
                fit(run)
                finish(run)
            _say_next(run)
        except Stopped:
            _say_what_is_kept(run, f"Stopped by {run.stop.signal or 'a signal to another process'}")
        except (FloatingPointError, CheckpointError, ValueError, OSError) as error:
            say_error(error)
            traceback.clear_frames(error.__traceback__)  # the writer may keep the error, and its frames the loaders
            return 1
        except KeyboardInterrupt:
            _say_what_is_kept(run, "Interrupted")
            return 130
    run.accelerator.end_training()
    return 0


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    try:
        yield
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


def _say_next(run: Run) -> None:
    if run.accelerator.is_main_process:
        how = ["--split", "validation", "--threshold", "auto", "--output", run.folder / "evaluation"]
        say_next("evaluate", run.folder, run.config.dataset, *how, like=run.config)
        say_next("tag", run.folder, "photo.jpg")


def _say_what_is_kept(run: Run, what: str) -> None:
    from .checkpoint.series import checkpoints

    if not run.accelerator.is_main_process:
        return
    run.writer.error(wait=True)
    kept = checkpoints(run.folder)
    if kept:
        words = f"{kept[0]} is whole; continue with: hsvlt train {shlex.quote(str(run.folder))} --resume"
    else:
        words = "before the first save; there is nothing to continue from"
    print(f"\n{what} at step {run.progress.step}: {words}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
