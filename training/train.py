"""Train a multi-label image classifier on any Hugging Face dataset.

    accelerate launch -m training.train CONFIG.yaml [--key value ...]

    # a folder of photographs with metadata.jsonl, on two CPU cores (accelerate takes one thread unless told)
    accelerate launch --num_cpu_threads_per_process 2 -m training.train training/configs/photos.yaml --dataset FOLDER
    # eight GPUs
    accelerate launch --multi_gpu --num_processes 8 -m training.train training/configs/hsvlt_small_coco.yaml
    # after an interruption
    accelerate launch -m training.train runs/NAME/config.yaml --resume

Every option, with the reason for its default, is in training/config.py. The run folder holds config.yaml, log.jsonl,
best/ (the checkpoint to use), last/ (to resume from) and results.json.
"""

import inspect
import json
import math
import sys
import textwrap
import time

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from .checkpoint import atomic_folder, push_checkpoint, read_progress, save_checkpoint, save_training_state
from .config import TrainingConfig, parse_config
from .data import normalize_pixels
from .evaluate import predict
from .metrics.functional import multilabel_report
from .optim import WarmupPlateau
from .run import Run, setup
from .thresholds import fit_thresholds, store_thresholds, threshold_info


def fit(run: Run) -> None:
    """Train until the steps are done or validation mAP stops rising; keep best/ and last/ up to date.

    Nothing random is drawn from a generator that lives on from step to step: each batch seeds all generators from
    (seed, epoch, batch, process). A resumed run therefore needs no generator states to continue exactly.

    Raises:
        FloatingPointError: the loss or the gradient is not finite. Nothing of that step is saved.
    """
    config, accelerator, progress = run.config, run.accelerator, run.progress
    bar = tqdm(
        total=run.total_steps, initial=progress["step"], unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )  # fmt: skip
    while progress["step"] < run.total_steps and not _stops_early(run):
        epoch, loader = progress["epoch"], run.loaders["train"]
        if progress["batch"]:
            loader = accelerator.skip_first_batches(loader, progress["batch"])
        loader.set_epoch(epoch)
        run.train_data.set_epoch(epoch)
        run.model.train()
        bar.set_description(f"epoch {epoch + 1}")
        loss_sum, pictures, start = 0.0, 0, time.perf_counter()
        for batch in loader:
            seeds = np.random.SeedSequence((config.seed, epoch, progress["batch"], accelerator.process_index))
            set_seed(int(seeds.generate_state(1)[0]))
            with accelerator.accumulate(run.model):
                pixel_values, labels = batch["pixel_values"], batch["labels"]
                if run.augmentation is not None:
                    pixel_values, labels = run.augmentation(pixel_values / 255, labels)
                    pixel_values = pixel_values * 255
                loss = run.model(pixel_values=normalize_pixels(pixel_values, run.processor), labels=labels).loss
                accelerator.backward(loss)
                norm = None
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
                _check_finite(run, loss, norm, batch)
                run.optimizer.step()
                run.optimizer.zero_grad()
            progress["batch"] += 1
            pictures += len(labels)
            loss_sum += loss.detach() / config.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            progress["step"] += 1
            learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradient overflowed
                run.scheduler.step()
                if run.ema is not None:
                    run.ema.update_parameters(run.plain_model)
            bar.update()
            if progress["step"] % config.log_every_steps == 0:
                seconds = time.perf_counter() - start
                values = {
                    "epoch": epoch + progress["batch"] / len(run.loaders["train"]),
                    "train/loss": accelerator.reduce(loss_sum, "mean").item(),
                    "train/grad_norm": norm.item(),
                    "train/learning_rate": learning_rate,
                    "train/pictures_per_second": pictures * accelerator.num_processes / seconds,
                }
                accelerator.log(values, step=progress["step"])
                bar.set_postfix(loss=values["train/loss"], best_mAP=progress["best_mAP"] or 0.0)
                pictures, start = 0, time.perf_counter()
            loss_sum = 0.0
            if progress["step"] == run.total_steps:
                break
            if config.save_every_steps and progress["step"] % config.save_every_steps == 0:
                save_last(run)
        progress["epoch"], progress["batch"] = epoch + 1, 0
        validate(run)
        save_last(run)
    bar.close()
    if progress["step"] < run.total_steps:
        accelerator.print(f"Stopped early: no better validation mAP since epoch {progress['best_epoch']}.")


def _stops_early(run: Run) -> bool:
    patience, best_epoch = run.config.early_stopping_patience, run.progress["best_epoch"]
    return None not in (patience, best_epoch) and run.progress["epoch"] - best_epoch >= patience


def _check_finite(run: Run, loss: torch.Tensor, norm: torch.Tensor | None, batch: dict) -> None:
    # With fp16 an infinite gradient is ordinary: the scaler skips the step and lowers its scale.
    fine = torch.isfinite(loss.detach())
    if norm is not None and run.accelerator.scaler is None:
        fine = fine & torch.isfinite(norm)
    if not fine:
        what = "loss" if not torch.isfinite(loss) else "gradient"
        raise FloatingPointError(
            f"The {what} is not finite at step {run.progress['step'] + 1} (epoch {run.progress['epoch'] + 1}, rows "
            f"{batch['index'].tolist()} of the train split): lower learning_rate, lengthen the warm-up, lower "
            "max_grad_norm, or train in bf16 or fp32 in place of fp16; --resume continues from the last good save."
        )


def evaluate(run: Run, model: torch.nn.Module, split: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Scores and labels (pictures, num_labels) of a whole split, and its metrics."""
    with run.accelerator.autocast():
        scores, labels = predict(model, run.loaders[split], run.accelerator)
    return scores, labels, multilabel_report(scores, labels, groups=run.groups)


def validate(run: Run) -> None:
    """End an epoch: score the validation split, log it, keep the checkpoint if it is the best."""
    progress, accelerator = run.progress, run.accelerator
    report = evaluate(run, run.evaluated_model, "validation")[2]
    if isinstance(run.scheduler, WarmupPlateau):
        run.scheduler.step_metric(report["mAP"])
    values = {f"validation/{name}": value for name, value in report.items()}
    accelerator.log({"epoch": progress["epoch"], **values}, step=progress["step"])
    is_best = progress["best_mAP"] is None or report["mAP"] > progress["best_mAP"]
    if accelerator.is_main_process:
        tqdm.write(f"epoch {progress['epoch']}: validation mAP {report['mAP']:.4f}{' (best)' if is_best else ''}")
    if is_best:
        progress["best_mAP"], progress["best_epoch"] = report["mAP"], progress["epoch"]
        if accelerator.is_main_process:
            with atomic_folder(run.folder / "best") as folder:
                save_checkpoint(folder, run.evaluated_model, run.processor)
    accelerator.wait_for_everyone()


def save_last(run: Run) -> None:
    """Replace last/ by the state of now."""
    if run.accelerator.is_main_process:
        with atomic_folder(run.folder / "last") as folder:
            save_checkpoint(folder, run.evaluated_model, run.processor)
            save_training_state(
                folder,
                model=run.plain_model,
                optimizer=run.optimizer.optimizer,
                scheduler=run.scheduler,
                ema=run.ema,
                scaler=run.accelerator.scaler,
                progress=run.progress,
            )
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> dict:
    """Fit thresholds for the best checkpoint on validation, store them in it, score the test split once, publish.

    Returns:
        What results.json holds.
    """
    config, accelerator, folder = run.config, run.accelerator, run.folder / "best"
    model = type(run.plain_model).from_pretrained(folder).to(accelerator.device)
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
        scores, labels, results["test"] = evaluate(run, model, "test")
        results["test_at_thresholds"] = multilabel_report(scores, labels, fitted, groups=run.groups)
    if accelerator.is_main_process:
        with atomic_folder(folder) as new:
            save_checkpoint(new, model, run.processor)
        (run.folder / "results.json").write_text(json.dumps(results, indent=1))
        if config.push_to_hub:
            accelerator.print(f"Pushed: {push_checkpoint(folder, config.push_to_hub, private=config.hub_private)}")
    accelerator.print(
        f"The best checkpoint is {folder} (epoch {results['best_epoch']}): validation mAP {validation['mAP']:.4f}"
        + (f", test mAP {results['test']['mAP']:.4f}." if config.evaluate_test else ".")
    )
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 when all is done, 2 when the run was refused, 1 when it broke, 130 after Ctrl-C."""
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
    try:
        fit(run)
        finish(run)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        last = run.folder / "last"
        if not run.accelerator.is_main_process:
            pass
        elif last.exists():
            kept = f"{run.folder} keeps step {read_progress(last)['step']} in last/ and the best epoch in best/"
            print(f"\nInterrupted. {kept}; continue with `{run.folder}/config.yaml --resume`.", file=sys.stderr)
        else:
            print("\nInterrupted before the first save: there is nothing to continue from.", file=sys.stderr)
        return 130
    finally:
        # DistributedDataParallel must not hold the last reference to the process group: it would drop that with
        # Python's lock in hand, join gloo's threads, and hang where one of them waits for the lock (torch 2.13).
        (run.model,) = run.accelerator.free_memory(run.model)
    run.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
