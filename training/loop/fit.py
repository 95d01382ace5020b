"""Training until the steps are done: the step, the epoch, the end."""

import math
import time
from contextlib import nullcontext
from itertools import islice

import torch
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..data.batches import normalize_pixels
from .agreement import agree, name_nonfinite
from .interruption import Stopped
from .run import Run
from .saving import check_writer, save
from .step import augmented, known_labels
from .validation import validate

MAX_SKIPPED_STEPS = 10  # one after the other: by then it is the run that is wrong, not an image


def fit(run: Run) -> None:
    """Train until the steps are done or validation mAP stops rising; keep checkpoints and best/ up to date.

    Nothing random is drawn from a generator that lives on from step to step: each batch seeds all generators from
    (seed, epoch, batch, process). A resumed run therefore needs no generator states to continue exactly.

    Raises:
        Stopped: by SIGINT or SIGTERM; everything is saved.
        FloatingPointError: the loss or the gradient is not finite. Nothing of that step is saved.
        CheckpointError: a checkpoint could not be written; those before it stay.
    """
    accelerator, progress = run.accelerator, run.progress
    bar = tqdm(
        total=run.total_steps, initial=progress["step"], unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        try:
            # An epoch that has batches behind it is validated, even if no step is left.
            while (progress["batch"] or progress["step"] < run.total_steps) and not _stops_early(run):
                if progress["step"] < run.total_steps:
                    train_epoch(run, bar)
                is_best = validate(run)
                progress["epoch"], progress["batch"] = progress["epoch"] + 1, 0
                save(run, best=is_best)
            if progress["best_epoch"] is None:  # best/ was lost, and no epoch is left to make another
                validate(run)
                save(run, best=True)
        except Stopped:
            save(run)
            check_writer(run, wait=True)
            raise
        check_writer(run, wait=True)
    if progress["step"] < run.total_steps:
        accelerator.print(f"Stopped early: no better validation mAP since epoch {progress['best_epoch']}.")


def _stops_early(run: Run) -> bool:
    patience, best_epoch = run.config.early_stopping_patience, run.progress["best_epoch"]
    return None not in (patience, best_epoch) and run.progress["epoch"] - best_epoch >= patience


def train_epoch(run: Run, bar: tqdm) -> None:
    """The steps of an epoch, from `progress["batch"]` on."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    epoch, loader = progress["epoch"], run.loaders["train"]
    if progress["batch"]:
        loader = accelerator.skip_first_batches(loader, progress["batch"])
    loader.set_epoch(epoch)
    run.train_data.set_epoch(epoch)
    run.model.train()
    bar.set_description(f"epoch {epoch + 1}")
    images, start = 0, time.perf_counter()
    iterator = iter(loader)
    for batches in iter(lambda: list(islice(iterator, config.gradient_accumulation_steps)), []):
        known = known_labels(run, batches)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # loss and rows of each batch of the step
        for batch in batches:
            accelerator.sync_gradients = batch is batches[-1]
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(run.model):
                pixel_values, labels = augmented(run, batch, progress["batch"])
                loss = run.model(
                    pixel_values=normalize_pixels(pixel_values, run.processor),
                    labels=labels,
                    num_items_in_batch=known,
                ).loss
                # The gradients of processes are averaged, and accelerate divides by the batches of a step; but these
                # losses are parts of the step's mean, to be added up.
                loss = loss * accelerator.num_processes
                accelerator.backward(loss * config.gradient_accumulation_steps)
            seen.append((loss.detach(), batch["index"]))
            progress["batch"] += 1
            images += len(labels)
        norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
        # FSDP2's is divided, DeepSpeed's a number.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        finite, stop, failed = agree(run, seen, norm)
        if finite:
            run.optimizer.step()
        else:
            name_nonfinite(run, seen)
            progress["skipped_steps"] += 1
            if accelerator.scaler is not None:
                accelerator.scaler.update()
        run.optimizer.zero_grad()
        progress["step"] += 1
        learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
        if not finite:
            run.scheduler.step()
            progress["skipped_in_a_row"] += 1
            if progress["skipped_in_a_row"] == MAX_SKIPPED_STEPS:
                raise FloatingPointError(f"{MAX_SKIPPED_STEPS} steps one after the other were not finite, see above.")
        elif norm.isfinite():  # fp16 skips a step that overflowed; accelerate does not see it of a fused AdamW
            progress["skipped_in_a_row"] = 0
            run.scheduler.step()
            if run.ema is not None:
                run.ema.update_parameters(run.plain_model)
        bar.update()
        if progress["step"] % config.log_every_steps == 0:
            seconds = time.perf_counter() - start
            values = {
                "epoch": epoch + progress["batch"] / len(run.loaders["train"]),
                "train/loss": accelerator.reduce(sum(loss for loss, _ in seen), "mean").item(),
                "train/grad_norm": norm.item(),
                "train/learning_rate": learning_rate,
                "train/skipped_steps": progress["skipped_steps"],
                "train/images_per_second": images * accelerator.num_processes / seconds,
            }
            if accelerator.scaler is not None:
                values["train/grad_scale"] = accelerator.scaler.get_scale()
            accelerator.log(values, step=progress["step"])
            bar.set_postfix(loss=values["train/loss"], best_mAP=progress["best_mAP"] or 0.0)
            images, start = 0, time.perf_counter()
        if failed:
            check_writer(run, wait=True)
        if stop:
            raise Stopped
        if progress["step"] == run.total_steps:
            break
        if config.save_every_steps and progress["step"] % config.save_every_steps == 0:
            save(run)
