"""A run continues from its newest good checkpoint, exactly."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..checkpoint.atomic import move_aside
from ..checkpoint.folder import CheckpointError, verify
from ..checkpoint.loading import still_loads
from ..checkpoint.series import newest_good, recover_run
from ..checkpoint.state import load_training_state, read_progress
from .run import Progress, Run
from .saving import state_of


def find_source(folder: Path, accelerator: Accelerator) -> Path:
    """The checkpoint to resume from; one process looks, since the hashes of all files are checked.

    Raises:
        FileNotFoundError, ValueError: there is none, or none that is good.
    """
    found: list = [None, None]
    if accelerator.is_main_process:
        recover_run(folder)
        try:
            found[0] = newest_good(folder)
        except (CheckpointError, FileNotFoundError) as error:
            found[1] = error
    path, error = broadcast_object_list(found)
    if error is not None:
        raise error if isinstance(error, FileNotFoundError) else ValueError(str(error))
    return path


def restore(run: Run, source: Path) -> None:
    """Continue from `source`, exactly: weights, average, optimizer, schedule, place in the epoch, scores.

    Raises:
        ValueError: it was another run (other labels, data, options, number of steps or batches), and `resume_despite`
            does not say so.
    """
    saved, new = read_progress(source), run.progress
    same = {name: getattr(new, name) for name in ("label_names", "dataset", "total_steps", "batches")}
    for key, value in same.items():
        if saved[key] != value and key not in run.config.resume_despite:
            words = " (processes, images a batch, batches a step, seed)" if key == "batches" else ""
            raise _other(f"{run.folder} was trained with {key} {saved[key]!r}, not {value!r}{words}", key)
    _compare_options(run, saved.get("options") or new.options)
    same["options"] = new.options
    saved = load_training_state(source, **state_of(run))
    run.progress = Progress(**saved | same)
    if saved["batches"] != new.batches:  # the same images of the epoch are done, but for a part of a step
        images = saved["batch"] * saved["batches"][0] * saved["batches"][1]
        accumulated = run.config.gradient_accumulation_steps
        run.progress.batch = images // (new.batches[0] * new.batches[1] * accumulated) * accumulated
    if saved["dataset"] != new.dataset:
        run.progress.batch = 0
        run.progress.stream = None
    if run.stream is not None and run.progress.stream:
        run.stream.restore(run.progress.stream)
    lost = False
    if run.progress.best_epoch is not None and run.accelerator.is_main_process:
        lost = _is_lost(run.folder / "best")
    (lost,) = broadcast_object_list([lost])
    if lost:
        run.progress.best_mAP = run.progress.best_epoch = None


def _other(words: str, allowed_by: str) -> ValueError:
    return ValueError(
        f"{words}: resume with the options in its config.yaml, allow the change with --resume_despite "
        f"'[{allowed_by}]', or start a new run from its weights with --init_from."
    )


def _compare_options(run: Run, before: dict) -> None:
    """
    Raises:
        ValueError: an option that shapes what is learned has changed, and `resume_despite` does not say so.
    """
    now = json.loads(json.dumps(run.progress.options))
    for name in sorted(before | now):
        if before.get(name) == now.get(name):
            continue
        words = f"{run.folder} was trained with {name} {before.get(name)!r}, not {now.get(name)!r}"
        if "options" not in run.config.resume_despite:
            raise _other(words, "options")
        run.accelerator.print(f"{words}, from here on.")


def _is_lost(best: Path) -> bool:
    """Whether the best epoch has to be chosen anew. A best/ that is not what was written is moved aside, not replaced;
    where its weights are, it stays: somebody edited its config.json."""
    if not best.is_dir():
        kept = f" ({move_aside(best, 'damaged').name} is no folder, and kept)" if best.exists() else ""
        print(f"{best} is missing{kept}: the best epoch is chosen anew.", file=sys.stderr)
        return True
    try:
        verify(best)
    except CheckpointError as error:
        if still_loads(best):
            print(f"{error}, but its weights are, so it stays the best.", file=sys.stderr)
            return False
        aside = move_aside(best, "damaged")
        print(f"{error}: kept as {aside.name}, and the best epoch is chosen anew.", file=sys.stderr)
        return True
    return False
