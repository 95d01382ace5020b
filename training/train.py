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
import inspect
import json
import math
import shutil
import sys
import textwrap
import time
import traceback
from contextlib import nullcontext
from itertools import islice

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object, set_seed
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from modeling_hsvlt.losses_multilabel import UNKNOWN_LABEL

from .checkpoint.atomic import atomic_folder
from .checkpoint.folder import MARKER, CheckpointError, save_checkpoint, verify, write_marker
from .checkpoint.series import checkpoints
from .config import TrainingConfig, parse_config
from .data.batches import normalize_pixels
from .data.rows import row_namer
from .loop.interruption import Stopped
from .loop.optim import WarmupPlateau
from .loop.saving import check_writer, save
from .loop.setup import Run, setup
from .metrics.functional import multilabel_report, per_label_report
from .push import push_run
from .report.page import result_record, write_report
from .scoring.predict import predict
from .scoring.thresholds import fit_thresholds, store_thresholds, threshold_info

MAX_SKIPPED_STEPS = 10  # one after the other: by then it is the run that is wrong, not a picture


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
    pictures, start = 0, time.perf_counter()
    iterator = iter(loader)
    for batches in iter(lambda: list(islice(iterator, config.gradient_accumulation_steps)), []):
        known = _known_labels(run, batches)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # loss and rows of each batch of the step
        for batch in batches:
            accelerator.sync_gradients = batch is batches[-1]
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(run.model):
                pixel_values, labels = _augmented(run, batch, progress["batch"])
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
            pictures += len(labels)
        norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
        # FSDP2's is divided, DeepSpeed's a number.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        finite, stop, failed = _agree(run, seen, norm)
        if finite:
            run.optimizer.step()
        else:
            _name_nonfinite(run, seen)
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
                "train/pictures_per_second": pictures * accelerator.num_processes / seconds,
            }
            if accelerator.scaler is not None:
                values["train/grad_scale"] = accelerator.scaler.get_scale()
            accelerator.log(values, step=progress["step"])
            bar.set_postfix(loss=values["train/loss"], best_mAP=progress["best_mAP"] or 0.0)
            pictures, start = 0, time.perf_counter()
        if failed:
            check_writer(run, wait=True)
        if stop:
            raise Stopped
        if progress["step"] == run.total_steps:
            break
        if config.save_every_steps and progress["step"] % config.save_every_steps == 0:
            save(run)


def _augmented(run: Run, batch: dict, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, not yet normalised, and labels of batch `place` of the epoch; the same every time they are asked for."""
    seeds = np.random.SeedSequence((run.config.seed, run.progress["epoch"], place, run.accelerator.process_index))
    set_seed(int(seeds.generate_state(1)[0]))
    pixel_values, labels = batch["pixel_values"], batch["labels"].to_dense()
    if run.augmentation is not None:
        pixel_values, labels = run.augmentation(pixel_values / 255, labels)
        pixel_values = pixel_values * 255
    return pixel_values, _once(run, labels, place)


def _once(run: Run, labels: torch.Tensor, place: int) -> torch.Tensor:
    """Labels of batch `place` of the epoch, unknown where accelerate filled up the last batches of the processes with
    pictures from the first, so that no picture counts twice."""
    count, index, size = run.accelerator.num_processes, run.accelerator.process_index, run.config.batch_size
    left = len(run.train_data) % (size * count)
    if count == 1 or not left or place < len(run.loaders["train"]) - 1:
        return labels
    picture = index * size + torch.arange(len(labels), device=labels.device)
    return labels.masked_fill((picture >= left)[:, None], UNKNOWN_LABEL)


def _known_labels(run: Run, batches: list[dict]) -> torch.Tensor:
    """How many labels are known in the batches of a step, on all processes: each of them counts once in its loss."""
    mixup = run.augmentation is not None and run.augmentation.mixup
    known = 0
    for place, batch in enumerate(batches, run.progress["batch"]):
        labels = batch["labels"].to_dense()
        if mixup and (labels == UNKNOWN_LABEL).any():  # what is mixed with an unknown label is unknown as well
            labels = _augmented(run, batch, place)[1]
        known = known + (_once(run, labels, place) != UNKNOWN_LABEL).sum()
    return run.accelerator.reduce(known, "sum").clamp(min=1)


def _agree(run: Run, seen: list, norm: torch.Tensor) -> tuple[bool, bool, bool]:
    """What every process has to do at the same step: was it finite, is a stop wanted, did a save fail?"""
    # With fp16 an infinite gradient is ordinary: the scaler skips the step and lowers its scale.
    fine = torch.stack([loss for loss, _ in seen]).isfinite().all()
    if run.accelerator.scaler is None:
        fine = fine & torch.isfinite(norm)
    flags = [~fine, run.stop.signal is not None, run.writer.error(wait=False) is not None]
    flags = torch.stack([torch.as_tensor(flag, device=fine.device).float() for flag in flags])
    broken, stop, failed = run.accelerator.reduce(flags, "sum").tolist()
    return not broken, bool(stop), bool(failed)


def _name_nonfinite(run: Run, seen: list) -> None:
    """Say which pictures a step that is not finite had; raise where that is to end the run."""
    bad = [rows for loss, rows in seen if not loss.isfinite()]
    named = row_namer(run.train_data.split) if run.train_data.sparse_labels is not None else lambda row: f"row {row}"
    mine = [named(row) for rows in bad for row in rows.tolist()]
    names = gather_object(mine)
    what = "loss" if names else "gradient"
    names = names or gather_object([named(row) for _, rows in seen for row in rows.tolist()])
    listing = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
    message = (
        f"The {what} is not finite at step {run.progress['step'] + 1} (epoch {run.progress['epoch'] + 1}, batch "
        f"{run.progress['batch']}, train: {listing})"
    )
    if run.config.on_nonfinite == "stop":
        raise FloatingPointError(
            f"{message}: look at these pictures and labels, lower learning_rate, lengthen the warm-up, lower "
            "max_grad_norm, or train in bf16 or fp32 in place of fp16; --resume continues from the last good save, "
            "--on_nonfinite skip leaves such steps out."
        )
    if run.accelerator.is_main_process:
        tqdm.write(f"{message}: left out.", file=sys.stderr)


def evaluate(run: Run, model: torch.nn.Module, split: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Scores and labels (pictures, num_labels) of a whole split, and its metrics.

    Raises:
        Stopped: between two batches, by SIGINT or SIGTERM.
    """

    def stop() -> None:
        wanted = torch.tensor(float(run.stop.signal is not None), device=run.accelerator.device)
        if run.accelerator.reduce(wanted, "sum").item():
            raise Stopped

    with run.accelerator.autocast():
        scores, labels = predict(model, run.loaders[split], run.accelerator, before_batch=stop)
    return scores, labels, multilabel_report(scores, labels, groups=run.groups)


def validate(run: Run) -> bool:
    """End an epoch: score the validation split and log it. Returns whether it is the best so far."""
    progress, accelerator = run.progress, run.accelerator
    report = evaluate(run, run.evaluated_model, "validation")[2]
    if isinstance(run.scheduler, WarmupPlateau):
        run.scheduler.step_metric(report["mAP"])
    epoch = progress["epoch"] + 1
    values = {f"validation/{name}": value for name, value in report.items()}
    accelerator.log({"epoch": epoch, **values}, step=progress["step"])
    is_best = progress["best_mAP"] is None or report["mAP"] > progress["best_mAP"]
    if is_best:
        progress["best_mAP"], progress["best_epoch"] = report["mAP"], epoch
    if accelerator.is_main_process:
        tqdm.write(f"epoch {epoch}: validation mAP {report['mAP']:.4f}{' (best)' if is_best else ''}")
    return is_best


def finish(run: Run) -> dict:
    """Fit thresholds for the best checkpoint on validation, store them in it, score the test split once, publish.

    Returns:
        What results.json holds.
    """
    config, accelerator, folder = run.config, run.accelerator, run.folder / "best"
    accelerator.wait_for_everyone()
    if (folder / MARKER).exists():
        verify(folder)
    model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).to(accelerator.device)
    scores, labels, validation = evaluate(run, model, "validation")
    how = {"objective": config.threshold_objective, "target": config.threshold_target}
    fitted = fit_thresholds(scores, labels, **how, label_names=run.train_data.label_names)
    store_thresholds(model, fitted, threshold_info(labels, **how, dataset=config.dataset, split="validation"))
    run.processor.thresholds = model.config.thresholds
    results = {
        "best_epoch": run.progress["best_epoch"],
        "steps": run.progress["step"],
        "validation": validation,
        "validation_at_thresholds": multilabel_report(scores, labels, fitted, groups=run.groups),
        "thresholds": dict(zip(run.train_data.label_names, model.config.thresholds, strict=True)),
    }
    if run.groups is not None:
        positives = run.train_data.sparse_labels.positives().tolist()
        results["positives_in_train"] = dict(zip(run.train_data.label_names, positives, strict=True))
    if config.evaluate_test:
        test_scores, test_labels, results["test"] = evaluate(run, model, "test")
        results["test_at_thresholds"] = multilabel_report(test_scores, test_labels, fitted, groups=run.groups)
    if accelerator.is_main_process:
        with atomic_folder(folder) as new:
            if (folder / "label_context").is_dir():  # the adapter, of which the loaded model knows nothing
                shutil.copytree(folder / "label_context", new / "label_context")
            save_checkpoint(new, model, run.processor)
            write_marker(new, step=run.progress["step"], epoch=run.progress["best_epoch"])
        (run.folder / "results.json").write_text(json.dumps(results, indent=1))
        if config.report:
            _write_report(run, model, scores, labels, results["validation_at_thresholds"])
        if config.push_to_hub:
            push_run(run.folder, config.push_to_hub, private=config.hub_private)
    accelerator.print(
        f"The best checkpoint is {folder} (epoch {results['best_epoch']}): validation mAP {validation['mAP']:.4f}"
        + (f", test mAP {results['test']['mAP']:.4f}." if config.evaluate_test else ".")
    )
    return results


def _write_report(run: Run, model, scores: np.ndarray, labels: np.ndarray, metrics: dict) -> None:
    names, config = run.train_data.label_names, run.config
    counted = None if run.groups is None else ("train", run.train_data.sparse_labels.positives())
    record = result_record(
        metrics,
        checkpoint=str(run.folder / "best"),
        dataset=config.dataset,
        dataset_revision=config.dataset_revision,
        split="validation",
        threshold="auto",
        count_split=counted and counted[0],
    )
    per_label = per_label_report(scores, labels, np.array(model.config.thresholds), label_names=names)
    rows = run.loaders["validation"].dataset.split
    write_report(
        run.folder / "report", record, names, scores, labels, rows, per_label, model.config, counted,
        explained_by=(model, run.processor.image_processor),
    )  # fmt: skip
    run.accelerator.print(f"The report is {run.folder / 'report' / 'report.html'}.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all is done, or when SIGINT or SIGTERM ended it with everything saved; 2 when the run was refused, 1 when
        it broke, 130 when a second signal ended it at once.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "-h" in arguments or "--help" in arguments:
        options = inspect.getsource(TrainingConfig).partition(":\n")[2].partition("\n\n    def ")[0]
        print(f"{__doc__}\nOptions, their defaults, and why:\n\n{textwrap.dedent(options)}")
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
