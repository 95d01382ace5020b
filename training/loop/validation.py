"""A split scored in the middle of a run, and whether the epoch is the best so far."""

import numpy as np
import torch
from tqdm.auto import tqdm

from ..metrics.functional import multilabel_report
from ..scoring.predict import predict
from .frozen import loader_name
from .interruption import Stopped
from .optim import WarmupPlateau
from .run import Run


def evaluate(run: Run, model: torch.nn.Module, split: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Scores and labels (images, num_labels) of a whole split, and its metrics.

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
    report = evaluate(run, run.evaluated_model, loader_name(run, "validation"))[2]
    if isinstance(run.scheduler, WarmupPlateau):
        run.scheduler.step_metric(report["mAP"])
    epoch = progress.epoch + 1
    values = {f"validation/{name}": value for name, value in report.items()}
    accelerator.log({"epoch": epoch, **values}, step=progress.step)
    is_best = progress.best_mAP is None or report["mAP"] > progress.best_mAP
    if is_best:
        progress.best_mAP, progress.best_epoch = report["mAP"], epoch
    if accelerator.is_main_process:
        tqdm.write(f"epoch {epoch}: validation mAP {report['mAP']:.4f}{' (best)' if is_best else ''}")
    return is_best
