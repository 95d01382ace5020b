"""What every process does at the same step: stop, or leave out a step that is not finite."""

import sys

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .run import Run


def agree(run: Run, seen: list, norm: torch.Tensor) -> tuple[bool, bool, bool]:
    """What every process has to do at the same step: was it finite, is a stop wanted, did a save fail?"""
    # With fp16 an infinite gradient is ordinary: the scaler skips the step and lowers its scale.
    fine = torch.stack([loss for loss, _ in seen]).isfinite().all()
    if run.accelerator.scaler is None:
        fine = fine & torch.isfinite(norm)
    flags = [~fine, run.stop.signal is not None, run.writer.error(wait=False) is not None]
    flags = torch.stack([torch.as_tensor(flag, device=fine.device).float() for flag in flags])
    broken, stop, failed = run.accelerator.reduce(flags, "sum").tolist()
    return not broken, bool(stop), bool(failed)


def name_nonfinite(run: Run, seen: list) -> None:
    """Say which images a step that is not finite had; raise where that is to end the run."""
    bad = [rows for loss, rows in seen if not loss.isfinite()]
    named = run.train_data.split.row_name
    mine = [named(row) for rows in bad for row in rows.tolist()]
    names = gather_object(mine)
    what = "loss" if names else "gradient"
    names = names or gather_object([named(row) for _, rows in seen for row in rows.tolist()])
    listing = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
    message = (
        f"The {what} is not finite at step {run.progress['step'] + 1} (epoch {run.progress['epoch'] + 1}, batch "
        f"{run.progress['batch']}: {listing})"
    )
    if run.config.on_nonfinite == "stop":
        raise FloatingPointError(
            f"{message}: look at these images and labels, lower learning_rate, lengthen the warm-up, lower "
            "max_grad_norm, or train in bf16 or fp32 in place of fp16; --resume continues from the last good save, "
            "--on_nonfinite skip leaves such steps out."
        )
    if run.accelerator.is_main_process:
        tqdm.write(f"{message}: left out.", file=sys.stderr)
