"""When a run saves, and what: the state is copied at once and written while training goes on."""

from dataclasses import asdict

import torch
from accelerate.utils import gather_object

from ..checkpoint.atomic import atomic_folder
from ..checkpoint.folder import CheckpointError, save_checkpoint, write_marker
from ..checkpoint.series import checkpoints, prune, remove_set_aside
from ..checkpoint.state import copy_training_state
from .run import Run


def state_of(run: Run) -> dict:
    """What a checkpoint holds beside the progress, and a resumed run gets back."""
    return {
        "model": run.plain_model,
        "optimizer": run.stateful_optimizer,
        "scheduler": run.scheduler,
        "ema": run.ema,
        "scaler": run.accelerator.scaler,
    }


def save(run: Run, *, best: bool = False) -> None:
    """Copy the state of now, and have it written beside the training: a checkpoint and, where told, best/.

    Returns when the copy is made and the write before this one has ended.

    Raises:
        CheckpointError: that write failed.
    """
    check_writer(run, wait=True)
    config, model, processor = run.config, run.plain_model, run.processor
    if run.accelerator.is_main_process:
        run.progress.log_bytes = run.log.size()
    if run.stream is not None:
        run.progress.stream = gather_object([run.stream.state])
    keep = run.accelerator.is_main_process
    state = copy_training_state(**state_of(run), progress=asdict(run.progress), keep=keep)
    folders = [run.folder / f"checkpoint-{run.progress.step}"]
    if best:  # before the checkpoint that says so
        folders.insert(0, run.folder / "best")
    facts = {"step": run.progress.step, "epoch": run.progress.epoch}

    def write() -> None:
        for target in folders:
            with atomic_folder(target) as folder:
                save_checkpoint(folder, model, processor, state.weights())
                if target.name != "best":
                    state.write(folder)
                write_marker(folder, **facts)
        prune(run.folder, config.keep_checkpoints)
        remove_set_aside(run.folder)

    if run.accelerator.is_main_process:
        run.writer.submit(write)


def check_writer(run: Run, *, wait: bool) -> None:
    """Raise, on every process, the CheckpointError that the write in hand ended with; `wait` for its end."""
    error = run.writer.error(wait=wait)
    failed = torch.tensor(float(error is not None), device=run.accelerator.device)
    if run.accelerator.reduce(failed, "sum").item():
        kept = [folder.name for folder in checkpoints(run.folder)]
        raise CheckpointError(
            f"A checkpoint could not be written to {run.folder} ({error or 'see the main process'}): make room or "
            f"repair the disk, then --resume continues from {kept[0]}."
            if kept
            else f"No checkpoint could be written to {run.folder} ({error or 'see the main process'})."
        )
