"""Training until the steps are done: the step, the epoch, the end."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from tqdm.auto import tqdm

from .agreement import BatchLoss, agree, clip_gradients, leave_out
from .frozen import loader_name, set_training_mode
from .interruption import Stopped
from .run import Progress, Run
from .saving import check_writer, save
from .step import augmented, known_labels
from .streams import leave_out_unreadable
from .validation import validate


def fit(run: Run) -> None:
    """Train until the steps are done or, with `early_stopping_patience`, validation mAP stops rising. Checkpoints and
    best/ are kept up to date.

    Nothing random is drawn from a generator that lives on from step to step: each batch seeds all generators from
    (seed, epoch, batch, process). A resumed run therefore needs no generator states to continue exactly.

    Raises:
        Stopped: by SIGINT or SIGTERM; everything is saved.
        FloatingPointError: the loss or the gradient is not finite. Nothing of that step is saved.
        CheckpointError: a checkpoint could not be written; those before it stay.
    """
    accelerator, progress = run.accelerator, run.progress
    bar = tqdm(
        total=run.total_steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        show(bar, progress)
        try:
            # An interrupted epoch that had begun is still validated, even when no step is left.
            while (progress.batch or progress.step < run.total_steps) and not _stops_early(run):
                if progress.step < run.total_steps:
                    train_epoch(run, bar)
                is_best = validate(run)
                show(bar, progress)
                progress.epoch, progress.batch = progress.epoch + 1, 0
                save(run, best=is_best)
            if progress.best_epoch is None:  # best/ was lost, and no epoch is left to make another
                validate(run)
                save(run, best=True)
        except Stopped:
            save(run)
            check_writer(run, wait=True)
            raise
        check_writer(run, wait=True)
    if progress.step < run.total_steps:
        accelerator.print(f"Stopped early: no better validation mAP since epoch {progress.best_epoch}.")


def show(bar: tqdm, progress: Progress, **values: float) -> None:
    """Beside the bar: what was given, and the best score once there is one."""
    bar.set_postfix(values if progress.best_mAP is None else {**values, "best_mAP": progress.best_mAP})


def _stops_early(run: Run) -> bool:
    patience, best_epoch = run.config.early_stopping_patience, run.progress.best_epoch
    return None not in (patience, best_epoch) and run.progress.epoch - best_epoch >= patience


def train_epoch(run: Run, bar: tqdm) -> None:
    """The steps of an epoch, from `progress.batch` on."""
    config, progress = run.config, run.progress
    set_training_mode(run)
    bar.set_description(f"epoch {progress.epoch + 1}")
    log = StepLog(run, bar)
    for batches in batches_of_steps(run):
        learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
        losses = backward(run, batches)
        norm = clip_gradients(run)
        found = agree(run, losses, norm)
        if found.unreadable:
            leave_out_unreadable(run)
        if found.finite:
            update_weights(run, norm)
        else:
            leave_out(run, losses)
        run.optimizer.zero_grad()
        progress.step += 1
        bar.update()
        log.step(losses, norm, learning_rate)
        if found.save_failed:
            check_writer(run, wait=True)
        if found.stop:
            raise Stopped
        if progress.step == run.total_steps:
            break
        if config.save_every_steps and progress.step % config.save_every_steps == 0:
            save(run)


def batches_of_steps(run: Run) -> Iterator[list[dict]]:
    """Gives for each remaining step of the epoch its list of `gradient_accumulation_steps` batches, or what is left."""
    if run.stream is not None:
        batches = run.stream.take(len(run.stream) - run.progress.batch)
    else:
        loader = run.loaders[loader_name(run, "train")]
        if run.progress.batch:
            loader = run.accelerator.skip_first_batches(loader, run.progress.batch)
        loader.set_epoch(run.progress.epoch)
        run.train_data.set_epoch(run.progress.epoch)
        batches = iter(loader)
    return iter(lambda: list(islice(batches, run.config.gradient_accumulation_steps)), [])


def backward(run: Run, batches: list[dict]) -> list[BatchLoss]:
    """Compute the gradient of the step's loss: the mean over every known label in all its batches on all processes."""
    accelerator = run.accelerator
    known, losses = known_labels(run, batches), []
    for batch in batches:
        accelerator.sync_gradients = batch is batches[-1]
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(run.model):
            inputs, labels = augmented(run, batch, run.progress.batch)
            loss = run.model(**inputs, labels=labels, num_items_in_batch=known).loss
            # The gradients of processes are averaged, and accelerate divides by the batches of a step; but these
            # losses are parts of the step's mean, to be added up.
            loss = loss * accelerator.num_processes
            accelerator.backward(loss * run.config.gradient_accumulation_steps)
        losses.append(BatchLoss(loss.detach(), batch["index"]))
        run.progress.batch += 1
    return losses


def update_weights(run: Run, norm: torch.Tensor) -> None:
    """A step of the optimizer and, where it was one, of the schedule and the weight average."""
    run.optimizer.step()
    if norm.isfinite():  # fp16 skips a step that overflowed; accelerate does not see it of a fused AdamW
        run.progress.skipped_in_a_row = 0
        run.scheduler.step()
        if run.ema is not None:
            run.ema.update_parameters(run.plain_model)


class StepLog:
    """Logs a step of every `log_every_steps`, with the speed since the last one that was logged."""

    def __init__(self, run: Run, bar: tqdm):
        self.run, self.bar = run, bar
        self.images, self.start = 0, time.perf_counter()

    def step(self, losses: list[BatchLoss], norm: torch.Tensor, learning_rate: float) -> None:
        run, accelerator, progress = self.run, self.run.accelerator, self.run.progress
        self.images += sum(len(rows) for _, rows in losses)
        if progress.step % run.config.log_every_steps:
            return
        seconds = time.perf_counter() - self.start
        values = {
            "epoch": progress.epoch + progress.batch / len(run.loaders["train"]),
            "train/loss": accelerator.reduce(sum(loss for loss, _ in losses), "mean").item(),
            "train/grad_norm": norm.item(),
            "train/learning_rate": learning_rate,
            "train/skipped_steps": progress.skipped_steps,
            "train/images_per_second": self.images * accelerator.num_processes / seconds,
        }
        if run.stream is not None:
            values["train/unreadable_images"] = progress.unreadable
        if accelerator.scaler is not None:
            values["train/grad_scale"] = accelerator.scaler.get_scale()
        accelerator.log(values, step=progress.step)
        show(self.bar, progress, loss=values["train/loss"])
        self.images, self.start = 0, time.perf_counter()
