"""The end of a run: thresholds, results, report, push."""

import json
import shutil

import numpy as np
from transformers import AutoModelForImageClassification

from modeling_hsvlt.load_pretrained import load_pretrained

from ..checkpoint.atomic import atomic_folder, write_file
from ..checkpoint.folder import save_checkpoint, verify_if_sealed, write_marker
from ..metrics.functional import multilabel_report
from ..publish.hub import push_run
from ..report.page import result_record, write_report
from ..scoring.measured_with import fingerprints, weights_of
from ..scoring.predict import ScoredSplit
from ..scoring.thresholds import fit_thresholds, store_thresholds, threshold_info
from .frozen import loader_of_best
from .run import Run
from .validation import evaluate


def finish(run: Run) -> dict:
    """Fit thresholds for the best checkpoint on validation, store them in it, score the test split once, publish.

    Returns:
        What results.json holds.
    """
    config, accelerator, folder = run.config, run.accelerator, run.folder / "best"
    accelerator.wait_for_everyone()
    verify_if_sealed(folder, "*.safetensors")
    model = load_pretrained(AutoModelForImageClassification, folder).to(accelerator.device)
    scores, labels, validation = evaluate(run, model, loader_of_best(run))
    how = {"objective": config.threshold_objective, "target": config.threshold_target}
    fitted = fit_thresholds(scores, labels, **how, label_names=run.train_data.label_names)
    store_thresholds(model, fitted, threshold_info(labels, **how, dataset=config.dataset, split="validation"))
    run.processor.thresholds = model.config.thresholds
    results = {
        "best_epoch": run.progress.best_epoch,
        "steps": run.progress.step,
        "measured_with": fingerprints(model.config.to_dict()),
        "validation": validation,
        "validation_at_thresholds": multilabel_report(scores, labels, fitted, groups=run.groups),
    }
    if run.stream is not None:
        results["unreadable_images"] = run.progress.unreadable
    if run.groups is not None:
        results["positives_in_train"] = run.train_data.sparse_labels.positives().tolist()
    if config.evaluate_test:
        test_scores, test_labels, results["test"] = evaluate(run, model, "test")
        results["test_at_thresholds"] = multilabel_report(test_scores, test_labels, fitted, groups=run.groups)
    if accelerator.is_main_process:
        with atomic_folder(folder) as new:
            if (folder / "label_context").is_dir():  # the adapter, of which the loaded model knows nothing
                shutil.copytree(folder / "label_context", new / "label_context")
            save_checkpoint(new, model, run.processor)
            write_marker(new, step=run.progress.step, epoch=run.progress.best_epoch)
        results["weights"] = weights_of(folder, model.config.to_dict())
        write_file(run.folder / "results.json", json.dumps(results, indent=1))
        if config.report:
            _write_report(run, model, scores, labels, results)
        if config.push_to_hub:
            push_run(run.folder, config.push_to_hub, private=config.hub_private)
    accelerator.print(
        f"The best checkpoint is {folder} (epoch {results['best_epoch']}): validation mAP {validation['mAP']:.4f}"
        + (f", test mAP {results['test']['mAP']:.4f}." if config.evaluate_test else ".")
    )
    return results


def _write_report(run: Run, model, scores: np.ndarray, labels: np.ndarray, results: dict) -> None:
    config, counts = run.config, None if run.groups is None else run.train_data.sparse_labels.positives()
    record = result_record(
        results["validation_at_thresholds"],
        model.config,
        weights=results["weights"],
        checkpoint=str(run.folder / "best"),
        dataset=config.dataset,
        dataset_revision=config.dataset_revision,
        split="validation",
        threshold="auto",
        count_split=None if counts is None else "train",
    )
    images = run.loaders["validation"].dataset.split.images
    scored = ScoredSplit(run.train_data.label_names, scores, labels, images, counts)
    write_report(run.folder / "report", record, scored, model, run.processor.image_processor)
    run.accelerator.print(f"The report is {run.folder / 'report' / 'report.html'}.")
