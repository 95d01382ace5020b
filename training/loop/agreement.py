"""What every process does at the same step: stop, or leave out a step that is not finite."""

import math
import sys
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .run import Run

MAX_SKIPPED_STEPS = 10  # one after the other: by then it is the run that is wrong, not an image


class BatchLoss(NamedTuple):
    loss: torch.Tensor  # the batch's part of the step's loss
    rows: torch.Tensor  # its images


class Found(NamedTuple):
    """What holds on any process."""

    finite: bool
    stop: bool
    save_failed: bool
    unreadable: bool  # images of a stream, or their labels


def clip_gradients(run: Run) -> torch.Tensor:
    """The norm of all gradients, before they are clipped. Those of a candidate scorer, beside which all else learns as
    without it, are clipped by themselves, and not in it unless they are not finite."""
    limit = run.config.max_grad_norm or math.inf
    scorer = getattr(run.plain_model, "candidate_scorer", None)
    if scorer is None or run.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _whole(run.accelerator.clip_grad_norm_(run.model.parameters(), limit))
    apart = set(scorer.parameters())
    norm = run.accelerator.clip_grad_norm_([each for each in run.model.parameters() if each not in apart], limit)
    return _whole(norm) + 0 * _whole(torch.nn.utils.clip_grad_norm_(apart, limit))


def _whole(norm: torch.Tensor | float) -> torch.Tensor:
    """FSDP2's is divided, DeepSpeed's a number."""
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def agree(run: Run, losses: list[BatchLoss], norm: torch.Tensor) -> Found:
    """What every process has to know at the same step: was it finite, is a stop wanted, did a save fail?"""
    # With fp16 an infinite gradient is ordinary: the scaler skips the step and lowers its scale.
    fine = torch.stack([loss for loss, _ in losses]).isfinite().all()
    if run.accelerator.scaler is None:
        fine = fine & torch.isfinite(norm)
    flags = [~fine, run.stop.signal is not None, run.writer.error(wait=False) is not None]
    flags.append(run.stream is not None and bool(run.stream.problems or run.stream.fault))
    flags = torch.stack([torch.as_tensor(flag, device=fine.device).float() for flag in flags])
    broken, stop, failed, unreadable = run.accelerator.reduce(flags, "sum").tolist()
    return Found(finite=not broken, stop=bool(stop), save_failed=bool(failed), unreadable=bool(unreadable))


def leave_out(run: Run, losses: list[BatchLoss]) -> None:
    """Go on without a step that is not finite, and say which images it had.

    Raises:
        FloatingPointError: it is to end the run, or there were too many one after the other.
    """
    named, progress = run.train_data.split.row_name, run.progress
    names = gather_object([named(row) for loss, rows in losses if not loss.isfinite() for row in rows.tolist()])
    what = "loss" if names else "gradient"
    names = names or gather_object([named(row) for _, rows in losses for row in rows.tolist()])
    listing = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
    message = (
        f"The {what} is not finite at step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.batch}: "
        f"{listing})"
    )
    if run.config.on_nonfinite == "stop":
        raise FloatingPointError(
            f"{message}: look at these images and labels, lower learning_rate, lengthen the warm-up, lower "
            "max_grad_norm, or train in bf16 or fp32 in place of fp16; --resume continues from the last good save, "
            "--on_nonfinite skip leaves such steps out."
        )
    if run.accelerator.is_main_process:
        tqdm.write(f"{message}: left out.", file=sys.stderr)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.update()
    run.scheduler.step()
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row == MAX_SKIPPED_STEPS:
        raise FloatingPointError(f"{MAX_SKIPPED_STEPS} steps one after the other were not finite, see above.")
